#!/bin/sh
# Installs libreshard: shared and static library, C and C++ header, pkg-config file, CMake package.
#
#   cpp_examples/install.sh [--prefix DIR] [--libdir DIR] [--uninstall]
#
#   --prefix DIR   DIR/lib, DIR/include and DIR/share get the files. Default: /usr/local
#   --libdir DIR   the library folder, in the prefix: lib64, lib/x86_64-linux-gnu, ... Default: lib
#   --uninstall    removes what an earlier run installed in the prefix, and nothing else
#
# It builds first (cargo build --release --locked) where cargo is at hand; else it takes what target/release holds.
# DESTDIR=DIR puts everything under DIR, for packagers. Installing over another version replaces it.
# The result may be moved as a whole: no file in it holds the prefix.

set -eu

say() { printf 'install.sh: %s\n' "$*"; }
die() { say "$*" >&2; exit 1; }

root=$(cd "$(dirname "$0")/.." && pwd)
prefix=/usr/local
libdir=lib
action=install
while [ $# -gt 0 ]; do
    case $1 in
        --prefix=*) prefix=${1#*=}; shift ;;
        --libdir=*) libdir=${1#*=}; shift ;;
        --prefix | --libdir)
            [ $# -ge 2 ] || die "$1 wants a folder"
            if [ "$1" = --prefix ]; then prefix=$2; else libdir=$2; fi
            shift 2 ;;
        --uninstall) action=uninstall; shift ;;
        -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$root/cpp_examples/install.sh"; exit ;;
        *) die "unknown argument '$1'; --help lists the known ones" ;;
    esac
done
[ -n "$prefix" ] || die "--prefix wants a folder"
case $prefix in /*) ;; *) prefix=$PWD/$prefix ;; esac
prefix=${prefix%/}
libdir=${libdir#"$prefix"/} # packagers write --libdir /usr/lib64
libdir=${libdir%/}
case $libdir in
    '' | /* | .* | *..* | *//* | */./*) die "--libdir '$libdir' must be a folder in the prefix $prefix, such as lib64" ;;
esac
dest=${DESTDIR:-}$prefix
manifest=share/reshard/installed.txt # every file, then every folder that was made for them; relative to the prefix

# Removes what the manifest lists; of the folders, those that are empty by now.
remove() {
    while IFS= read -r entry; do
        case $entry in
            */) rmdir "$dest/$entry" 2>/dev/null || true ;;
            *) rm -f "$dest/$entry" ;;
        esac
    done <"$dest/$manifest"
}

# Gives the loader's cache its news, where the loader looks into the library folder.
tell_loader() {
    if [ -z "${DESTDIR:-}" ] && ldconfig -N -v 2>/dev/null | grep -q "^$prefix/$libdir:"; then
        ldconfig || say "run ldconfig as root: programs find libreshard only then"
    fi
}

if [ "$action" = uninstall ]; then
    [ -f "$dest/$manifest" ] || die "nothing to remove: there is no $dest/$manifest"
    libdir=$(sed -n 's,/libreshard\.so$,,p' "$dest/$manifest")
    remove
    tell_loader
    say "removed libreshard from $dest"
    exit
fi

# One source per fact: Cargo.toml knows the version and the texts, src/abi.rs the number of the binary interface.
cargo_toml() { sed -n "s/^$1 = \"\(.*\)\"\$/\1/p" "$root/Cargo.toml" | head -n 1; }
version=$(cargo_toml version)
abi=$(sed -n 's/^pub const RS_ABI: u32 = \([0-9]*\);$/\1/p' "$root/src/abi.rs")
[ -n "$version" ] || die "no version in Cargo.toml"
[ -n "$abi" ] || die "no RS_ABI in src/abi.rs"
# The file's name is <abi>.<minor>.<patch>: three numbers that begin with the SONAME's.
minor_patch=${version#*.}
soname=libreshard.so.$abi
real=$soname.${minor_patch%%[-+]*}
# What Rust's standard library wants of the system; tests/install.sh compares it with rustc's own list.
native="gcc_s util rt pthread m dl c"

built=${CARGO_TARGET_DIR:-target}/release
case $built in /*) ;; *) built=$root/$built ;; esac
if command -v cargo >/dev/null; then
    (cd "$root" && cargo build --release --locked --lib)
elif [ -f "$built/libreshard.so" ] && [ -f "$built/libreshard.a" ]; then
    say "no cargo here: installing what $built holds"
else
    die "no cargo here and nothing in $built: run 'cargo build --release --locked' first"
fi

umask 022
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
stage=$work/stage

# fill TEMPLATE FILE: a file of cpp_examples/package with its @NAMES@ filled in.
fill() {
    up=$(printf '%s/pkgconfig' "$libdir" | sed 's,[^/][^/]*,..,g')
    sed -e "s|@VERSION@|$version|g" -e "s|@MAJOR@|${version%%.*}|g" -e "s|@SONAME@|$soname|g" \
        -e "s|@LIBDIR@|$libdir|g" -e "s|@UP@|$up|g" \
        -e "s|@DESCRIPTION@|$(cargo_toml description)|g" -e "s|@URL@|$(cargo_toml repository)|g" \
        -e "s|@NATIVE_FLAGS@|-l$(printf '%s' "$native" | sed 's/ / -l/g')|g" \
        -e "s|@NATIVE_LIBS@|$(printf '%s' "$native" | tr ' ' ';')|g" \
        "$root/cpp_examples/package/$1" >"$2"
}

mkdir -p "$stage/include" "$stage/$libdir/pkgconfig" "$stage/$libdir/cmake/reshard" "$stage/share/reshard"
cp "$root/include/reshard.h" "$root/include/reshard.hpp" "$stage/include/"
cp "$built/libreshard.a" "$stage/$libdir/"
cp "$built/libreshard.so" "$stage/$libdir/$real"
chmod 755 "$stage/$libdir/$real"
ln -s "$real" "$stage/$libdir/$soname"
ln -s "$soname" "$stage/$libdir/libreshard.so"
fill reshard.pc.in "$stage/$libdir/pkgconfig/reshard.pc"
fill reshardConfig.cmake.in "$stage/$libdir/cmake/reshard/reshardConfig.cmake"
fill reshardConfigVersion.cmake.in "$stage/$libdir/cmake/reshard/reshardConfigVersion.cmake"
: >"$stage/$manifest"
(cd "$stage" && find . ! -type d | sed 's,^\./,,' | LC_ALL=C sort) >"$work/files"

# folder DIR: makes a folder of the prefix with its parents, and notes those that were not there.
folder() {
    [ -d "$dest/$1" ] && return
    case $1 in */*) folder "${1%/*}" ;; esac
    mkdir "$dest/$1"
    printf '%s/\n' "$1" >>"$work/folders"
}

: >"$work/folders"
if [ -f "$dest/$manifest" ]; then remove; fi
if [ ! -d "$dest" ]; then
    mkdir -p "$dest"
    echo / >>"$work/folders"
fi
while IFS= read -r file; do
    folder "${file%/*}"
    # Renamed into place: a program that runs with an older file keeps it.
    cp -P "$stage/$file" "$dest/$file.new"
    mv -f "$dest/$file.new" "$dest/$file"
done <"$work/files"
{ cat "$work/files"; LC_ALL=C sort -r "$work/folders"; } >"$dest/$manifest" # folders deepest first
tell_loader

say "libreshard $version is in $dest ($libdir/$real)"
say "others find it with PKG_CONFIG_PATH=$dest/$libdir/pkgconfig, CMake with -Dreshard_DIR=$dest/$libdir/cmake/reshard"
say "$root/cpp_examples/install.sh --uninstall --prefix $prefix removes it"
