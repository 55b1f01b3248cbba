// What the cases of the self-test share: the driver's functions, as a program without CUDA's header declares them, and set-up.
#pragma once
#include "cuda_types.h"
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unistd.h>
#include <vector>

extern "C" {
CUresult cuInit(unsigned);
CUresult cuDeviceGetUuid_v2(CUuuid *, CUdevice);
CUresult cuDeviceGetCount(int *);
CUresult cuDeviceGetAttribute(int *, int, CUdevice);
CUresult cuDeviceCanAccessPeer(int *, CUdevice, CUdevice);
CUresult cuDevicePrimaryCtxRetain(CUcontext *, CUdevice);
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice);
CUresult cuCtxGetCurrent(CUcontext *);
CUresult cuCtxSetCurrent(CUcontext);
CUresult cuCtxPushCurrent_v2(CUcontext);
CUresult cuCtxPopCurrent_v2(CUcontext *);
CUresult cuCtxEnablePeerAccess(CUcontext, unsigned);
CUresult cuCtxSynchronize();
CUresult cuPointerGetAttribute(void *, int, CUdeviceptr);
CUresult cuPointerGetAttributes(unsigned, int *, void **, CUdeviceptr);
CUresult cuMemGetAddressRange_v2(CUdeviceptr *, size_t *, CUdeviceptr);
CUresult cuMemAlloc_v2(CUdeviceptr *, size_t);
CUresult cuMemFree_v2(CUdeviceptr);
CUresult cuMemAllocAsync(CUdeviceptr *, size_t, CUstream);
CUresult cuMemFreeAsync(CUdeviceptr, CUstream);
CUresult cuDeviceGetDefaultMemPool(CUmemoryPool *, CUdevice);
CUresult cuMemPoolCreate(CUmemoryPool *, const CUmemPoolProps *);
CUresult cuMemPoolDestroy(CUmemoryPool);
CUresult cuMemPoolSetAccess(CUmemoryPool, const CUmemAccessDesc *, size_t);
CUresult cuMemAllocFromPoolAsync(CUdeviceptr *, size_t, CUmemoryPool, CUstream);
CUresult cuMemHostAlloc(void **, size_t, unsigned);
CUresult cuMemFreeHost(void *);
CUresult cuMemHostRegister_v2(void *, size_t, unsigned);
CUresult cuMemHostUnregister(void *);
CUresult cuMemcpyAsync(CUdeviceptr, CUdeviceptr, size_t, CUstream);
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr, const void *, size_t, CUstream);
CUresult cuMemcpyDtoHAsync_v2(void *, CUdeviceptr, size_t, CUstream);
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr, CUdeviceptr, size_t, CUstream);
CUresult cuMemcpyHtoD_v2(CUdeviceptr, const void *, size_t);
CUresult cuMemcpyDtoH_v2(void *, CUdeviceptr, size_t);
CUresult cuMemcpyPeerAsync(CUdeviceptr, CUcontext, CUdeviceptr, CUcontext, size_t, CUstream);
CUresult cuMemcpy2DAsync_v2(const CUDA_MEMCPY2D *, CUstream);
CUresult cuMemsetD8Async(CUdeviceptr, unsigned char, size_t, CUstream);
CUresult cuStreamCreate(CUstream *, unsigned);
CUresult cuStreamDestroy_v2(CUstream);
CUresult cuStreamQuery(CUstream);
CUresult cuStreamSynchronize(CUstream);
CUresult cuStreamWaitEvent(CUstream, CUevent, unsigned);
CUresult cuStreamWaitValue64_v2(CUstream, CUdeviceptr, uint64_t, unsigned);
CUresult cuStreamWriteValue64_v2(CUstream, CUdeviceptr, uint64_t, unsigned);
CUresult cuStreamIsCapturing(CUstream, int *);
CUresult cuEventCreate(CUevent *, unsigned);
CUresult cuEventRecord(CUevent, CUstream);
CUresult cuEventQuery(CUevent);
CUresult cuEventSynchronize(CUevent);
CUresult cuEventDestroy_v2(CUevent);
CUresult cuModuleLoadData(CUmodule *, const void *);
CUresult cuModuleGetFunction(CUfunction *, CUmodule, const char *);
CUresult cuModuleUnload(CUmodule);
CUresult cuFuncGetAttribute(int *, int, CUfunction);
CUresult cuLaunchKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void **,
                        void **);
CUresult cuIpcGetMemHandle(CUipcMemHandle *, CUdeviceptr);
CUresult cuIpcOpenMemHandle_v2(CUdeviceptr *, CUipcMemHandle, unsigned);
CUresult cuIpcCloseMemHandle(CUdeviceptr);
CUresult cuMemGetAllocationGranularity(size_t *, const CUmemAllocationProp *, int);
CUresult cuMemCreate(CUmemGenericAllocationHandle *, size_t, const CUmemAllocationProp *, unsigned long long);
CUresult cuMemRelease(CUmemGenericAllocationHandle);
CUresult cuMemAddressReserve(CUdeviceptr *, size_t, size_t, CUdeviceptr, unsigned long long);
CUresult cuMemAddressFree(CUdeviceptr, size_t);
CUresult cuMemMap(CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long);
CUresult cuMemUnmap(CUdeviceptr, size_t);
CUresult cuMemSetAccess(CUdeviceptr, size_t, const CUmemAccessDesc *, size_t);
CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle *, void *);
CUresult cuMemExportToShareableHandle(void *, CUmemGenericAllocationHandle, int, unsigned long long);
CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *, void *, int);
CUresult cuGetErrorName(CUresult, const char **);
CUresult cuGetProcAddress_v2(const char *, void **, int, uint64_t, int *);
CUresult cuThreadExchangeStreamCaptureMode(int *);
CUresult cuStreamBeginCapture_v2(CUstream, int);
CUresult cuStreamEndCapture(CUstream, void **);
CUresult cuGraphInstantiateWithFlags(void **, void *, unsigned long long);
CUresult cuGraphLaunch(void *, CUstream);
CUresult cuGraphExecDestroy(void *);
CUresult cuGraphDestroy(void *);
uint64_t standin_live(void);
uint64_t standin_pending(void);
uint64_t standin_calls(void);
uint64_t standin_launches(void);
void standin_fail_at(uint64_t, int);
void standin_fail_from(uint64_t, int);
void standin_fail_in(const char *, uint64_t, int);
void standin_capture(CUstream, int);
}

[[noreturn]] inline void fail(int line, const char *what, long value) {
    fprintf(stderr, "line %d: %s (%ld)\n", line, what, value);
    exit(1);
}
// A call that must give this error; a condition that must hold.
#define GIVES(error, call)                                                                                                       \
    do {                                                                                                                         \
        if (CUresult got = (call); got != (error)) fail(__LINE__, #call, got);                                                   \
    } while (0)
#define OK(call) GIVES(0, call)
#define HOLDS(condition)                                                                                                         \
    do {                                                                                                                         \
        if (!(condition)) fail(__LINE__, #condition, 0);                                                                         \
    } while (0)

// A device with its context current, given back at the end of a case that gets there.
struct Device {
    int ordinal;
    CUcontext context;
    explicit Device(int ordinal = 0) : ordinal(ordinal) {
        OK(cuInit(0));
        OK(cuDevicePrimaryCtxRetain(&context, ordinal));
        OK(cuCtxPushCurrent_v2(context));
    }
    ~Device() {
        CUcontext popped;
        OK(cuCtxPopCurrent_v2(&popped));
        OK(cuDevicePrimaryCtxRelease_v2(ordinal));
    }
};

struct Memory {
    CUdeviceptr at;
    explicit Memory(size_t bytes) { OK(cuMemAlloc_v2(&at, bytes)); }
    ~Memory() { OK(cuMemFree_v2(at)); }
};

struct Queue {
    CUstream is;
    explicit Queue(unsigned flags = 1) { OK(cuStreamCreate(&is, flags)); }
    ~Queue() { OK(cuStreamDestroy_v2(is)); }
};

struct Mark {
    CUevent is;
    Mark() { OK(cuEventCreate(&is, 2)); }
    ~Mark() { OK(cuEventDestroy_v2(is)); }
};

struct Pinned {
    void *at;
    explicit Pinned(size_t bytes) { OK(cuMemHostAlloc(&at, bytes, 0)); }
    ~Pinned() { OK(cuMemFreeHost(at)); }
    uint64_t *words() { return static_cast<uint64_t *>(at); }
    CUdeviceptr address() { return reinterpret_cast<uint64_t>(at); }
};

inline const char *ptx = ".version 7.0\n.target sm_80\n.address_size 64\n"
                         ".visible .entry standin_fill(.param .u64 a, .param .u64 b,\n .param .u32 c, .param .u32 d)\n"
                         ".maxntid 256, 1, 1\n{ .shared .align 4 .b8 tile[512]; ret; }\n"
                         ".visible .entry standin_fill_once(.param .u64 a, .param .u64 b, .param .u32 c, .param .u32 d) { ret; }\n";

struct Kernel {
    CUmodule module;
    CUfunction function;
    explicit Kernel(const char *name = "standin_fill") {
        OK(cuModuleLoadData(&module, ptx));
        OK(cuModuleGetFunction(&function, module, name));
    }
    ~Kernel() { OK(cuModuleUnload(module)); }
    // `count` words at `to` become `value`, plus those at `from` unless that is 0.
    void run(CUstream stream, CUdeviceptr to, CUdeviceptr from, uint32_t count, uint32_t value) {
        void *params[] = {&to, &from, &count, &value};
        OK(cuLaunchKernel(function, 1, 1, 1, 32, 1, 1, 0, stream, params, nullptr));
        to = from = 0; // the launch has its own copies
        count = value = 0;
    }
};

inline std::vector<uint32_t> words_at(CUdeviceptr at, size_t count) {
    std::vector<uint32_t> words(count);
    OK(cuMemcpyDtoH_v2(words.data(), at, 4 * count));
    return words;
}

// One case: what it must die of (none: it must pass), and its environment, `NAME=VALUE NAME=VALUE`.
struct Case {
    const char *name, *dies_of, *environment;
    void (*run)();
};
extern const std::vector<Case> memory_cases, mapping_cases, setup_cases, order_cases, graph_cases, process_cases, nccl_cases, nccl_wrong_cases;
