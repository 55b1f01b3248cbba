// The kernels, compiled for the host, and the memory accesses that they make: each is checked, and each byte is noted.
#include "standin.h"
#include <cstring>

// src/device/kernels/copy.cu, compiled as C++. A stand-in built without it has no such kernel.
extern "C" void reshard_copy_host(uint32_t grid, uint32_t block, unsigned long long descs, unsigned long long first, uint32_t count,
                                  uint32_t chunks) __attribute__((weak));
extern "C" uint32_t reshard_copy_order __attribute__((weak));

namespace standin {

// What a kernel reaches without a look-up: memory that it touched before.
struct Lease {
    RegionPtr region;
    uint64_t low, high;
    Footprint reads, writes;
};

static const Running *running_kernel;
static const Kernel *kernel_run;
static std::vector<Lease *> leases; // latest use first

static Lease *lease_of(uint64_t address, uint32_t bytes, bool writes) {
    for (size_t each = 0; each < leases.size(); each++) {
        Lease *lease = leases[each];
        if (address < lease->low || address >= lease->high || bytes > lease->high - address) continue;
        if (each) std::swap(leases[each], leases[each / 2]);
        return lease;
    }
    RegionPtr region;
    reach(*running_kernel, address, bytes, writes ? "writes" : "reads", &region);
    leases.push_back(new Lease{region, region->base, region->base + region->size, {}, {}});
    return leases.back();
}

static unsigned char *access(uint64_t address, uint32_t bytes, bool writes) {
    if (!running_kernel)
        violation("UNKNOWN-MEMORY", "a kernel's code reaches for 0x%llx outside of a launch", (unsigned long long)address);
    if (!bytes || (bytes & (bytes - 1)) || address % bytes)
        violation("MISALIGNED", "%s %s %u bytes at 0x%llx", running_kernel->name().c_str(), writes ? "writes" : "reads", bytes,
                  (unsigned long long)address);
    Lease *lease = lease_of(address, bytes, writes);
    uint64_t offset = address - lease->low;
    bool before = (writes ? lease->writes : lease->reads).add(offset, offset + bytes);
    if (before && writes && kernel_run->writes_once)
        violation("OVERLAP", "%s writes 0x%llx twice", running_kernel->access.note->text().c_str(), (unsigned long long)address);
    return lease->region->data + offset;
}

// Runs all blocks; what they touched counts as one operation's accesses.
void run_kernel(Running &running, const Kernel &kernel, const Launch &launch) {
    running_kernel = &running;
    kernel_run = &kernel;
    kernel.run(launch);
    running_kernel = nullptr;
    for (Lease *lease : leases) {
        if (kernel.writes_once && lease->reads.meets(lease->writes))
            violation("OVERLAP", "%s reads bytes that it writes", running.access.note->text().c_str());
        Shadow &shadow = lease->region->shadow;
        lease->reads.each([&](uint64_t low, uint64_t high) { shadow.read(low, high, running.access, *running.clock); });
        lease->writes.each([&](uint64_t low, uint64_t high) { shadow.write(low, high, running.access, *running.clock); });
        delete lease;
    }
    leases.clear();
}

template <typename T> static T param(const Launch &launch, unsigned which) {
    T value;
    memcpy(&value, launch.params[which], sizeof value);
    return value;
}

static void reshard_copy(const Launch &launch) {
    if (&reshard_copy_order) reshard_copy_order = static_cast<uint32_t>(draw(256)); // of the threads within a phase
    reshard_copy_host(launch.grid[0], launch.block[0], param<uint64_t>(launch, 0), param<uint64_t>(launch, 1),
                      param<uint32_t>(launch, 2), param<uint32_t>(launch, 3));
}

// For the stand-in's own tests: writes `value` to `count` words from `address` on, and adds the words at `from` unless that is 0.
static void standin_fill(const Launch &launch) {
    uint64_t address = param<uint64_t>(launch, 0), from = param<uint64_t>(launch, 1);
    for (uint32_t each = 0; each < param<uint32_t>(launch, 2); each++) {
        uint32_t value = param<uint32_t>(launch, 3), read = 0;
        if (from) memcpy(&read, access(from + 4 * each, 4, false), 4);
        value += read;
        memcpy(access(address + 4 * each, 4, true), &value, 4);
    }
}

const Kernel *find_kernel(const std::string &name) {
    static const Kernel kernels[] = {
        {"reshard_copy", {8, 8, 4, 4}, true, &reshard_copy_host ? reshard_copy : nullptr},
        {"standin_fill", {8, 8, 4, 4}, false, standin_fill},
        {"standin_fill_once", {8, 8, 4, 4}, true, standin_fill},
    };
    for (const Kernel &kernel : kernels)
        if (name == kernel.name && kernel.run) return &kernel;
    return nullptr;
}

} // namespace standin

// Device memory's place for the kernel's host build.
extern "C" unsigned char *rs_at(uint64_t address, uint32_t bytes, int write) { return standin::access(address, bytes, write != 0); }
