// Communicators of NCCL's between threads.
#include "selftest_nccl.h"
#include <atomic>

static void all_bytes_arrive(bool blocks) {
    ranks(4, blocks, [](Rank &each) {
        int rank, world, device;
        OK(ncclCommUserRank(each.comm, &rank));
        OK(ncclCommCount(each.comm, &world));
        OK(ncclCommCuDevice(each.comm, &device));
        HOLDS(rank == each.rank && world == 4 && device == rank % 2);
        for (int round = 0; round < 3; round++) {
            each.exchange();
            GIVES(each.begun(), each.gather());
            OK(each.settle());
            each.sync();
            for (int of = 0; of < world; of++) HOLDS(each.holds(of, of + 1));
        }
        each.end();
    });
    HOLDS(standin_live() == 0);
}
static void blocking_moves() { all_bytes_arrive(true); }
static void non_blocking_moves() { all_bytes_arrive(false); }

static void runs_late() {
    ranks(1, true, [](Rank &each) {
        each.exchange();
        HOLDS(standin_pending() > 0);
        each.sync();
        each.end();
    });
}

// What is enqueued before ncclSuccess comes before the group in the stream.
static void non_blocking_enqueues_later() {
    ranks(2, false, [](Rank &each) {
        Memory early(64);
        OK(ncclGroupStart());
        OK(each.send(1 - each.rank));
        OK(each.receive(1 - each.rank));
        GIVES(IN_PROGRESS, ncclGroupEnd());
        OK(cuMemcpyDtoDAsync_v2(early.at, each.to.at + 64 * (1 - each.rank), 64, each.queue.is));
        OK(each.settle());
        each.sync();
        HOLDS(words_at(early.at, 1)[0] == 0xeeeeeeee && each.holds(1 - each.rank, 2 - each.rank));
        each.end();
    });
}

// One communicator's work in two streams: both wait for the group, the group for both.
static void group_joins_streams() {
    ranks(2, true, [](Rank &each) {
        Queue second;
        Mark mark;
        OK(cuEventRecord(mark.is, each.queue.is));
        OK(cuStreamWaitEvent(second.is, mark.is, 0));
        OK(cuMemsetD8Async(each.from.at, 7, 128, second.is));
        OK(ncclGroupStart());
        OK(ncclSend(each.part(0), 64, 0, 1 - each.rank, each.comm, second.is));
        OK(each.receive(1 - each.rank));
        OK(ncclGroupEnd());
        OK(cuMemsetD8Async(each.to.at, 9, 128, second.is));
        OK(cuStreamSynchronize(second.is));
        HOLDS(each.holds(0, 9));
        each.sync();
        each.end();
    });
}

// A message orders the receiver's stream behind the sender's.
static void messages_order_streams() {
    ranks(2, true, [](Rank &each) {
        static CUdeviceptr shared;
        static CUcontext owner;
        Memory memory(64);
        if (each.rank == 0) {
            shared = memory.at;
            owner = each.device.context;
            OK(cuMemsetD8Async(shared, 5, 64, each.queue.is));
            OK(each.send(1));
            OK(each.receive(1));
        } else {
            OK(each.receive(0));
            OK(cuMemcpyPeerAsync(each.to.at + 64, each.device.context, shared, owner, 64, each.queue.is));
            OK(each.send(0));
            each.sync();
            HOLDS(each.holds(1, 5));
        }
        each.sync();
        each.end();
    });
}

static void abort_ends_pending() {
    ranks(2, false, [](Rank &each) {
        static std::atomic<bool> aborted;
        each.exchange();
        each.sync();
        if (each.rank == 1) {
            while (!aborted) usleep(100);
            each.end();
            return;
        }
        OK(cuMemsetD8Async(each.to.at, 3, 128, each.queue.is));
        GIVES(IN_PROGRESS, each.receive(1));
        int answer;
        for (int query = 0; query < 100; query++) OK(ncclCommGetAsyncError(each.comm, &answer));
        OK(answer); // connected before
        for (int query = 0; query < 100; query++) GIVES(CUDA_ERROR_NOT_READY, cuStreamQuery(each.queue.is));
        OK(ncclCommAbort(each.comm));
        aborted = true;
        each.sync();
        HOLDS(each.holds(1, 3));
    });
}

// Whoever waits for a message of a rank that aborted waits on.
static void abort_sends_nothing() {
    ranks(2, false, [](Rank &each) {
        static std::atomic<int> step;
        each.exchange();
        each.sync();
        OK(cuMemsetD8Async(each.to.at, 3, 128, each.queue.is));
        OK(cuStreamSynchronize(each.queue.is));
        if (each.rank == 0) {
            GIVES(IN_PROGRESS, each.send(1));
            OK(each.settle());
            for (int query = 0; query < 100; query++) GIVES(CUDA_ERROR_NOT_READY, cuStreamQuery(each.queue.is));
            OK(ncclCommAbort(each.comm));
            each.sync();
            step = 1;
            return;
        }
        while (step != 1) usleep(100);
        GIVES(IN_PROGRESS, each.receive(0));
        OK(each.settle());
        for (int query = 0; query < 100; query++) GIVES(CUDA_ERROR_NOT_READY, cuStreamQuery(each.queue.is));
        OK(ncclCommAbort(each.comm));
        each.sync();
        HOLDS(each.holds(0, 3));
    });
}

static void async_error_stays() {
    ranks(2, false, [](Rank &each) {
        each.exchange();
        each.sync();
        if (each.rank == 0) {
            standin_nccl_async_error(each.comm, 6);
            GIVES(6, each.settle());
            GIVES(6, each.send(1));
            HOLDS(strstr(ncclGetErrorString(6), "remote"));
        }
        OK(ncclCommAbort(each.comm));
    });
}

static void errors_are_injected() {
    ncclUniqueId id;
    standin_fail_in("ncclGetUniqueId", 2, 2);
    OK(ncclGetUniqueId(&id));
    GIVES(2, ncclGetUniqueId(&id));
    ranks(1, true, [](Rank &each) {
        standin_fail_in("ncclRecv", 1, 6);
        OK(ncclGroupStart());
        OK(each.send(0));
        GIVES(6, each.receive(0));
        GIVES(6, ncclGroupEnd());
        standin_fail_in("ncclGroupEnd", 1, 0);
        OK(ncclGroupStart());
        OK(each.send(0));
        OK(each.receive(0));
        GIVES(1, ncclGroupEnd());
        each.sync();
        HOLDS(each.holds(0, 0xee));
        each.exchange();
        each.sync();
        HOLDS(each.holds(0, 1));
        standin_fail_in("ncclCommDestroy", 1, 3);
        GIVES(3, ncclCommDestroy(each.comm));
    });
    HOLDS(standin_live() == 0);
}

static void injected_from_outside() {
    int version;
    GIVES(5, ncclGetVersion(&version));
    OK(ncclGetVersion(&version));
    HOLDS(version == 21709);
}

static void configs_are_read() {
    Device device;
    ncclUniqueId id;
    Handle comm;
    auto init = [&](Config config) {
        OK(ncclGetUniqueId(&id));
        return ncclCommInitRankConfig(&comm, 1, id, 0, &config);
    };
    auto with = [](auto change) {
        Config config;
        change(config);
        return config;
    };
    auto good = [&](Config config, int answer) {
        GIVES(answer, init(config));
        OK(ncclCommAbort(comm));
    };
    good(Config(), 0);
    good(with([](Config &is) { is.blocking = 0; }), IN_PROGRESS);
    good(with([](Config &is) { is.size = 16, is.blocking = 0; }), 0); // not read
    good(with([](Config &is) { is.version = 21300, is.blocking = 5; }), 0);
    good(with([](Config &is) { is.version = 21600, is.least = -1; }), 0);
    good(with([](Config &is) { is.size = 4096; }), 0); // of a later release
    GIVES(4, init(with([](Config &is) { is.magic = 0; })));
    GIVES(4, init(with([](Config &is) { is.size = 8; })));
    GIVES(4, init(with([](Config &is) { is.blocking = 2; })));
    GIVES(4, init(with([](Config &is) { is.least = 4, is.most = 2; })));
    GIVES(4, init(with([](Config &is) { is.share = 7; })));
    HOLDS(strstr(ncclGetLastError(nullptr), "splitShare"));
    GIVES(4, ncclCommInitRankConfig(&comm, 1, id, 1, nullptr));
}

static void two_on_one_gpu(bool blocks) {
    ncclUniqueId id;
    OK(ncclGetUniqueId(&id));
    std::thread both[2];
    for (int rank = 0; rank < 2; rank++)
        both[rank] = std::thread([&, rank] {
            Device device;
            Handle comm;
            Config config;
            config.blocking = blocks;
            GIVES(blocks ? 5 : IN_PROGRESS, ncclCommInitRankConfig(&comm, 2, id, rank, &config));
            int answer = IN_PROGRESS;
            while (!blocks && answer == IN_PROGRESS) OK(ncclCommGetAsyncError(comm, &answer));
            HOLDS(strstr(ncclGetLastError(nullptr), "Duplicate GPU detected"));
            if (blocks) return;
            GIVES(5, answer);
            OK(ncclCommAbort(comm));
        });
    for (std::thread &each : both) each.join();
}
static void duplicate_gpu() { two_on_one_gpu(true); }
static void duplicate_gpu_later() { two_on_one_gpu(false); }

#define SHARED "STANDIN_NCCL_SHARED_GPU=1"
const std::vector<Case> nccl_cases = {
    {"nccl_blocking", nullptr, SHARED, blocking_moves},
    {"nccl_non_blocking", nullptr, SHARED, non_blocking_moves},
    {"nccl_runs_late", nullptr, "STANDIN_IDLE_MS=0", runs_late},
    {"nccl_enqueues_later", nullptr, "", non_blocking_enqueues_later},
    {"nccl_group_joins_streams", nullptr, "", group_joins_streams},
    {"nccl_messages_order_streams", nullptr, "", messages_order_streams},
    {"nccl_abort", nullptr, "", abort_ends_pending},
    {"nccl_abort_sends_nothing", nullptr, "", abort_sends_nothing},
    {"nccl_async_error", nullptr, "", async_error_stays},
    {"nccl_injected", nullptr, "", errors_are_injected},
    {"nccl_injected_by_name", nullptr, "STANDIN_FAIL=ncclGetVersion:1:5 STANDIN_NCCL_VERSION=21709", injected_from_outside},
    {"nccl_configs", nullptr, "", configs_are_read},
    {"nccl_duplicate_gpu", nullptr, "", duplicate_gpu},
    {"nccl_duplicate_gpu_later", nullptr, "", duplicate_gpu_later},
};
