// Contexts, modules, leaks and injected errors.
#include "selftest.h"
#include <thread>

static void no_context() {
    OK(cuInit(0));
    CUdeviceptr memory;
    OK(cuMemAlloc_v2(&memory, 1));
}

static void no_context_in_a_thread() {
    Device device;
    std::thread([] {
        CUdeviceptr memory;
        OK(cuMemAlloc_v2(&memory, 1));
    }).join();
}

static void released_context() {
    OK(cuInit(0));
    CUcontext context;
    OK(cuDevicePrimaryCtxRetain(&context, 0));
    OK(cuCtxSetCurrent(context));
    OK(cuDevicePrimaryCtxRelease_v2(0));
    CUdeviceptr memory;
    OK(cuMemAlloc_v2(&memory, 1));
}

static void released_context_made_current() {
    OK(cuInit(0));
    CUcontext context;
    OK(cuDevicePrimaryCtxRetain(&context, 0));
    OK(cuDevicePrimaryCtxRelease_v2(0));
    OK(cuCtxSetCurrent(context));
}

static void context_in_use() {
    OK(cuInit(0));
    CUcontext context;
    OK(cuDevicePrimaryCtxRetain(&context, 0));
    OK(cuCtxSetCurrent(context));
    CUdeviceptr memory;
    OK(cuMemAlloc_v2(&memory, 1));
    OK(cuDevicePrimaryCtxRelease_v2(0));
}

static void stream_of_another_context() {
    Device first(0);
    Queue queue;
    Device second(1);
    Memory memory(8);
    OK(cuMemsetD8Async(memory.at, 0, 8, queue.is));
}

static void event_of_another_context() {
    Device first(0);
    Mark mark;
    Device second(1);
    OK(cuEventRecord(mark.is, nullptr));
}

static void context_stack() {
    Device first(0);
    CUcontext current = nullptr;
    {
        Device second(1);
        OK(cuCtxGetCurrent(&current));
        HOLDS(current == second.context);
    }
    OK(cuCtxGetCurrent(&current));
    HOLDS(current == first.context);
}

static void modules() {
    Device device;
    CUmodule module;
    CUfunction function;
    GIVES(CUDA_ERROR_INVALID_PTX, cuModuleLoadData(&module, "no assembly"));
    GIVES(CUDA_ERROR_UNSUPPORTED_PTX_VERSION, cuModuleLoadData(&module, ".version 9.0\n.target sm_80\n"));
    GIVES(CUDA_ERROR_NO_BINARY_FOR_GPU, cuModuleLoadData(&module, ".version 8.0\n.target sm_90\n"));
    Kernel kernel;
    GIVES(CUDA_ERROR_NOT_FOUND, cuModuleGetFunction(&function, kernel.module, "another"));
    void *params[4] = {};
    GIVES(CUDA_ERROR_INVALID_VALUE, cuLaunchKernel(kernel.function, 0, 1, 1, 1, 1, 1, 0, nullptr, params, nullptr));
    GIVES(CUDA_ERROR_INVALID_VALUE, cuLaunchKernel(kernel.function, 1, 65536, 1, 1, 1, 1, 0, nullptr, params, nullptr));
    GIVES(CUDA_ERROR_INVALID_VALUE, cuLaunchKernel(kernel.function, 1, 1, 1, 1025, 1, 1, 0, nullptr, params, nullptr));
    GIVES(CUDA_ERROR_INVALID_VALUE, cuLaunchKernel(kernel.function, 1, 1, 1, 1, 1, 1, 49153, nullptr, params, nullptr));
    GIVES(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, cuLaunchKernel(kernel.function, 1, 1, 1, 257, 1, 1, 0, nullptr, params, nullptr));
    HOLDS(standin_launches() == 0);
}

// The PTX that is checked in, where it is, fits the kernel's host code.
static void our_kernel() {
    FILE *file = fopen("src/device/kernels/copy.ptx", "r");
    if (!file) return;
    std::vector<char> text(4 << 20);
    HOLDS(fread(text.data(), 1, text.size() - 1, file) > 0);
    fclose(file);
    Device device;
    CUmodule module;
    CUfunction function;
    OK(cuModuleLoadData(&module, text.data()));
    OK(cuModuleGetFunction(&function, module, "reshard_copy"));
    int threads = 0;
    OK(cuFuncGetAttribute(&threads, 0, function));
    HOLDS(threads == 256);
    OK(cuModuleUnload(module));
}

static void unloaded_too_early() {
    Device device;
    Memory memory(4);
    Kernel kernel;
    kernel.run(nullptr, memory.at, 0, 1, 1);
    OK(cuModuleUnload(kernel.module));
}

static void wrong_params() {
    Device device;
    CUmodule module;
    CUfunction function;
    OK(cuModuleLoadData(&module, ".version 7.0\n.target sm_80\n.visible .entry standin_fill(.param .u64 a){ ret; }\n"));
    OK(cuModuleGetFunction(&function, module, "standin_fill"));
}

static void destroyed_stream() {
    Device device;
    CUstream stream;
    OK(cuStreamCreate(&stream, 0));
    OK(cuStreamDestroy_v2(stream));
    OK(cuStreamQuery(stream));
}

static void capturing() {
    Device device;
    Queue queue;
    Memory memory(8);
    standin_capture(queue.is, 1);
    int status = 0;
    OK(cuStreamIsCapturing(queue.is, &status));
    HOLDS(status == 1);
    OK(cuMemsetD8Async(memory.at, 0, 8, queue.is));
    standin_capture(queue.is, 0);
    OK(cuStreamSynchronize(queue.is));
}

static void leak_memory() {
    Device device;
    CUdeviceptr memory;
    OK(cuMemAlloc_v2(&memory, 1));
    exit(0);
}

static void leak_stream() {
    OK(cuInit(0));
    CUcontext context;
    CUstream stream;
    OK(cuDevicePrimaryCtxRetain(&context, 0));
    OK(cuCtxSetCurrent(context));
    OK(cuStreamCreate(&stream, 0));
    HOLDS(standin_live() == 2);
}

static void leak_context() {
    OK(cuInit(0));
    CUcontext context;
    OK(cuDevicePrimaryCtxRetain(&context, 0));
}

static void leak_allowed() { leak_stream(); }

static void injected() {
    Device device;
    CUdeviceptr memory = 0;
    uint64_t calls = standin_calls();
    standin_fail_at(2, CUDA_ERROR_OUT_OF_MEMORY);
    OK(cuMemAlloc_v2(&memory, 8));
    GIVES(CUDA_ERROR_OUT_OF_MEMORY, cuMemsetD8Async(memory, 0, 8, nullptr));
    standin_fail_in("cuMemFree_v2", 1, 0);
    OK(cuCtxSynchronize());
    GIVES(CUDA_ERROR_UNKNOWN, cuMemFree_v2(memory)); // freed all the same
    HOLDS(standin_calls() == calls + 4);
    const char *name = "";
    OK(cuGetErrorName(CUDA_ERROR_OUT_OF_MEMORY, &name));
    HOLDS(!strcmp(name, "CUDA_ERROR_OUT_OF_MEMORY"));
}

static void injected_for_good() {
    Device device;
    Queue queue;
    CUdeviceptr memory = 0;
    OK(cuMemAlloc_v2(&memory, 8));
    standin_fail_from(2, 700);
    OK(cuStreamQuery(queue.is));
    GIVES(700, cuStreamQuery(queue.is));
    GIVES(700, cuStreamSynchronize(queue.is));
    GIVES(700, cuMemFree_v2(memory)); // freed all the same
    standin_fail_from(0, 0);
}

static void injected_by_environment() {
    OK(cuInit(0));
    CUcontext context;
    GIVES(46, cuDevicePrimaryCtxRetain(&context, 0));
}

static void out_of_memory() {
    Device device;
    Memory most(3 << 19);
    CUdeviceptr memory;
    GIVES(CUDA_ERROR_OUT_OF_MEMORY, cuMemAlloc_v2(&memory, 1 << 20));
}

static void attributes() {
    Device device;
    Memory memory(1000);
    CUdeviceptr base = 0;
    size_t bytes = 0;
    OK(cuMemGetAddressRange_v2(&base, &bytes, memory.at + 999));
    HOLDS(base == memory.at && bytes == 1000);
    int kind = 0, ordinal = 5;
    OK(cuPointerGetAttribute(&kind, 2, memory.at + 1));
    HOLDS(kind == CU_MEMORYTYPE_DEVICE);
    GIVES(CUDA_ERROR_INVALID_VALUE, cuPointerGetAttribute(&kind, 2, reinterpret_cast<uint64_t>(&kind)));
    int names[] = {2, 9};
    void *values[] = {&kind, &ordinal};
    OK(cuPointerGetAttributes(2, names, values, reinterpret_cast<uint64_t>(&kind)));
    HOLDS(kind == 0 && ordinal == CU_DEVICE_INVALID);
    void *function = nullptr;
    OK(cuGetProcAddress_v2("cuMemAlloc", &function, 12080, 0, nullptr));
    HOLDS(function == reinterpret_cast<void *>(&cuMemAlloc_v2));
    GIVES(CUDA_ERROR_NOT_FOUND, cuGetProcAddress_v2("cuNothing", &function, 12080, 0, nullptr));
}

static void visible() {
    OK(cuInit(0));
    int count = 0;
    CUuuid uuid;
    OK(cuDeviceGetCount(&count));
    OK(cuDeviceGetUuid_v2(&uuid, 0));
    HOLDS(count == 2 && uuid.bytes[15] == 'D');
}

static void no_device() {
    GIVES(CUDA_ERROR_NO_DEVICE, cuInit(0));
    int count;
    GIVES(CUDA_ERROR_NOT_INITIALIZED, cuDeviceGetCount(&count));
}

static void not_initialised() {
    int count;
    GIVES(CUDA_ERROR_NOT_INITIALIZED, cuDeviceGetCount(&count));
}

const std::vector<Case> setup_cases = {
    {"no_context", "WRONG-CONTEXT", "", no_context},
    {"no_context_in_a_thread", "WRONG-CONTEXT", "", no_context_in_a_thread},
    {"released_context", "WRONG-CONTEXT", "", released_context},
    {"released_context_made_current", "WRONG-CONTEXT", "", released_context_made_current},
    {"context_in_use", "CONTEXT-IN-USE", "", context_in_use},
    {"stream_of_another_context", "WRONG-CONTEXT", "", stream_of_another_context},
    {"event_of_another_context", "WRONG-CONTEXT", "", event_of_another_context},
    {"context_stack", nullptr, "", context_stack},
    {"modules", nullptr, "", modules},
    {"our_kernel", nullptr, "", our_kernel},
    {"unloaded_too_early", "MODULE-IN-USE", "STANDIN_IDLE_MS=0", unloaded_too_early},
    {"wrong_params", "NO-KERNEL", "", wrong_params},
    {"destroyed_stream", "BAD-HANDLE", "", destroyed_stream},
    {"capturing", "CAPTURING", "", capturing},
    {"leak_memory", "LEAK", "", leak_memory},
    {"leak_stream", "LEAK", "", leak_stream},
    {"leak_context", "LEAK", "", leak_context},
    {"leak_allowed", nullptr, "STANDIN_LEAKS=ok", leak_allowed},
    {"injected", nullptr, "", injected},
    {"injected_for_good", nullptr, "", injected_for_good},
    {"injected_by_environment", nullptr, "STANDIN_FAIL=2:46 STANDIN_LEAKS=ok", injected_by_environment},
    {"injected_by_name", nullptr, "STANDIN_FAIL=cuDevicePrimaryCtxRetain:1:46", injected_by_environment},
    {"out_of_memory", nullptr, "STANDIN_MEMORY_MB=2", out_of_memory},
    {"attributes", nullptr, "", attributes},
    {"visible", nullptr, "STANDIN_DEVICES=4 CUDA_VISIBLE_DEVICES=3,1", visible},
    {"no_device", nullptr, "STANDIN_DEVICES=0", no_device},
    {"not_initialised", nullptr, "", not_initialised},
};
