// What the cases about NCCL share: its functions, and ranks that are threads.
#pragma once
#include "selftest.h"
#include <climits>
#include <functional>
#include <thread>

struct ncclUniqueId {
    char internal[128];
};
struct Config {
    size_t size = sizeof(Config);
    unsigned magic = 0xcafebeef, version = 22005;
    int blocking = INT_MIN, cga = INT_MIN, least = INT_MIN, most = INT_MIN;
    const char *net = nullptr;
    int share = INT_MIN;
};
using Handle = struct ncclComm *;
extern "C" {
int ncclGetVersion(int *);
int ncclGetUniqueId(ncclUniqueId *);
const char *ncclGetErrorString(int);
const char *ncclGetLastError(Handle);
int ncclCommInitRankConfig(Handle *, int, ncclUniqueId, int, Config *);
int ncclCommCount(Handle, int *);
int ncclCommUserRank(Handle, int *);
int ncclCommCuDevice(Handle, int *);
int ncclCommGetAsyncError(Handle, int *);
int ncclCommAbort(Handle);
int ncclCommDestroy(Handle);
int ncclGroupStart();
int ncclGroupEnd();
int ncclSend(const void *, size_t, int, int, Handle, CUstream);
int ncclRecv(void *, size_t, int, int, Handle, CUstream);
int ncclAllGather(const void *, void *, size_t, int, Handle, CUstream);
void standin_nccl_async_error(Handle, int);
}
enum { IN_PROGRESS = 7 };

// One rank: its GPU, memory of 64 bytes a rank twice over, a stream, and its communicator.
struct Rank {
    int rank, world;
    Device device;
    Queue queue;
    Memory from, to;
    Handle comm = nullptr;
    bool blocks;
    Rank(int rank, int world, const ncclUniqueId &id, bool blocks)
        : rank(rank), world(world), device(rank % 2), from(64 * world), to(64 * world), blocks(blocks) {
        OK(cuMemsetD8Async(from.at, static_cast<unsigned char>(rank + 1), 64 * world, queue.is));
        OK(cuMemsetD8Async(to.at, 0xee, 64 * world, queue.is));
        Config config;
        config.blocking = blocks;
        GIVES(blocks ? 0 : IN_PROGRESS, ncclCommInitRankConfig(&comm, world, id, rank, &config));
        OK(settle());
    }
    // Until what was asked for is on the stream.
    int settle() {
        int answer = IN_PROGRESS;
        for (int queries = 0; answer == IN_PROGRESS && queries < 100000; queries++) {
            OK(ncclCommGetAsyncError(comm, &answer));
            if (queries > 100) usleep(100); // a peer is late
        }
        return answer;
    }
    // What a call answers that succeeds.
    int begun() const { return blocks ? 0 : IN_PROGRESS; }
    const void *part(int of) const { return reinterpret_cast<const void *>(from.at + 64 * of); }
    void *slot(int of) const { return reinterpret_cast<void *>(to.at + 64 * of); }
    int send(int peer, size_t bytes = 64) { return ncclSend(part(peer), bytes, 0, peer, comm, queue.is); }
    int receive(int peer, size_t bytes = 64) { return ncclRecv(slot(peer), bytes, 0, peer, comm, queue.is); }
    int gather() { return ncclAllGather(part(0), slot(0), 64, 0, comm, queue.is); }
    void exchange() {
        OK(ncclGroupStart());
        for (int peer = 0; peer < world; peer++) {
            OK(send(peer));
            OK(receive(peer));
        }
        GIVES(begun(), ncclGroupEnd());
        OK(settle());
    }
    bool holds(int of, int byte) const { return words_at(to.at + 64 * of, 16)[0] == 0x01010101u * byte; }
    void sync() { OK(cuStreamSynchronize(queue.is)); }
    void end() { OK(ncclCommDestroy(comm)); }
};

// Runs `body` on every rank, each a thread of its own.
inline void ranks(int world, bool blocks, const std::function<void(Rank &)> &body) {
    ncclUniqueId id;
    OK(ncclGetUniqueId(&id));
    std::vector<std::thread> threads;
    for (int rank = 0; rank < world; rank++)
        threads.emplace_back([&, rank] {
            Rank each(rank, world, id, blocks);
            body(each);
        });
    for (std::thread &thread : threads) thread.join();
}
