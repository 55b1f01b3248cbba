#!/usr/bin/env bash
# Installs into temporary prefixes, builds programs outside the repository against them, by the very lines of README.md, runs them, and
# uninstalls: nothing may be left. Needs cargo, cc, c++, cmake, pkg-config, readelf.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail() {
    printf 'FAILED: %s\n' "$*" >&2
    exit 1
}
ok() { printf 'ok: %s\n' "$*"; }
same() { [ "$2" = "$3" ] || fail "$1: expected '$2', found '$3'"; }

# The code block of README.md whose first line is ``` and the argument.
readme() {
    awk -v mark='```'"$1" '$0 == mark { inside = 1; found++; next } $0 == "```" { inside = 0 } inside { print }
        END { if (found != 1) { print "README.md has " found + 0 " blocks " mark > "/dev/stderr"; exit 1 } }' "$root/README.md"
}

version=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$root/Cargo.toml" | head -n 1)
abi=$(sed -n 's/^pub const RS_ABI: u32 = \([0-9]*\);$/\1/p' "$root/src/abi.rs")
real=libreshard.so.$abi.${version#*.}
# Same names as cargo-c's: it takes the file's number from Cargo.toml.
same "version of [package.metadata.capi.library]" "${real#libreshard.so.}" \
    "$(sed -n '/^\[package.metadata.capi.library\]/,/^$/s/^version = "\([^"]*\)".*/\1/p' "$root/Cargo.toml")"

# needs LIBRARY PROGRAM: whether the loader must find the library for the program.
needs() { readelf -d "$2" | grep -q "NEEDED.*\[$1\]"; }

# runs FOLDER PREFIX LIBDIR: app runs with the shared library, app-static without any, and both move the tensor.
runs() {
    local expected
    expected="libreshard $(rs_version): 1 4 2 5 3 6"
    needs "libreshard.so.$abi" "$1/app" || fail "$1/app does not ask for libreshard.so.$abi"
    same "$1/app" "$expected" "$(LD_LIBRARY_PATH=$2/$3 "$1/app")"
    [ -e "$1/app-static" ] || return 0
    ! needs "libreshard.so.$abi" "$1/app-static" || fail "$1/app-static asks for the shared library"
    same "$1/app-static" "$expected" "$("$1/app-static")"
}

# What rs_version() must say: a byte each.
rs_version() { IFS=. read -r major minor patch <<<"$version"; echo $((major << 16 | minor << 8 | patch)); }

# example FOLDER NAME MARK OUTPUT: README.md prints cpp_examples/NAME.cpp, whose first line is the command that builds it.
example() {
    local at=$1/$2 name=$2
    mkdir "$at" && readme "$3" >"$at/$name.cpp"
    diff "$root/cpp_examples/$name.cpp" "$at/$name.cpp" || fail "README.md and cpp_examples/$name.cpp differ"
    (cd "$at" && sed -n '1s,^// ,,p' "$name.cpp" | sed "s,\$, -Wall -Wextra -Wpedantic -Werror -o $name," >build.sh && bash -euxo pipefail build.sh)
    same "$name.cpp" "$4" "$(LD_LIBRARY_PATH=$lib "$at/$name")"
}

# use PREFIX LIBDIR [CMAKE_ARGUMENT]: everything that a user of the installed package does.
use() {
    local prefix=$1 libdir=$2 hint=${3:-} lib=$1/$2 at
    at=$(mktemp -d "$work/use.XXXXXX")
    export PKG_CONFIG_PATH=$lib/pkgconfig

    same "link libreshard.so" "$real" "$(basename "$(readlink -f "$lib/libreshard.so")")"
    same "link libreshard.so.$abi" "$real" "$(readlink "$lib/libreshard.so.$abi")"
    readelf -d "$lib/$real" | grep -q "SONAME.*\[libreshard.so.$abi\]" || fail "the SONAME of $lib/$real is not libreshard.so.$abi"
    same "pkg-config --modversion" "$version" "$(pkg-config --modversion reshard)"

    mkdir "$at/pkg-config" && cp "$root/tests/install/app.c" "$at/pkg-config/"
    (cd "$at/pkg-config" && readme "sh pkg-config" >build.sh && bash -euxo pipefail build.sh)
    runs "$at/pkg-config" "$prefix" "$libdir"

    mkdir "$at/hand" && cp "$root/tests/install/app.c" "$at/hand/"
    (cd "$at/hand" && readme "sh by-hand" | sed "s,/usr/local/lib,$lib,g; s,/usr/local,$prefix,g" >build.sh && bash -euxo pipefail build.sh)
    runs "$at/hand" "$prefix" "$libdir"

    mkdir "$at/cmake" && cp "$root/tests/install/app.c" "$at/cmake/"
    readme cmake >"$at/cmake/CMakeLists.txt"
    cmake -S "$at/cmake" -B "$at/cmake/build" "${hint:--DCMAKE_PREFIX_PATH=$prefix}" -DCMAKE_C_FLAGS="-Wall -Wextra -Werror"
    cmake --build "$at/cmake/build"
    runs "$at/cmake/build" "$prefix" "$libdir"

    example "$at" world "cpp world" "1 1 1 2 2 2 1 1 1 2 2 2 "
    example "$at" minimal cpp "1 4 2 5 3 6 "
    {
        echo '#include <reshard.hpp>'
        echo 'reshard::Comm join(int local_rank, int local_world, int rank, int world) {'
        readme "cpp hosts"
        echo 'return comm; }'
    } >"$at/hosts.cpp"
    c++ -std=c++17 -Wall -Wextra -Wpedantic -Werror -I"$prefix/include" -c "$at/hosts.cpp" -o "$at/hosts.o"
    ok "pkg-config, CMake, by hand and the README's C++ build against $prefix ($libdir)"
}

# finds VERSION: whether CMake takes the package for that request.
finds() {
    rm -rf "$work/finds" && mkdir "$work/finds"
    printf 'cmake_minimum_required(VERSION 3.19)\nproject(x C)\nfind_package(reshard %s REQUIRED)\n' "$1" >"$work/finds/CMakeLists.txt"
    cmake -S "$work/finds" -B "$work/finds/build" -DCMAKE_PREFIX_PATH="$work/plain" >/dev/null 2>&1
}

install() { "$root/cpp_examples/install.sh" "$@"; }
contents() { (cd "$1" && find . | LC_ALL=C sort); }

# A new prefix, used where it is, then moved and used there.
install --prefix "$work/plain"
use "$work/plain" lib
for request in "" "$version EXACT" "${version%%.*}.0" "0.0.1...$version" "0.0.1...<99"; do
    finds "$request" || fail "CMake does not find version '$request'"
done
for request in 99 "${version%%.*}.999" "$((${version%%.*} + 1)).0" "0.0.1 EXACT" "0.0.1...<$version"; do
    ! finds "$request" || fail "CMake finds version '$request' in $version"
done
ok "CMake's version requests"
mv "$work/plain" "$work/moved"
use "$work/moved" lib
install --prefix "$work/moved" --uninstall
[ ! -e "$work/moved" ] || fail "uninstall left $(contents "$work/moved")"
ok "uninstall leaves nothing of a prefix that it made"

# A shared prefix, staged, with another library folder; an older version lies there and gives way.
stage=$work/stage/opt/reshard
mkdir -p "$stage/lib64" "$stage/share/doc"
echo theirs >"$stage/lib64/libother.so"
contents "$stage" >"$work/before"
DESTDIR=$work/stage install --prefix /opt/reshard --libdir=/opt/reshard/lib64
echo old >"$stage/lib64/libreshard.so.1.0.0"
sed -i '1i lib64/libreshard.so.1.0.0' "$stage/share/reshard/installed.txt"
DESTDIR=$work/stage install --prefix /opt/reshard --libdir lib64
[ ! -e "$stage/lib64/libreshard.so.1.0.0" ] || fail "the older version is still there"
! grep -rq "$work" "$stage" || fail "an installed file holds the folder it was staged in"
use "$stage" lib64 "-Dreshard_DIR=$stage/lib64/cmake/reshard" # CMake looks into lib64 only where that is the system's own folder
DESTDIR=$work/stage install --prefix /opt/reshard --uninstall
contents "$stage" | diff "$work/before" - || fail "uninstall left or took too much"
ok "uninstall takes exactly what install put, DESTDIR and lib64"

# What is wrong is refused and leaves no trace.
for wrong in "--libdir /elsewhere" "--libdir ../lib" "--prefix" "--what" "--uninstall --prefix $work/none"; do
    # shellcheck disable=SC2086 # two words
    ! install $wrong >/dev/null 2>&1 || fail "install.sh takes '$wrong'"
done
[ ! -e "$work/none" ] || fail "a refused call made $work/none"
ok "wrong arguments are refused"

# The list of native libraries is rustc's own.
rustc=$(cd "$root" && cargo rustc --locked --lib --crate-type staticlib -- --print native-static-libs 2>&1 | sed -n 's/^note: native-static-libs: //p')
install --prefix "$work/native" >/dev/null
sorted() { tr -s '[:space:];' '\n' | sed 's/^-l//; /^$/d' | LC_ALL=C sort -u | tr '\n' ' '; }
[ -n "$rustc" ] || fail "rustc printed no native-static-libs"
same "Libs.private of reshard.pc" "$(sorted <<<"$rustc")" "$(sed -n 's/^Libs.private: //p' "$work/native/lib/pkgconfig/reshard.pc" | sorted)"
same "INTERFACE_LINK_LIBRARIES of the CMake package" "$(sorted <<<"$rustc")" \
    "$(sed -n 's/.*INTERFACE_LINK_LIBRARIES "\(.*\)").*/\1/p' "$work/native/lib/cmake/reshard/reshardConfig.cmake" | sorted)"
ok "native libraries: $rustc"
