// Stream-ordered memory and its pools.
#include "standin.h"

using namespace standin;

static PoolPtr pool_of(const Call &call, CUmemoryPool handle) {
    auto is = [handle](const PoolPtr &pool) { return reinterpret_cast<CUmemoryPool>(pool.get()) == handle; };
    for (auto &device : state().devices)
        if (is(device->pool)) return device->pool;
    for (const PoolPtr &pool : state().pools)
        if (is(pool)) return pool;
    violation("BAD-HANDLE", "%s: %p is not a memory pool", call.name, static_cast<void *>(handle));
}

EXPORT CUresult cuDeviceGetDefaultMemPool(CUmemoryPool *pool, CUdevice device) {
    BEGIN;
    if (!device_of(device)) return CUDA_ERROR_INVALID_DEVICE;
    *pool = reinterpret_cast<CUmemoryPool>(device_of(device)->pool.get());
    return CUDA_SUCCESS;
}

// Pinned, on a device, without handles for other processes: what is not modelled is refused.
EXPORT CUresult cuMemPoolCreate(CUmemoryPool *out, const CUmemPoolProps *props) {
    BEGIN;
    call.safe_in_capture();
    if (props->allocType != 1 || props->location.type != 1) return CUDA_ERROR_INVALID_VALUE;
    if (props->handleTypes || props->maxSize || props->usage || props->win32SecurityAttributes) return CUDA_ERROR_NOT_SUPPORTED;
    for (unsigned char byte : props->reserved)
        if (byte) return CUDA_ERROR_INVALID_VALUE;
    if (!device_of(props->location.id)) return CUDA_ERROR_INVALID_DEVICE;
    auto pool = std::make_shared<Pool>(Pool{device_of(props->location.id)});
    state().pools.insert(pool);
    *out = reinterpret_cast<CUmemoryPool>(pool.get());
    return CUDA_SUCCESS;
}

// What it gave stays until it is released.
EXPORT CUresult cuMemPoolDestroy(CUmemoryPool handle) {
    BEGIN_RELEASE;
    call.safe_in_capture();
    PoolPtr pool = pool_of(call, handle);
    return state().pools.erase(pool) ? call.injected : static_cast<CUresult>(CUDA_ERROR_INVALID_VALUE); // the default one
}

EXPORT CUresult cuMemPoolSetAccess(CUmemoryPool pool, const CUmemAccessDesc *list, size_t count) {
    BEGIN;
    call.safe_in_capture();
    PoolPtr found = pool_of(call, pool);
    for (size_t each = 0; each < count; each++) {
        Device *peer = device_of(list[each].location.id);
        if (list[each].location.type != 1 || !peer) return CUDA_ERROR_INVALID_VALUE;
        if (list[each].flags && list[each].flags != 3) return CUDA_ERROR_INVALID_VALUE; // nothing, or reading and writing
        if (!can_access(peer, found->device)) return CUDA_ERROR_PEER_ACCESS_UNSUPPORTED;
        if (list[each].flags) found->access.insert(peer);
        else found->access.erase(peer);
    }
    return CUDA_SUCCESS;
}

// Pool memory: from its allocation's turn in the stream until its release's turn, for those ordered between them.
static CUresult alloc_async(Call &call, CUdeviceptr *address, size_t bytes, CUmemoryPool handle_of_pool, CUstream handle) {
    StreamPtr stream = stream_of(call, handle);
    PoolPtr pool = handle_of_pool ? pool_of(call, handle_of_pool) : stream->context->device->pool;
    if (pool->device != stream->context->device) return CUDA_ERROR_INVALID_VALUE; // real ones allow it between peers
    call.not_capturing(stream); // graphs with allocations are not modelled
    CUresult error;
    RegionPtr region = device_alloc(stream->context, bytes, Kind::Pool, &error);
    if (!region) return error;
    region->allocated = false;
    region->pool = pool;
    *address = region->base;
    auto mark = [](Op &op) { op.note = std::make_shared<Note>(Note{op.note->what, op.note->stream, op.note->number, true}); };
    enqueue(call, stream, call.name, [region](Running &running) {
        region->allocated = true;
        region->shadow.write(0, region->size, running.access, *running.clock);
    }, mark);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemAllocAsync(CUdeviceptr *address, size_t bytes, CUstream handle) {
    BEGIN;
    return alloc_async(call, address, bytes, nullptr, handle);
}

EXPORT CUresult cuMemAllocFromPoolAsync(CUdeviceptr *address, size_t bytes, CUmemoryPool pool, CUstream handle) {
    BEGIN;
    if (!pool) return CUDA_ERROR_INVALID_VALUE;
    return alloc_async(call, address, bytes, pool, handle);
}

EXPORT CUresult cuMemFreeAsync(CUdeviceptr address, CUstream handle) {
    BEGIN_RELEASE;
    StreamPtr stream = stream_of(call, handle);
    call.not_capturing(stream); // graphs with allocations are not modelled
    if (!address) return CUDA_ERROR_INVALID_VALUE;
    RegionPtr region = start_of(call, address);
    if (region->kind != Kind::Pool) return CUDA_ERROR_INVALID_VALUE;
    if (region->freeing) violation("UNKNOWN-MEMORY", "%s: 0x%llx is being freed already", call.name, address);
    region->freeing = true;
    auto mark = [](Op &op) { op.note = std::make_shared<Note>(Note{op.note->what, op.note->stream, op.note->number, true}); };
    enqueue(call, stream, call.name, [region](Running &running) {
        if (!region->allocated)
            violation("UNORDERED-USE", "%s before the memory's allocation", running.access.note->text().c_str());
        region->shadow.write(0, region->size, running.access, *running.clock);
        release_region("cuMemFreeAsync", region, false);
    }, mark);
    return call.injected;
}
