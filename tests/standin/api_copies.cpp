// Copies and fills. Pageable host memory is read when the call is made, and written before it returns, as with the real driver;
// pinned memory when the operation runs.
#include "standin.h"
#include <cstring>

using namespace standin;

namespace {

// One side of a copy, by what the address is when the call is made.
enum class Side { Device, Pinned, Pageable };

Side side_of(const Call &call, uint64_t address, uint64_t bytes, const char *what) {
    auto &regions = state().regions;
    auto next = regions.lower_bound(address + bytes);
    bool meets = next != regions.begin() && std::prev(next)->second->base + std::prev(next)->second->size > address;
    if (!meets && !in_device_range(address)) return Side::Pageable;
    check_range(call, address, bytes, what);
    return find_region(address)->on_device() ? Side::Device : Side::Pinned;
}

Side host_side(const Call &call, const void *pointer, uint64_t bytes, const char *what) {
    Side side = side_of(call, reinterpret_cast<uint64_t>(pointer), bytes, what);
    if (side == Side::Device) violation("WRONG-KIND", "%s: %p is device memory, expected is host memory", call.name, pointer);
    return side;
}

Side device_side(const Call &call, uint64_t address, uint64_t bytes, const char *what) {
    Side side = side_of(call, address, bytes, what);
    if (side == Side::Pageable)
        violation("UNREGISTERED-HOST", "%s: 0x%llx is host memory, expected is device memory", call.name,
                  (unsigned long long)address);
    return side;
}

// Rows of bytes on one side.
struct Rows {
    uint64_t address, pitch;
};

struct Shape {
    uint64_t width, height;
};

// The rows' place for the running operation; pageable memory is its own place.
unsigned char *place(const Running &running, const Rows &rows, uint64_t row, const Shape &shape, bool pageable, bool writes) {
    uint64_t address = rows.address + row * rows.pitch;
    if (pageable) return reinterpret_cast<unsigned char *>(address);
    unsigned char *data = reach(running, address, shape.width, writes ? "writes" : "reads");
    touch(running, address, shape.width, writes);
    return data;
}

CUresult copy(Call &call, Rows target, Side to, Rows source, Side from, Shape shape, CUstream handle, bool any_device = false) {
    StreamPtr stream = stream_of(call, handle);
    if (!shape.width || !shape.height) return CUDA_SUCCESS;
    if (from == Side::Pageable || to == Side::Pageable) call.not_capturing(stream);
    auto captured = std::make_shared<std::vector<unsigned char>>();
    if (from == Side::Pageable) {
        captured->resize(shape.width * shape.height);
        for (uint64_t row = 0; row < shape.height; row++)
            memcpy(captured->data() + row * shape.width, reinterpret_cast<void *>(source.address + row * source.pitch),
                   shape.width);
        source = {reinterpret_cast<uint64_t>(captured->data()), shape.width};
    }
    RecordPtr done = enqueue(call, stream, call.name, [=](Running &running) {
        (void)captured; // alive until now
        running.any_device = any_device;
        for (uint64_t row = 0; row < shape.height; row++) {
            unsigned char *read = place(running, source, row, shape, from == Side::Pageable, false);
            unsigned char *written = place(running, target, row, shape, to == Side::Pageable, true);
            memmove(written, read, shape.width);
        }
    });
    if (to == Side::Pageable) wait_until(call, {done});
    return CUDA_SUCCESS;
}

CUresult copy_line(Call &call, uint64_t target, Side to, uint64_t source, Side from, uint64_t bytes, CUstream stream) {
    return copy(call, {target, bytes}, to, {source, bytes}, from, {bytes, 1}, stream);
}

CUresult and_wait(Call &call, CUresult error) {
    if (!error) wait_until(call, {call.context()->legacy->last});
    return error;
}

CUresult fill(Call &call, uint64_t address, unsigned char byte, uint64_t bytes, CUstream handle) {
    StreamPtr stream = stream_of(call, handle);
    if (!bytes) return CUDA_SUCCESS;
    device_side(call, address, bytes, "fills");
    enqueue(call, stream, call.name, [=](Running &running) {
        memset(reach(running, address, bytes, "fills"), byte, bytes);
        touch(running, address, bytes, true);
    });
    return CUDA_SUCCESS;
}

uint64_t number(const void *pointer) { return reinterpret_cast<uint64_t>(pointer); }

} // namespace

EXPORT CUresult cuMemcpyAsync(CUdeviceptr target, CUdeviceptr source, size_t bytes, CUstream stream) {
    BEGIN;
    Side to = side_of(call, target, bytes, "writes"), from = side_of(call, source, bytes, "reads");
    return copy_line(call, target, to, source, from, bytes, stream);
}

EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr target, const void *source, size_t bytes, CUstream stream) {
    BEGIN;
    Side to = device_side(call, target, bytes, "writes"), from = host_side(call, source, bytes, "reads");
    return copy_line(call, target, to, number(source), from, bytes, stream);
}

EXPORT CUresult cuMemcpyDtoHAsync_v2(void *target, CUdeviceptr source, size_t bytes, CUstream stream) {
    BEGIN;
    Side to = host_side(call, target, bytes, "writes"), from = device_side(call, source, bytes, "reads");
    return copy_line(call, number(target), to, source, from, bytes, stream);
}

EXPORT CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr target, CUdeviceptr source, size_t bytes, CUstream stream) {
    BEGIN;
    Side to = device_side(call, target, bytes, "writes"), from = device_side(call, source, bytes, "reads");
    return copy_line(call, target, to, source, from, bytes, stream);
}

// By way of the host, where the devices do not reach each other.
EXPORT CUresult cuMemcpyPeerAsync(CUdeviceptr target, CUcontext target_context, CUdeviceptr source, CUcontext source_context,
                                   size_t bytes, CUstream stream) {
    BEGIN;
    context_of(call.name, target_context);
    context_of(call.name, source_context);
    Side to = device_side(call, target, bytes, "writes"), from = device_side(call, source, bytes, "reads");
    return copy(call, {target, bytes}, to, {source, bytes}, from, {bytes, 1}, stream, true);
}

EXPORT CUresult cuMemcpyHtoD_v2(CUdeviceptr target, const void *source, size_t bytes) {
    BEGIN;
    Side to = device_side(call, target, bytes, "writes"), from = host_side(call, source, bytes, "reads");
    return and_wait(call, copy_line(call, target, to, number(source), from, bytes, nullptr));
}

EXPORT CUresult cuMemcpyDtoH_v2(void *target, CUdeviceptr source, size_t bytes) {
    BEGIN;
    Side to = host_side(call, target, bytes, "writes"), from = device_side(call, source, bytes, "reads");
    return and_wait(call, copy_line(call, number(target), to, source, from, bytes, nullptr));
}

// Between two places of device memory the host does not wait, as with the real driver.
EXPORT CUresult cuMemcpyDtoD_v2(CUdeviceptr target, CUdeviceptr source, size_t bytes) {
    BEGIN;
    Side to = device_side(call, target, bytes, "writes"), from = device_side(call, source, bytes, "reads");
    return copy_line(call, target, to, source, from, bytes, nullptr);
}

EXPORT CUresult cuMemcpy2DAsync_v2(const CUDA_MEMCPY2D *shape, CUstream stream) {
    BEGIN;
    const CUDA_MEMCPY2D &is = *shape;
    auto start = [](int kind, CUdeviceptr device, const void *host) { return kind == CU_MEMORYTYPE_HOST ? number(host) : device; };
    if (is.srcMemoryType == 3 || is.dstMemoryType == 3) return CUDA_ERROR_NOT_SUPPORTED; // arrays
    if (is.Height > 1 && (is.srcPitch < is.WidthInBytes || is.dstPitch < is.WidthInBytes)) return CUDA_ERROR_INVALID_VALUE;
    Rows source{start(is.srcMemoryType, is.srcDevice, is.srcHost) + is.srcY * is.srcPitch + is.srcXInBytes, is.srcPitch};
    Rows target{start(is.dstMemoryType, is.dstDevice, is.dstHost) + is.dstY * is.dstPitch + is.dstXInBytes, is.dstPitch};
    auto side = [&](int kind, const Rows &rows, const char *what) {
        uint64_t bytes = is.Height ? (is.Height - 1) * rows.pitch + is.WidthInBytes : 0;
        if (kind == CU_MEMORYTYPE_HOST) return host_side(call, reinterpret_cast<void *>(rows.address), bytes, what);
        if (kind == CU_MEMORYTYPE_DEVICE) return device_side(call, rows.address, bytes, what);
        return side_of(call, rows.address, bytes, what);
    };
    Side to = side(is.dstMemoryType, target, "writes"), from = side(is.srcMemoryType, source, "reads");
    return copy(call, target, to, source, from, {is.WidthInBytes, is.Height}, stream);
}

EXPORT CUresult cuMemsetD8Async(CUdeviceptr address, unsigned char byte, size_t bytes, CUstream stream) {
    BEGIN;
    return fill(call, address, byte, bytes, stream);
}

EXPORT CUresult cuMemsetD8_v2(CUdeviceptr address, unsigned char byte, size_t bytes) {
    BEGIN;
    return fill(call, address, byte, bytes, nullptr);
}
