// Allocation and registration of memory, and what the interface tells about an address.
#include "standin.h"
#include <cstring>
#include <fstream>
#include <string>
#include <sys/mman.h>

using namespace standin;

EXPORT CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) {
    BEGIN;
    call.safe_in_capture();
    CUresult error;
    RegionPtr region = device_alloc(call.context(), bytes, Kind::Device, &error);
    if (region) *address = region->base;
    return error;
}

EXPORT CUresult cuMemFree_v2(CUdeviceptr address) {
    BEGIN_RELEASE;
    call.safe_in_capture();
    call.context();
    if (!address) return call.injected;
    RegionPtr region = start_of(call, address);
    if (region->kind != Kind::Device && region->kind != Kind::Pool)
        violation("UNKNOWN-MEMORY", "%s: 0x%llx was not allocated by this process's driver", call.name, address);
    if (region->freeing) violation("UNKNOWN-MEMORY", "%s: 0x%llx is being freed already", call.name, address);
    if (!region->allocated)
        violation("FREED-IN-USE", "%s: the host has not waited for the allocation of 0x%llx", call.name, address);
    release_region(call.name, region, true);
    return call.injected;
}

static CUresult host_alloc(Call &call, void **pointer, size_t bytes, unsigned flags) {
    if (!bytes || (flags & ~7u)) return CUDA_ERROR_INVALID_VALUE;
    void *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    memset(memory, 0xd5, bytes);
    auto region = std::make_shared<Region>();
    region->id = state().next_id++;
    region->base = reinterpret_cast<uint64_t>(memory);
    region->size = bytes;
    region->kind = Kind::Pinned;
    region->context = call.context();
    region->data = static_cast<unsigned char *>(memory);
    add_region(region);
    *pointer = memory;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemHostAlloc(void **pointer, size_t bytes, unsigned flags) {
    BEGIN;
    call.safe_in_capture();
    call.context();
    return host_alloc(call, pointer, bytes, flags);
}

EXPORT CUresult cuMemAllocHost_v2(void **pointer, size_t bytes) {
    BEGIN;
    call.context();
    return host_alloc(call, pointer, bytes, 0);
}

EXPORT CUresult cuMemFreeHost(void *pointer) {
    BEGIN_RELEASE;
    call.safe_in_capture();
    call.context();
    RegionPtr region = start_of(call, reinterpret_cast<uint64_t>(pointer));
    if (region->kind != Kind::Pinned) violation("UNREGISTERED-HOST", "%s: %p is not the driver's host memory", call.name, pointer);
    release_region(call.name, region, true);
    munmap(pointer, region->size);
    return call.injected;
}

// Whether the host may write all of these addresses.
static bool writable(uint64_t low, uint64_t high) {
    std::ifstream maps("/proc/self/maps");
    for (std::string line; low < high && std::getline(maps, line);) {
        unsigned long long start, end;
        char access[5];
        if (std::sscanf(line.c_str(), "%llx-%llx %4s", &start, &end, access) != 3 || end <= low) continue;
        if (start > low || access[1] != 'w') return false;
        low = end;
    }
    return low >= high;
}

EXPORT CUresult cuMemHostRegister_v2(void *pointer, size_t bytes, unsigned flags) {
    BEGIN;
    call.safe_in_capture();
    Context *context = call.context();
    uint64_t start = reinterpret_cast<uint64_t>(pointer), page = start & ~4095ull;
    if (!pointer || !bytes || (flags & ~15u) || in_device_range(start)) return CUDA_ERROR_INVALID_VALUE;
    if (flags & 12) return CUDA_ERROR_NOT_SUPPORTED; // I/O memory, and read-only, as the attribute says
    if (msync(reinterpret_cast<void *>(page), start + bytes - page, MS_ASYNC) != 0) return CUDA_ERROR_INVALID_VALUE; // not mapped
    if (!writable(page, start + bytes)) return CUDA_ERROR_INVALID_VALUE; // without the read-only flag
    auto next = state().regions.lower_bound(start + bytes);
    if (next != state().regions.begin()) {
        auto &before = std::prev(next)->second;
        if (before->base + before->size > start) return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    }
    auto region = std::make_shared<Region>();
    region->id = state().next_id++;
    region->base = start;
    region->size = bytes;
    region->kind = Kind::Registered;
    region->context = context;
    region->data = static_cast<unsigned char *>(pointer);
    add_region(region);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemHostUnregister(void *pointer) {
    BEGIN_RELEASE;
    call.context();
    RegionPtr region = find_region(reinterpret_cast<uint64_t>(pointer));
    if (!region || region->kind != Kind::Registered || region->data != pointer) return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
    release_region(call.name, region, true);
    return call.injected;
}

EXPORT CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *address, void *pointer, unsigned flags) {
    BEGIN;
    call.context();
    RegionPtr region = find_region(reinterpret_cast<uint64_t>(pointer));
    if (flags || !region || region->on_device()) return CUDA_ERROR_INVALID_VALUE;
    *address = reinterpret_cast<uint64_t>(pointer);
    return CUDA_SUCCESS;
}

static std::pair<uint64_t, uint64_t> reservation_of(const RegionPtr &region) {
    return *std::prev(state().reserved.upper_bound(region->base));
}

// The mapping that an address lies in. With STANDIN_WHOLE_MAPPINGS, of all that was reserved with it: what a driver might say that
// takes the documentation otherwise.
static std::pair<uint64_t, uint64_t> mapping_of(const RegionPtr &region) {
    if (!region) return {0, 0};
    if (region->kind == Kind::Mapped && is_set("STANDIN_WHOLE_MAPPINGS")) return reservation_of(region);
    return {region->base, region->size};
}

EXPORT CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *bytes, CUdeviceptr address) {
    BEGIN;
    call.context();
    RegionPtr region = find_region(address);
    if (!region) return CUDA_ERROR_NOT_FOUND;
    // What it says of mapped memory is not documented: the least helpful of what it might.
    auto [start, size] = region->kind == Kind::Mapped ? reservation_of(region) : std::pair{region->base, region->size};
    if (base) *base = start;
    if (bytes) *bytes = size;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemGetInfo_v2(size_t *free, size_t *total) {
    BEGIN;
    *total = setting("STANDIN_MEMORY_MB", 16384) << 20;
    *free = *total - call.context()->device->used;
    return CUDA_SUCCESS;
}

// Whether an address was reserved for mappings.
static bool is_reserved(uint64_t address) {
    auto next = state().reserved.upper_bound(address);
    return next != state().reserved.begin() && address - std::prev(next)->first < std::prev(next)->second;
}

// No region: what cuPointerGetAttributes gives for an address that the driver does not know.
static CUresult attribute_of(const RegionPtr &region, CUdeviceptr address, int which, void *out) {
    auto give = [out](auto value) {
        memcpy(out, &value, sizeof value);
        return CUDA_SUCCESS;
    };
    bool device = region && region->on_device();
    if (!region && is_set("STANDIN_RESERVED") && is_reserved(address)) {
        if (which == 2) return give(static_cast<int>(CU_MEMORYTYPE_DEVICE));
        if (which == 9) return give(0);
    }
    if (which >= 18 && which <= 20 && !find_symbol("cuMemRetainAllocationHandle")) return CUDA_ERROR_INVALID_VALUE; // older drivers
    switch (which) {
    case 1: {
        bool of_context = region && region->kind != Kind::Pool && region->kind != Kind::Mapped;
        return give(of_context ? reinterpret_cast<uint64_t>(region->context) : 0ull);
    }
    case 2: return give(region ? static_cast<int>(device ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST) : 0);
    case 3: return give(static_cast<uint64_t>(region ? address : 0));
    case 4: // the host's pointer: device memory has none
        if (device) return CUDA_ERROR_INVALID_VALUE;
        return give(static_cast<uint64_t>(region ? address : 0));
    case 7: return give(region ? region->id : 0);
    case 8: return give(0u); // managed
    case 9: return give(region ? region->context->device->ordinal : static_cast<int>(CU_DEVICE_INVALID));
    case 10: return give(static_cast<unsigned>(region && region->kind == Kind::Device));
    case 11: return give(region ? region->base : 0);
    case 12: return give(region ? region->size : 0);
    case 13: return give(static_cast<unsigned>(region != nullptr));
    case 14: return give(static_cast<unsigned>(region && region->physical ? region->physical->types : 0));
    case 17: return give(region && region->pool ? reinterpret_cast<uint64_t>(region->pool.get()) : 0ull);
    case 18: return give(mapping_of(region).second);
    case 19: return give(mapping_of(region).first);
    case 20: return give(region ? region->physical ? region->physical->id : region->id : 0);
    default: return CUDA_ERROR_INVALID_VALUE;
    }
}

EXPORT CUresult cuPointerGetAttribute(void *data, int attribute, CUdeviceptr address) {
    BEGIN;
    RegionPtr region = find_region(address);
    return region ? attribute_of(region, address, attribute, data) : static_cast<CUresult>(CUDA_ERROR_INVALID_VALUE);
}

EXPORT CUresult cuPointerGetAttributes(unsigned count, int *attributes, void **data, CUdeviceptr address) {
    BEGIN;
    RegionPtr region = find_region(address);
    for (unsigned each = 0; each < count; each++) {
        CUresult error = attribute_of(region, address, attributes[each], data[each]);
        if (error && attributes[each] == 4) memset(data[each], 0, sizeof(void *));
        else if (error) return error;
    }
    return CUDA_SUCCESS;
}
