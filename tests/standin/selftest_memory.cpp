// Memory: what may be touched, from where, and until when.
#include "selftest.h"
#include <sys/mman.h>


static void copies() {
    Device device;
    Memory memory(1000), other(1000);
    Queue queue;
    std::vector<unsigned char> out(1000, 7), in(1000);
    OK(cuMemcpyHtoDAsync_v2(memory.at, out.data(), 1000, queue.is));
    memset(out.data(), 0, out.size()); // it was captured
    OK(cuMemcpyDtoDAsync_v2(other.at + 100, memory.at + 100, 900, queue.is));
    OK(cuMemsetD8Async(other.at, 9, 100, queue.is));
    OK(cuMemcpyDtoHAsync_v2(in.data(), other.at, 1000, queue.is)); // pageable: it waits
    for (int each = 0; each < 1000; each++) HOLDS(in[each] == (each < 100 ? 9 : 7));
    Pinned pinned(1000);
    OK(cuMemcpyAsync(pinned.address(), memory.at, 1000, queue.is));
    HOLDS(pinned.words()[0] == 0xd5d5d5d5d5d5d5d5); // nothing runs when it is enqueued
    OK(cuStreamSynchronize(queue.is));
    HOLDS(pinned.words()[0] == 0x0707070707070707);
    CUDA_MEMCPY2D shape = {};
    shape.srcMemoryType = shape.dstMemoryType = CU_MEMORYTYPE_DEVICE;
    shape.srcDevice = other.at, shape.srcPitch = 10, shape.dstDevice = memory.at, shape.dstPitch = 20;
    shape.WidthInBytes = 5, shape.Height = 50;
    OK(cuMemcpy2DAsync_v2(&shape, queue.is));
    OK(cuMemcpyDtoHAsync_v2(in.data(), memory.at, 1000, queue.is));
    HOLDS(in[0] == 9 && in[4] == 9 && in[5] == 7 && in[184] == 9 && in[200] == 7);
}

static void fresh_memory_is_poisoned() {
    Device device;
    Memory memory(5000);
    HOLDS(memory.at % 256 == 0);
    HOLDS(words_at(memory.at, 1250)[1249] == 0xd5d5d5d5);
}

static void host_reads_device() {
    Device device;
    Memory memory(64);
    (void)*reinterpret_cast<volatile char *>(memory.at);
}

static void host_writes_device() {
    Device device;
    Memory memory(64);
    *reinterpret_cast<volatile char *>(memory.at + 8) = 1;
}

static void copy_past_the_end() {
    Device device;
    Memory memory(100), other(200);
    OK(cuMemcpyDtoDAsync_v2(other.at, memory.at, 101, nullptr));
}

static void use_after_free() {
    Device device;
    CUdeviceptr freed;
    OK(cuMemAlloc_v2(&freed, 4096));
    OK(cuMemFree_v2(freed));
    OK(cuMemsetD8Async(freed, 0, 1, nullptr));
}

static void freed_before_it_ran() {
    Device device;
    Queue queue;
    CUdeviceptr freed;
    OK(cuMemAlloc_v2(&freed, 4096));
    OK(cuMemsetD8Async(freed, 0, 1, queue.is));
    OK(cuMemFree_v2(freed));
    OK(cuStreamSynchronize(queue.is));
}

static void freed_without_waiting() {
    Device device;
    Queue first, second;
    Mark mark;
    CUdeviceptr memory;
    OK(cuMemAlloc_v2(&memory, 4096));
    OK(cuMemsetD8Async(memory, 0, 1, first.is));
    OK(cuEventRecord(mark.is, first.is));
    // The second stream is waited for, and has waited for no more than what ran before.
    OK(cuMemsetD8Async(memory, 0, 1, first.is));
    OK(cuStreamWaitEvent(second.is, mark.is, 0));
    OK(cuStreamSynchronize(second.is));
    OK(cuMemFree_v2(memory));
    OK(cuStreamSynchronize(first.is));
}

static void free_twice() {
    Device device;
    CUdeviceptr memory;
    OK(cuMemAlloc_v2(&memory, 1));
    OK(cuMemFree_v2(memory));
    OK(cuMemFree_v2(memory));
}

static void free_inside() {
    Device device;
    Memory memory(512);
    OK(cuMemFree_v2(memory.at + 256));
}

static void reuse() {
    Device device;
    CUdeviceptr first, second, third;
    OK(cuMemAlloc_v2(&first, 1000));
    OK(cuMemAlloc_v2(&second, 1000));
    OK(cuMemFree_v2(first));
    OK(cuMemAlloc_v2(&third, 900));
    HOLDS((third == first) == (getenv("STANDIN_REUSE") != nullptr));
    OK(cuMemFree_v2(second));
    OK(cuMemFree_v2(third));
}

static void kernels() {
    Device device;
    Memory memory(4000), other(4000);
    Queue queue;
    {
        Kernel kernel;
        kernel.run(queue.is, memory.at, 0, 1000, 5);
        kernel.run(queue.is, other.at, memory.at, 1000, 6);
        OK(cuStreamSynchronize(queue.is));
        HOLDS(standin_launches() == 2);
    }
    for (uint32_t word : words_at(other.at, 1000)) HOLDS(word == 11);
}

static void kernel_past_the_end() {
    Device device;
    Memory memory(4000);
    Kernel kernel;
    kernel.run(nullptr, memory.at, 0, 1001, 5);
    OK(cuStreamSynchronize(nullptr));
}

static void kernel_misaligned() {
    Device device;
    Memory memory(4000);
    Kernel kernel;
    kernel.run(nullptr, memory.at + 2, 0, 10, 5);
    OK(cuStreamSynchronize(nullptr));
}

static void kernel_overlap(uint32_t from) {
    Device device;
    Memory memory(4000);
    Kernel kernel("standin_fill_once");
    kernel.run(nullptr, memory.at, memory.at + from, 100, 5);
    OK(cuStreamSynchronize(nullptr));
}
static void kernel_apart() { kernel_overlap(400); }
static void kernel_overlaps() { kernel_overlap(396); }

static void kernel_reads_pageable() {
    Device device;
    Memory memory(4000);
    Kernel kernel;
    static uint32_t words[10];
    kernel.run(nullptr, memory.at, reinterpret_cast<uint64_t>(words), 10, 5);
    OK(cuStreamSynchronize(nullptr));
}

static void kernel_reads_registered() {
    Device device;
    Memory memory(4000);
    Kernel kernel;
    static uint32_t words[10] = {3};
    OK(cuMemHostRegister_v2(words, sizeof words, 0));
    GIVES(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, cuMemHostRegister_v2(words + 1, 4, 0));
    kernel.run(nullptr, memory.at, reinterpret_cast<uint64_t>(words), 10, 5);
    OK(cuStreamSynchronize(nullptr));
    OK(cuMemHostUnregister(words));
    GIVES(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, cuMemHostUnregister(words));
    HOLDS(words_at(memory.at, 1)[0] == 8);
    void *gone = mmap(nullptr, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    GIVES(CUDA_ERROR_INVALID_VALUE, cuMemHostRegister_v2(gone, 4096, 0)); // not to be written
    munmap(gone, 4096);
    GIVES(CUDA_ERROR_INVALID_VALUE, cuMemHostRegister_v2(gone, 4096, 0));
}

static void unregistered_too_early() {
    Device device;
    Memory memory(4000);
    static uint32_t words[10];
    OK(cuMemHostRegister_v2(words, sizeof words, 0));
    OK(cuMemcpyAsync(memory.at, reinterpret_cast<uint64_t>(words), 40, nullptr));
    OK(cuMemHostUnregister(words));
    OK(cuStreamSynchronize(nullptr));
}

static void pinned_is_read_late() {
    Device device;
    Memory memory(8);
    Pinned pinned(8);
    pinned.words()[0] = 1;
    OK(cuMemcpyAsync(memory.at, pinned.address(), 8, nullptr));
    pinned.words()[0] = 2;
    HOLDS(words_at(memory.at, 1)[0] == 2);
}

static void device_as_host() {
    Device device;
    Memory memory(8), other(8);
    OK(cuMemcpyHtoDAsync_v2(memory.at, reinterpret_cast<void *>(other.at), 8, nullptr));
}

static void peer(bool enabled) {
    Device first(0);
    Memory memory(400);
    Device second(1);
    if (enabled) {
        OK(cuCtxEnablePeerAccess(first.context, 0));
        GIVES(CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED, cuCtxEnablePeerAccess(first.context, 0));
    }
    Memory own(400);
    Kernel kernel;
    kernel.run(nullptr, own.at, memory.at, 100, 1);
    OK(cuStreamSynchronize(nullptr));
}
static void peer_enabled() { peer(true); }
static void peer_not_enabled() { peer(false); }

static void peer_copy_not_enabled() {
    Device first(0);
    Memory memory(400);
    Device second(1);
    Memory own(400);
    OK(cuMemcpyAsync(own.at, memory.at, 100, nullptr));
    OK(cuStreamSynchronize(nullptr));
}

static void peer_copy_by_the_host() {
    Device first(0);
    Memory memory(400);
    Device second(1);
    Memory own(400);
    OK(cuMemcpyPeerAsync(own.at, second.context, memory.at, first.context, 100, nullptr));
    OK(cuStreamSynchronize(nullptr));
}

static void no_peers() {
    Device first(0), second(1);
    int can = 1;
    OK(cuDeviceCanAccessPeer(&can, 0, 1));
    HOLDS(!can);
    GIVES(CUDA_ERROR_PEER_ACCESS_UNSUPPORTED, cuCtxEnablePeerAccess(first.context, 0));
}

static void pool_of_a_peer() {
    Device first(0);
    Queue queue;
    CUdeviceptr memory;
    OK(cuMemAllocAsync(&memory, 400, queue.is));
    OK(cuStreamSynchronize(queue.is));
    Device second(1);
    OK(cuCtxEnablePeerAccess(first.context, 0)); // says nothing about pools
    Memory own(400);
    OK(cuMemcpyAsync(own.at, memory, 100, nullptr));
    OK(cuStreamSynchronize(nullptr));
}

// A pool of the device, and memory of it that is there.
static CUdeviceptr of_own_pool(CUmemoryPool *pool, CUstream stream) {
    CUmemPoolProps props = {};
    props.allocType = props.location.type = 1;
    OK(cuMemPoolCreate(pool, &props));
    CUdeviceptr memory;
    OK(cuMemAllocFromPoolAsync(&memory, 400, *pool, stream));
    OK(cuStreamSynchronize(stream));
    uint64_t handle;
    OK(cuPointerGetAttribute(&handle, 17, memory));
    HOLDS(handle == reinterpret_cast<uint64_t>(*pool));
    return memory;
}

static void own_pool_of_a_peer() {
    Device first(0);
    Queue queue;
    CUmemoryPool pool;
    CUdeviceptr memory = of_own_pool(&pool, queue.is);
    CUmemAccessDesc access{{1, 1}, 3};
    OK(cuMemPoolSetAccess(pool, &access, 1)); // what it has given already, too
    {
        Device second(1);
        Memory own(400);
        OK(cuMemcpyAsync(own.at, memory, 100, nullptr));
        OK(cuStreamSynchronize(nullptr));
    }
    OK(cuMemPoolDestroy(pool)); // before what it gave
    OK(cuMemFreeAsync(memory, queue.is));
    OK(cuStreamSynchronize(queue.is));
}

static void other_pool_opened() {
    Device first(0);
    Queue queue;
    CUmemoryPool pool, usual;
    CUdeviceptr memory = of_own_pool(&pool, queue.is);
    OK(cuDeviceGetDefaultMemPool(&usual, 0));
    CUmemAccessDesc access{{1, 1}, 3};
    OK(cuMemPoolSetAccess(usual, &access, 1));
    Device second(1);
    Memory own(400);
    OK(cuMemcpyAsync(own.at, memory, 100, nullptr));
    OK(cuStreamSynchronize(nullptr));
}

static void pool_destroyed_twice() {
    Device device(0);
    Queue queue;
    CUmemoryPool pool, usual;
    OK(cuMemFreeAsync(of_own_pool(&pool, queue.is), queue.is));
    OK(cuDeviceGetDefaultMemPool(&usual, 0));
    GIVES(CUDA_ERROR_INVALID_VALUE, cuMemPoolDestroy(usual));
    OK(cuMemPoolDestroy(pool));
    cuMemPoolDestroy(pool);
}

static void pool_left() {
    Device device(0);
    Queue queue;
    CUmemoryPool pool;
    OK(cuMemFreeAsync(of_own_pool(&pool, queue.is), queue.is));
}

const std::vector<Case> memory_cases = {
    {"copies", nullptr, "", copies},
    {"fresh_memory_is_poisoned", nullptr, "", fresh_memory_is_poisoned},
    {"host_reads_device", "HOST-ACCESS", "", host_reads_device},
    {"host_writes_device", "HOST-ACCESS", "", host_writes_device},
    {"copy_past_the_end", "UNKNOWN-MEMORY", "", copy_past_the_end},
    {"use_after_free", "UNKNOWN-MEMORY", "", use_after_free},
    {"freed_before_it_ran", "UNKNOWN-MEMORY", "STANDIN_IDLE_MS=0", freed_before_it_ran},
    {"freed_without_waiting", "FREED-IN-USE|UNKNOWN-MEMORY", "", freed_without_waiting},
    {"free_twice", "UNKNOWN-MEMORY", "", free_twice},
    {"free_inside", "UNKNOWN-MEMORY", "", free_inside},
    {"fresh_addresses", nullptr, "", reuse},
    {"addresses_used_again", nullptr, "STANDIN_REUSE=1", reuse},
    {"kernels", nullptr, "", kernels},
    {"kernel_past_the_end", "UNKNOWN-MEMORY", "", kernel_past_the_end},
    {"kernel_misaligned", "MISALIGNED", "", kernel_misaligned},
    {"kernel_apart", nullptr, "", kernel_apart},
    {"kernel_overlaps", "OVERLAP", "", kernel_overlaps},
    {"kernel_reads_pageable", "UNREGISTERED-HOST", "", kernel_reads_pageable},
    {"kernel_reads_registered", nullptr, "", kernel_reads_registered},
    {"unregistered_too_early", "UNREGISTERED-HOST", "STANDIN_IDLE_MS=0", unregistered_too_early},
    {"pinned_is_read_late", nullptr, "", pinned_is_read_late},
    {"device_as_host", "WRONG-KIND", "", device_as_host},
    {"peer_enabled", nullptr, "", peer_enabled},
    {"peer_not_enabled", "NO-PEER-ACCESS", "", peer_not_enabled},
    {"peer_copy_not_enabled", "NO-PEER-ACCESS", "", peer_copy_not_enabled},
    {"peer_copy_by_the_host", nullptr, "STANDIN_PEERS=0", peer_copy_by_the_host},
    {"no_peers", nullptr, "STANDIN_PEERS=0", no_peers},
    {"pool_of_a_peer", "NO-PEER-ACCESS", "", pool_of_a_peer},
    {"own_pool_of_a_peer", nullptr, "", own_pool_of_a_peer},
    {"other_pool_opened", "NO-PEER-ACCESS", "", other_pool_opened},
    {"pool_destroyed_twice", "BAD-HANDLE", "", pool_destroyed_twice},
    {"pool_left", "LEAK", "", pool_left},
};
