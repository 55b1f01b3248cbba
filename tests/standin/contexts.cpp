// Devices, their primary contexts, and which one is current in a thread.
#include "standin.h"
#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unistd.h>

namespace standin {

std::vector<Context *> &context_stack() {
    static thread_local std::vector<Context *> stack;
    return stack;
}

// A handle of a context is its address in here.
Context *context_of(const char *call, CUcontext handle) {
    for (auto &device : state().devices) {
        Context *context = &device->context;
        if (reinterpret_cast<Context *>(handle) != context) continue;
        if (!context->retained) violation("WRONG-CONTEXT", "%s: the context was released by its last owner", call);
        return context;
    }
    violation("BAD-HANDLE", "%s: %p is not a context", call, static_cast<void *>(handle));
}

static CUcontext handle_of(Context *context) { return reinterpret_cast<CUcontext>(context); }

Device *device_of(CUdevice ordinal) {
    auto &devices = state().devices;
    return ordinal >= 0 && ordinal < static_cast<int>(devices.size()) ? devices[ordinal].get() : nullptr;
}

bool can_access(const Device *from, const Device *to) { return from == to || setting("STANDIN_PEERS", 1) != 0; }

// CUDA_VISIBLE_DEVICES as a list of numbers; what is not one ends the list, as with the real driver.
static std::vector<int> visible_devices() {
    int count = static_cast<int>(setting("STANDIN_DEVICES", 2));
    std::vector<int> visible;
    const char *list = getenv("CUDA_VISIBLE_DEVICES");
    if (!list) {
        for (int each = 0; each < count; each++) visible.push_back(each);
        return visible;
    }
    for (char *end; *list; list = *end == ',' ? end + 1 : end) {
        long each = strtol(list, &end, 10);
        if (end == list || each < 0 || each >= count) break;
        visible.push_back(static_cast<int>(each));
    }
    return visible;
}

static void create_devices() {
    State &all = state();
    all.owner = getpid();
    all.random = setting("STANDIN_SEED", 1);
    for (int physical : visible_devices()) {
        auto device = std::make_unique<Device>();
        device->ordinal = static_cast<int>(all.devices.size());
        device->physical = physical;
        device->context.device = device.get();
        device->pool = std::make_shared<Pool>(Pool{device.get()});
        device->context.legacy = new_stream(&device->context, 0, 0);
        all.devices.push_back(std::move(device));
    }
    reserve_ranges();
}

// Everything of a context goes with it, so whoever still holds something has lost it.
static void check_unused(const char *call, Context *context) {
    State &all = state();
    std::string what;
    for (auto &[base, region] : all.regions)
        if (region->context == context && region->on_device() && region->kind != Kind::Mapped && !region->freeing) what = "memory";
    for (auto &[handle, stream] : all.stream_handles)
        if (stream->context == context) what = "a stream";
    for (auto &[handle, event] : all.events)
        if (event.context == context) what = "an event";
    for (auto &[handle, module] : all.modules)
        if (module->context == context) what = "a module";
    if (!what.empty()) violation("CONTEXT-IN-USE", "%s: the last owner releases a context that still holds %s", call, what.c_str());
}

static CUresult attribute(const Device &device, int which, int *value) {
    static const std::map<int, int> fixed = {
        {1, 1024},   {2, 1024},   {3, 1024},  {4, 64},      {5, INT_MAX}, {6, 65535},    {7, 65535},   {8, 49152},
        {9, 65536},  {10, 32},    {11, INT_MAX}, {12, 65536}, {13, 1410000}, {15, 1},    {19, 1},      {31, 1},
        {39, 2048},  {40, 3},     {41, 1},    {75, 8},      {76, 0},      {78, 1},       {79, 1},      {80, 1},
        {81, 167936}, {82, 65536}, {83, 1},   {90, 1},      {91, 1},      {95, 1},       {97, 166912}, {99, 1},
        {102, 1},    {103, 1},    {106, 32},  {111, 1024},
    };
    if (which < 1 || which > 160) return CUDA_ERROR_INVALID_VALUE;
    auto found = fixed.find(which);
    *value = found == fixed.end() ? 0 : found->second;
    switch (which) {
    case 16: *value = static_cast<int>(setting("STANDIN_SMS", 8)); break;      // multiprocessors
    case 33: *value = device.physical + 1; break;                              // PCI bus
    case 115: *value = find_symbol("cuMemAllocFromPoolAsync") != nullptr; break;           // memory pools
    case 122: case 123: *value = find_symbol("cuStreamWaitValue64_v2") != nullptr; break;  // 64-bit stream memory operations
    }
    return CUDA_SUCCESS;
}

} // namespace standin

using namespace standin;

EXPORT CUresult cuInit(unsigned flags) {
    BEGIN;
    if (flags) return CUDA_ERROR_INVALID_VALUE;
    State &all = state();
    if (!all.initialised) create_devices();
    all.initialised = !all.devices.empty();
    return all.initialised ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE;
}

EXPORT CUresult cuDriverGetVersion(int *version) {
    *version = static_cast<int>(setting("STANDIN_VERSION", 12080));
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetCount(int *count) {
    BEGIN;
    *count = static_cast<int>(state().devices.size());
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    BEGIN;
    if (!device_of(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    BEGIN;
    if (!device_of(device)) return CUDA_ERROR_INVALID_DEVICE;
    snprintf(name, length, "Stand-in device");
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetAttribute(int *value, int which, CUdevice device) {
    BEGIN;
    if (!device_of(device)) return CUDA_ERROR_INVALID_DEVICE;
    return attribute(*device_of(device), which, value);
}

// The same for a device in every process, whatever number it has there.
static CUresult uuid_of(CUuuid *uuid, CUdevice device) {
    if (!device_of(device)) return CUDA_ERROR_INVALID_DEVICE;
    memcpy(uuid->bytes, "standin-device-", 15);
    uuid->bytes[15] = static_cast<char>('A' + device_of(device)->physical);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice device) {
    BEGIN;
    return uuid_of(uuid, device);
}

EXPORT CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device) {
    BEGIN;
    return uuid_of(uuid, device);
}

EXPORT CUresult cuDeviceGetPCIBusId(char *text, int length, CUdevice device) {
    BEGIN;
    if (!device_of(device)) return CUDA_ERROR_INVALID_DEVICE;
    snprintf(text, length, "0000:%02X:00.0", device_of(device)->physical + 1);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    BEGIN;
    if (!device_of(device)) return CUDA_ERROR_INVALID_DEVICE;
    *bytes = setting("STANDIN_MEMORY_MB", 16384) << 20;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceCanAccessPeer(int *can, CUdevice device, CUdevice peer) {
    BEGIN;
    if (!device_of(device) || !device_of(peer)) return CUDA_ERROR_INVALID_DEVICE;
    *can = device != peer && can_access(device_of(device), device_of(peer));
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetP2PAttribute(int *value, int which, CUdevice from, CUdevice to) {
    BEGIN;
    if (!device_of(from) || !device_of(to)) return CUDA_ERROR_INVALID_DEVICE;
    if (from == to || which < 1 || which > 5) return CUDA_ERROR_INVALID_VALUE;
    *value = which == 2 && can_access(device_of(from), device_of(to)); // 2: access
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    BEGIN;
    if (!device_of(device)) return CUDA_ERROR_INVALID_DEVICE;
    device_of(device)->context.retained++;
    *context = handle_of(&device_of(device)->context);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    BEGIN_RELEASE;
    if (!device_of(device)) return CUDA_ERROR_INVALID_DEVICE;
    Context &context = device_of(device)->context;
    if (!context.retained) violation("BAD-HANDLE", "%s: nobody retains the context of device %d", call.name, device);
    if (context.retained == 1) check_unused(call.name, &context);
    if (--context.retained == 0) context.peers.clear();
    return call.injected;
}

EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    BEGIN;
    if (!device_of(device)) return CUDA_ERROR_INVALID_DEVICE;
    *flags = device_of(device)->context.flags;
    *active = device_of(device)->context.retained != 0;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetCurrent(CUcontext *context) {
    BEGIN;
    auto &stack = context_stack();
    *context = stack.empty() ? nullptr : handle_of(stack.back());
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
    BEGIN;
    auto &stack = context_stack();
    if (!stack.empty()) stack.pop_back();
    if (context) stack.push_back(context_of(call.name, context));
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxPushCurrent_v2(CUcontext context) {
    BEGIN;
    context_stack().push_back(context_of(call.name, context));
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    BEGIN_RELEASE;
    auto &stack = context_stack();
    if (stack.empty()) violation("WRONG-CONTEXT", "%s: this thread's stack of contexts is empty", call.name);
    if (context) *context = handle_of(stack.back());
    stack.pop_back();
    return call.injected;
}

EXPORT CUresult cuCtxGetDevice(CUdevice *device) {
    BEGIN;
    *device = call.context()->device->ordinal;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    BEGIN;
    call.context();
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxEnablePeerAccess(CUcontext peer, unsigned flags) {
    BEGIN;
    Context *context = call.context(), *other = context_of(call.name, peer);
    if (flags) return CUDA_ERROR_INVALID_VALUE;
    if (context == other) return CUDA_ERROR_INVALID_DEVICE;
    if (!can_access(context->device, other->device)) return CUDA_ERROR_PEER_ACCESS_UNSUPPORTED;
    return context->peers.insert(other->device).second ? CUDA_SUCCESS : CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED;
}

EXPORT CUresult cuCtxDisablePeerAccess(CUcontext peer) {
    BEGIN_RELEASE;
    Context *context = call.context(), *other = context_of(call.name, peer);
    return context->peers.erase(other->device) ? call.injected : CUDA_ERROR_PEER_ACCESS_NOT_ENABLED;
}

EXPORT CUresult cuCtxSynchronize(void) {
    BEGIN;
    call.safe_in_capture();
    Context *context = call.context();
    std::vector<RecordPtr> last;
    for (auto &stream : state().streams)
        if (stream->context == context && stream->last) last.push_back(stream->last);
    wait_until(call, last);
    return CUDA_SUCCESS;
}
