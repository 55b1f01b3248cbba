"""The GPUs, as the CUDA driver tells of them: probe.py

Prints a line for the driver, one for each GPU, and whether all of them reach each other's memory. Exit 3 and one line: there is none
that the library works on. Needs nothing but Python.
"""

import ctypes as c
import sys


def skip(why):
    print(f"skipped, no GPU: {why}")
    sys.exit(3)


def call(name, *arguments):
    answer = getattr(cuda, name)(*arguments)
    if answer:
        sys.exit(f"{name} answered {answer}")


def attribute(number, device):
    value = c.c_int()
    call("cuDeviceGetAttribute", c.byref(value), number, device)
    return value.value


def reaches(one, other):
    yes = c.c_int()
    call("cuDeviceCanAccessPeer", c.byref(yes), one, other)
    return yes.value == 1


def describe(device):
    name, memory = c.create_string_buffer(100), c.c_size_t()
    call("cuDeviceGetName", name, len(name), device)
    call("cuDeviceTotalMem_v2", c.byref(memory), device)
    capability = f"{attribute(75, device)}.{attribute(76, device)}"
    if attribute(75, device) < 8:
        skip(f"{name.value.decode()} has compute capability {capability}; the kernel is built for 8.0 and up")
    return f"{name.value.decode()}, compute capability {capability}, {attribute(16, device)} multiprocessors, {memory.value >> 30} GiB"


try:
    cuda = c.CDLL("libcuda.so.1")
except OSError:
    skip("there is no CUDA driver (libcuda.so.1)")
if cuda.cuInit(0) == 100:
    skip("the CUDA driver finds none")
call("cuInit", 0)
version, count = c.c_int(), c.c_int()
call("cuDriverGetVersion", c.byref(version))
call("cuDeviceGetCount", c.byref(count))
if count.value == 0:
    skip("the CUDA driver finds none (CUDA_VISIBLE_DEVICES?)")
if version.value < 12000:
    skip(f"the driver is of CUDA {version.value // 1000}; wanted is 12 or later")
lines = [f"gpu {device}: {describe(device)}" for device in range(count.value)]
try:
    with open("/proc/driver/nvidia/version") as file:
        release = file.readline().split("  ")[1]
except (OSError, IndexError):
    release = "of unknown release"
print(f"driver {release}, CUDA {version.value // 1000}.{version.value % 1000 // 10}", *lines, sep="\n")
pairs = [(one, other) for one in range(count.value) for other in range(count.value) if one != other]
print("peers: " + ("all" if all(reaches(*pair) for pair in pairs) else "not all"))
