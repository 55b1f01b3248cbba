"""Lets PyTorch's CUDA wheel be imported without the gigabytes of NVIDIA libraries that it asks for: stubs.py SITE_PACKAGES

The loader wants each of them to be there, and each function that torch may call. One library holds all of those, each of which answers 100
("no CUDA device"); the others are empty, bear the name that is asked for, and lead to that one. So no symbol has to have its version.
Needs gcc and readelf.
"""

import ctypes
import glob
import os
import re
import subprocess
import sys

ALL = "libcudastubs.so"  # the one library that is not empty


def readelf(path, what):
    return subprocess.run(["readelf", "-W", what, path], capture_output=True, text=True, check=True).stdout


def link(folder, name, *arguments):
    output = os.path.join(folder, name)
    subprocess.run(["gcc", "-shared", "-nostdlib", f"-Wl,-soname,{name}", "-o", output, *arguments], check=True)


def system_library(name):
    """None where the loader does not find it."""
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def main(site_packages):
    libraries = glob.glob(f"{site_packages}/torch/lib/*.so*")
    folder = f"{site_packages}/nvidia/cu13/lib"  # where torch looks first
    os.makedirs(folder, exist_ok=True)
    own = {os.path.basename(path) for path in libraries}
    needed, wanted, defined = set(), set(), set()
    for path in libraries:
        needed |= set(re.findall(r"\(NEEDED\).*\[(.*)\]", readelf(path, "--dynamic")))
        for line in readelf(path, "--dyn-syms").splitlines():
            fields = line.split()  # number, value, size, type, binding, visibility, section, name@version
            if len(fields) >= 8 and fields[0][:-1].isdigit():
                place = wanted if fields[6] == "UND" and fields[4] == "GLOBAL" else defined
                place.add(fields[7].split("@")[0])
    present = {name: system_library(name) for name in needed - own}
    missing = sorted(name for name, library in present.items() if library is None)
    found = [ctypes.CDLL(None), *(library for library in present.values() if library)]
    names = sorted(name for name in wanted - defined if not any(hasattr(library, name) for library in found))

    source = os.path.join(folder, "cudastubs.S")
    with open(source, "w") as f:
        f.write('.section .note.GNU-stack,"",@progbits\n.text\n')
        f.writelines(f".globl {name}\n.type {name},@function\n{name}:\n" for name in names)
        f.write("mov $100, %eax\nret\n")
    link(folder, ALL, source)
    for name in missing:
        link(folder, name, "-Wl,--no-as-needed,-rpath,$ORIGIN", os.path.join(folder, ALL))
    print(f"{len(names)} functions for {len(missing)} libraries that are not here: {' '.join(missing)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
