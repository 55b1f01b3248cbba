// Modules of PTX, and launches of the kernels in them.
#include "standin.h"
#include <climits>
#include <cstring>

using namespace standin;

static CUresult load(Call &call, CUmodule *handle, const void *image) {
    auto module = std::make_unique<Module>();
    module->context = call.context();
    if (!image) return CUDA_ERROR_INVALID_VALUE;
    const char *text = static_cast<const char *>(image);
    // A cubin or fat binary begins with a byte that no text has.
    if (*text == 0x7f || (*text & 0x80)) return CUDA_ERROR_INVALID_IMAGE;
    if (CUresult error = load_ptx(text, *module)) return error;
    uint64_t number = next_handle();
    state().modules[number] = std::move(module);
    *handle = reinterpret_cast<CUmodule>(number);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    BEGIN;
    return load(call, module, image);
}

EXPORT CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned, int *, void **) {
    BEGIN;
    return load(call, module, image);
}

static Module *module_of(const Call &call, CUmodule handle) {
    auto found = state().modules.find(reinterpret_cast<uint64_t>(handle));
    if (found == state().modules.end())
        violation("BAD-HANDLE", "%s: %p is not a module, or was unloaded", call.name, static_cast<void *>(handle));
    return found->second.get();
}

EXPORT CUresult cuModuleUnload(CUmodule handle) {
    BEGIN_RELEASE;
    call.context();
    Module *module = module_of(call, handle);
    if (module_in_use(module)) violation("MODULE-IN-USE", "%s: a launch of one of its kernels has not run yet", call.name);
    auto &functions = state().functions;
    for (auto each = functions.begin(); each != functions.end();)
        each = each->second->module == module ? functions.erase(each) : ++each;
    state().modules.erase(reinterpret_cast<uint64_t>(handle));
    return call.injected;
}

EXPORT CUresult cuModuleGetFunction(CUfunction *handle, CUmodule module_handle, const char *name) {
    BEGIN;
    call.context();
    Module *module = module_of(call, module_handle);
    for (auto &function : module->functions) {
        if (function->name != name) continue;
        const Kernel *kernel = find_kernel(name);
        if (!kernel) violation("NO-KERNEL", "%s: the stand-in was built without the host code of %s", call.name, name);
        if (function->params != kernel->params)
            violation("NO-KERNEL", "%s: the PTX and the host code of %s disagree about its parameters", call.name, name);
        uint64_t number = next_handle();
        state().functions[number] = function.get();
        *handle = reinterpret_cast<CUfunction>(number);
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_NOT_FOUND;
}

static Function *function_of(const Call &call, CUfunction handle) {
    auto found = state().functions.find(reinterpret_cast<uint64_t>(handle));
    if (found == state().functions.end())
        violation("BAD-HANDLE", "%s: %p is not a function, or its module was unloaded", call.name, static_cast<void *>(handle));
    return found->second;
}

EXPORT CUresult cuFuncGetAttribute(int *value, int which, CUfunction handle) {
    BEGIN;
    Function *function = function_of(call, handle);
    switch (which) {
    case 0: *value = static_cast<int>(function->max_threads); break;
    case 1: *value = static_cast<int>(function->static_shared); break;
    case 4: *value = 32; break;            // registers
    case 5: case 6: *value = 80; break;    // of PTX, of the binary
    case 8: *value = static_cast<int>(std::max(function->dynamic_shared, 49152u)); break;
    default: *value = 0; return which < 0 || which > 15 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
    }
    return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncSetAttribute(CUfunction handle, int which, int value) {
    BEGIN;
    Function *function = function_of(call, handle);
    if (which != 8) return CUDA_SUCCESS;
    if (value < 0 || value + function->static_shared > 166912) return CUDA_ERROR_INVALID_VALUE;
    function->dynamic_shared = static_cast<unsigned>(value);
    return CUDA_SUCCESS;
}

static CUresult occupancy(Call &call, int *blocks, CUfunction handle, int threads, size_t dynamic) {
    Function *function = function_of(call, handle);
    if (threads <= 0 || threads > static_cast<int>(function->max_threads)) return CUDA_ERROR_INVALID_VALUE;
    size_t shared = function->static_shared + dynamic + 1024;
    *blocks = static_cast<int>(std::min<size_t>({32, 2048u / static_cast<unsigned>(threads), 167936 / shared}));
    return CUDA_SUCCESS;
}

EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function, int threads, size_t shared) {
    BEGIN;
    return occupancy(call, blocks, function, threads, shared);
}

EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, CUfunction function, int threads, size_t shared,
                                                                     unsigned) {
    BEGIN;
    return occupancy(call, blocks, function, threads, shared);
}

static CUresult check_launch(const Function &function, const Launch &launch) {
    static const unsigned grid_limits[] = {INT_MAX, 65535, 65535}, block_limits[] = {1024, 1024, 64};
    uint64_t threads = 1;
    for (int axis = 0; axis < 3; axis++) {
        if (!launch.grid[axis] || launch.grid[axis] > grid_limits[axis]) return CUDA_ERROR_INVALID_VALUE;
        if (!launch.block[axis] || launch.block[axis] > block_limits[axis]) return CUDA_ERROR_INVALID_VALUE;
        threads *= launch.block[axis];
    }
    if (threads > 1024 || launch.shared > std::max(function.dynamic_shared, 49152u)) return CUDA_ERROR_INVALID_VALUE;
    return threads > function.max_threads ? CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES : CUDA_SUCCESS;
}

EXPORT CUresult cuLaunchKernel(CUfunction handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                               unsigned block_y, unsigned block_z, unsigned shared, CUstream stream_handle, void **params,
                               void **extra) {
    BEGIN;
    Function *function = function_of(call, handle);
    StreamPtr stream = stream_of(call, stream_handle);
    if (function->module->context != stream->context)
        violation("WRONG-CONTEXT", "%s: the function is of device %d, the stream of device %d", call.name,
                  function->module->context->device->ordinal, stream->context->device->ordinal);
    if (extra || !params) violation("NOT-SUPPORTED", "%s: parameters by `extra`", call.name);
    Launch launch{{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared, nullptr};
    if (CUresult error = check_launch(*function, launch)) return error;
    const Kernel *kernel = find_kernel(function->name);
    if (kernel->name == std::string("reshard_copy") && grid_y * grid_z * block_y * block_z != 1)
        violation("NOT-SUPPORTED", "%s: %s has one axis of blocks and of threads", call.name, kernel->name);
    // The caller's parameters may be gone when the kernel runs.
    std::vector<std::vector<unsigned char>> values;
    for (size_t each = 0; each < kernel->params.size(); each++) {
        auto *value = static_cast<unsigned char *>(params[each]);
        values.emplace_back(value, value + kernel->params[each]);
    }
    state().launches++;
    auto work = [kernel, launch, values](Running &running) {
        std::vector<void *> pointers;
        for (auto &value : values) pointers.push_back(const_cast<unsigned char *>(value.data()));
        Launch now = launch;
        now.params = pointers.data();
        run_kernel(running, *kernel, now);
    };
    enqueue(call, stream, "kernel " + function->name, work, [&](Op &op) { op.module = function->module; });
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorName(CUresult error, const char **text) {
    static const std::map<int, const char *> names = {
        {0, "CUDA_SUCCESS"}, {1, "CUDA_ERROR_INVALID_VALUE"}, {2, "CUDA_ERROR_OUT_OF_MEMORY"}, {3, "CUDA_ERROR_NOT_INITIALIZED"},
        {4, "CUDA_ERROR_DEINITIALIZED"}, {100, "CUDA_ERROR_NO_DEVICE"}, {101, "CUDA_ERROR_INVALID_DEVICE"},
        {200, "CUDA_ERROR_INVALID_IMAGE"}, {201, "CUDA_ERROR_INVALID_CONTEXT"}, {205, "CUDA_ERROR_MAP_FAILED"},
        {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"}, {217, "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED"}, {218, "CUDA_ERROR_INVALID_PTX"},
        {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"}, {400, "CUDA_ERROR_INVALID_HANDLE"}, {500, "CUDA_ERROR_NOT_FOUND"},
        {600, "CUDA_ERROR_NOT_READY"}, {700, "CUDA_ERROR_ILLEGAL_ADDRESS"}, {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"},
        {704, "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED"}, {705, "CUDA_ERROR_PEER_ACCESS_NOT_ENABLED"},
        {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"}, {713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"},
        {719, "CUDA_ERROR_LAUNCH_FAILED"}, {801, "CUDA_ERROR_NOT_SUPPORTED"}, {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
        {999, "CUDA_ERROR_UNKNOWN"},
    };
    auto found = names.find(error);
    *text = found == names.end() ? nullptr : found->second;
    return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuGetErrorString(CUresult error, const char **text) {
    CUresult unknown = cuGetErrorName(error, text);
    if (!unknown) *text = error ? "an error of the stand-in driver" : "no error";
    return unknown;
}

// The newest version of a function, as the real one gives for a program of today.
EXPORT CUresult cuGetProcAddress_v2(const char *symbol, void **function, int, uint64_t, int *status) {
    *function = find_symbol((std::string(symbol) + "_v2").c_str());
    if (!*function) *function = find_symbol(symbol);
    if (status) *status = *function ? 0 : 1;
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
