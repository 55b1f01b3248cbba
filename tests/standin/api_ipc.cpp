// Memory of other processes: handles for whole allocations, opened once for each context however often they are asked for.
#include "standin.h"
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

using namespace standin;

namespace {

constexpr uint64_t MAGIC = 0x6e69646e61747321;
constexpr uint64_t PAGE = 4096;

struct Handle {
    uint64_t magic;
    int32_t process, file; // of the device's memory in the process that exported
    int32_t physical, reserved;
    uint64_t offset; // of its first page in the file
    uint64_t size, id;
    char zero[16];
};
static_assert(sizeof(Handle) == sizeof(CUipcMemHandle), "as in cuda.h");

RegionPtr opened_before(const Handle &handle, const Context *context) {
    for (auto &[base, region] : state().regions)
        if (region->kind == Kind::Import && region->context == context && region->owner == static_cast<uint64_t>(handle.process) &&
            region->remote == handle.id)
            return region;
    return nullptr;
}

// Maps the pages of the other process's allocation where this context's device gets an address for them.
RegionPtr import(const Handle &handle, Context *context) {
    State &all = state();
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", handle.process, handle.file);
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0) return nullptr;
    auto region = std::make_shared<Region>();
    region->pages = (HEADER + handle.size + PAGE - 1) / PAGE;
    region->page = take_pages(context->device, region->pages);
    uint64_t alias = region->page - all.range + all.alias;
    void *mapped = mmap(reinterpret_cast<void *>(alias), region->pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file,
                        static_cast<off_t>(handle.offset));
    close(file);
    if (mapped == MAP_FAILED) return nullptr;
    madvise(mapped, region->pages * PAGE, MADV_DONTDUMP);
    Header *header = header_of(*region);
    if (header->id != handle.id || header->size != handle.size || __atomic_load_n(&header->freed, __ATOMIC_ACQUIRE)) return nullptr;
    region->id = all.next_id++;
    region->base = region->page + HEADER;
    region->size = handle.size;
    region->kind = Kind::Import;
    region->context = context;
    region->data = reinterpret_cast<unsigned char *>(alias + HEADER);
    region->owner = static_cast<uint64_t>(handle.process);
    region->remote = handle.id;
    announce(header);
    add_region(region);
    return region;
}

} // namespace

// For the whole allocation that the address lies in, as with the real driver: whoever opens it gets its start.
EXPORT CUresult cuIpcGetMemHandle(CUipcMemHandle *out, CUdeviceptr address) {
    BEGIN;
    call.context();
    check_range(call, address, 1, "exports");
    RegionPtr region = find_region(address);
    if (region->kind != Kind::Device) return CUDA_ERROR_INVALID_VALUE;
    Device *device = region->context->device;
    Handle handle = {};
    handle.magic = MAGIC;
    handle.process = getpid();
    handle.file = device->memory;
    handle.physical = device->physical;
    handle.offset = region->page - state().range - state().span * device->ordinal;
    handle.size = region->size;
    handle.id = region->id;
    memcpy(out, &handle, sizeof handle);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuIpcOpenMemHandle_v2(CUdeviceptr *address, CUipcMemHandle in, unsigned flags) {
    BEGIN;
    Context *context = call.context();
    Handle handle;
    memcpy(&handle, &in, sizeof handle);
    if (handle.magic != MAGIC || flags != 1) return CUDA_ERROR_INVALID_VALUE;
    if (handle.process == getpid()) return CUDA_ERROR_INVALID_CONTEXT;
    if (handle.physical != context->device->physical && !setting("STANDIN_PEERS", 1)) return CUDA_ERROR_PEER_ACCESS_UNSUPPORTED;
    RegionPtr region = opened_before(handle, context);
    if (!region) region = import(handle, context);
    if (!region) return CUDA_ERROR_MAP_FAILED;
    region->opened++;
    *address = region->base;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuIpcCloseMemHandle(CUdeviceptr address) {
    BEGIN_RELEASE;
    call.context();
    RegionPtr region = find_region(address);
    if (!region || region->kind != Kind::Import || region->base != address)
        violation("UNKNOWN-MEMORY", "%s: 0x%llx is not the start of memory of another process", call.name, address);
    if (--region->opened) return call.injected;
    release_region(call.name, region, true);
    withdraw(header_of(*region));
    // Whoever still reaches for it is told; should that fail, there is nothing there.
    mmap(header_of(*region), region->pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    return call.injected;
}
