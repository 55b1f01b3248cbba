/*
 * An engine's view of GPUs: two ranks, each with a GPU, device buffers, a stream and an ncclComm_t of its own. Both train: each holds
 * half the rows of a matrix (TP 2). Rank 1 also serves, with the whole matrix on its GPU.
 *
 * Needs two GPUs, the CUDA toolkit's headers (no nvcc), NCCL 2.18 or later:
 *
 *     c++ -std=c++17 nccl.cpp $(pkg-config --cflags --libs reshard) -I/usr/local/cuda/include -lnccl -lcuda -pthread && ./a.out
 *
 * The ranks are threads for brevity; processes do the same, once rank 0 has sent them its unique id.
 */
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cuda.h>
#include <nccl.h>
#include <optional>
#include <reshard.hpp>
#include <thread>
#include <vector>

constexpr int RANKS = 2;
constexpr int64_t ROWS = 1024, COLUMNS = 768, HALF = ROWS / RANKS;

static void must(bool good, const char *what, const char *why) {
    if (good) return;
    std::fprintf(stderr, "nccl: %s: %s\n", what, why);
    std::exit(1);
}
#define CUDA(call) must((call) == CUDA_SUCCESS, #call, "the driver refuses")
#define NCCL(call) must((call) == ncclSuccess, #call, ncclGetLastError(nullptr))

/* The value of an element of the matrix, in a version of the weights. */
static uint16_t value(int64_t element, uint64_t version) { return static_cast<uint16_t>(element * 7 + version * 1000); }

/* A GPU as this thread's, in the context that the CUDA runtime uses, and a stream. */
struct Gpu {
    CUdevice device;
    CUcontext context;
    CUstream stream;

    explicit Gpu(int ordinal) {
        CUDA(cuDeviceGet(&device, ordinal));
        CUDA(cuDevicePrimaryCtxRetain(&context, device));
        CUDA(cuCtxSetCurrent(context));
        CUDA(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    }
    ~Gpu() {
        CUDA(cuStreamDestroy(stream));
        CUDA(cuCtxSetCurrent(nullptr));
        CUDA(cuDevicePrimaryCtxRelease(device));
    }
};

/* Rows of the matrix on the current GPU, bf16. */
struct Rows {
    int64_t first, count;
    CUdeviceptr data;

    Rows(int64_t first, int64_t count) : first(first), count(count) { CUDA(cuMemAlloc(&data, bytes())); }
    ~Rows() { CUDA(cuMemFree(data)); }
    size_t bytes() const { return static_cast<size_t>(count * COLUMNS) * sizeof(uint16_t); }
};

/* A training step: the kernels of a real one would be enqueued like this copy. */
static void train(const Gpu &gpu, const Rows &rows, uint64_t version) {
    std::vector<uint16_t> host;
    for (int64_t i = 0; i < rows.count * COLUMNS; i++) host.push_back(value(rows.first * COLUMNS + i, version));
    CUDA(cuMemcpyHtoDAsync(rows.data, host.data(), rows.bytes(), gpu.stream));
}

/* An answer of the engine, enqueued behind the sync. */
static void serve(const Gpu &gpu, const Rows &rows, uint64_t version) {
    std::vector<uint16_t> host(static_cast<size_t>(rows.count * COLUMNS));
    CUDA(cuMemcpyDtoHAsync(host.data(), rows.data, rows.bytes(), gpu.stream));
    CUDA(cuStreamSynchronize(gpu.stream));
    for (int64_t i = 0; i < rows.count * COLUMNS; i++)
        must(host[static_cast<size_t>(i)] == value(i, version), "serve", "a weight of another version");
    std::printf("version %d: all %d x %d weights are on the engine's GPU\n", static_cast<int>(version), static_cast<int>(ROWS),
                static_cast<int>(COLUMNS));
}

/* The box of these rows lies dense in a buffer of the GPU's. */
static void add(reshard::Layout &layout, const char *name, const Rows &rows, int gpu, uint32_t role, uint32_t matrix) {
    uint32_t buffer = layout.buffer(name, reinterpret_cast<void *>(rows.data), rows.bytes(), reshard::bf16, {rows.count, COLUMNS}, role);
    layout.row(buffer).device_type = RS_DEVICE_CUDA;
    layout.row(buffer).device_id = gpu;
    layout.tile(matrix, buffer, 0, {rows.first, 0}, {rows.count, COLUMNS}, {COLUMNS, 1});
}

/* The communicator of the library for the engine's own. The library never ends what it borrows. */
static reshard::Comm borrow(ncclComm_t nccl) {
    rs_comm_t *out = nullptr;
    reshard::check(rs_comm_from_nccl(nccl, &out));
    return reshard::Comm(out);
}

static void sync(reshard::Container &weights, const Gpu &gpu, uint64_t version) {
    auto request = reshard::sized<rs_sync_t>();
    request.version = version;
    request.stream = gpu.stream; /* the training step comes before, what serves comes after */
    bool landed = weights.sync(request);
    while (!landed) landed = weights.poll();
}

static void run(int rank, ncclUniqueId id) {
    Gpu gpu(rank);
    ncclComm_t nccl;
    NCCL(ncclCommInitRank(&nccl, RANKS, id, rank)); /* before the sync, as any engine has it */
    {
        Rows shard(rank * HALF, HALF);
        std::optional<Rows> whole;
        if (rank == 1) whole.emplace(0, ROWS);
        reshard::Layout layout;
        uint32_t matrix = layout.tensor("model.embed_tokens.weight", {ROWS, COLUMNS});
        add(layout, "trainer.embedding", shard, rank, RS_SOURCE, matrix);
        if (whole) add(layout, "engine.embedding", *whole, rank, RS_TARGET, matrix);
        try {
            /* Handles go before what they borrow: the container, then the communicator, then NCCL's, and the weights. */
            reshard::Comm comm = borrow(nccl);
            reshard::Container weights(reshard::config(comm), layout);
            weights.connect();
            for (uint64_t version = 1; version <= 3; version++) {
                train(gpu, shard, version);
                sync(weights, gpu, version);
                if (whole) serve(gpu, *whole, version);
            }
        } catch (const reshard::Error &error) {
            /* Where a sync has failed, NCCL may still be at work on the weights: abort it, and wait, before they are freed. */
            std::fprintf(stderr, "nccl: rank %d: %s\n", rank, error.what());
            ncclCommAbort(nccl);
            cuStreamSynchronize(gpu.stream);
            std::exit(1);
        }
        CUDA(cuStreamSynchronize(gpu.stream));
        NCCL(ncclCommDestroy(nccl));
    }
}

int main() {
    int gpus = 0;
    CUDA(cuInit(0));
    CUDA(cuDeviceGetCount(&gpus));
    must(gpus >= RANKS, "main", "two GPUs are needed");
    ncclUniqueId id;
    NCCL(ncclGetUniqueId(&id));
    std::thread trainer(run, 0, id);
    run(1, id);
    trainer.join();
}
