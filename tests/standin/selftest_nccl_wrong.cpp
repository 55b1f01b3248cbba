// What is wrong with NCCL.
#include "selftest_nccl.h"

static void other_size() {
    ranks(2, true, [](Rank &each) { each.rank ? each.receive(0, 60) : each.send(1, 64); });
}

static void gathers_of_other_sizes() {
    ranks(2, true, [](Rank &each) {
        OK(ncclAllGather(each.part(0), each.slot(0), each.rank ? 8 : 4, 0, each.comm, each.queue.is));
    });
}

// The receiver leaves first, or the sender does.
static void unmatched(bool receiver_leaves) {
    ranks(2, false, [=](Rank &each) {
        each.exchange();
        each.sync();
        if (each.rank == receiver_leaves) return each.end();
        GIVES(IN_PROGRESS, receiver_leaves ? each.send(1) : each.receive(0));
        each.settle();
        each.sync();
    });
}
static void unmatched_send() { unmatched(true); }
static void unmatched_receive() { unmatched(false); }

static void reordered() {
    ranks(2, true, [](Rank &each) {
        each.exchange();
        if (each.rank) {
            each.receive(0);
            each.gather();
        } else {
            each.gather();
            each.send(1);
        }
        each.sync();
    });
}

static void group_of(unsigned operations) {
    ranks(1, true, [=](Rank &each) {
        Memory large(8192);
        OK(ncclGroupStart());
        for (unsigned pair = 0; pair < operations / 2; pair++) {
            OK(ncclSend(each.part(0), 1, 0, 0, each.comm, each.queue.is));
            OK(ncclRecv(reinterpret_cast<void *>(large.at + pair), 1, 0, 0, each.comm, each.queue.is));
        }
        OK(ncclGroupEnd());
        each.sync();
        each.end();
    });
}
static void group_at_the_limit() { group_of(4096); }
static void group_over_the_limit() { group_of(4098); }

static void host_memory() {
    ranks(1, true, [](Rank &each) {
        char bytes[64] = {};
        ncclSend(bytes, 64, 0, 0, each.comm, each.queue.is);
    });
}

static void pinned_memory() {
    ranks(1, true, [](Rank &each) {
        Pinned pinned(64);
        ncclRecv(pinned.at, 64, 0, 0, each.comm, each.queue.is);
    });
}

static void past_the_end() {
    ranks(1, true, [](Rank &each) { each.send(0, 65); });
}

static void used_after(int (*end)(Handle)) {
    ranks(1, true, [=](Rank &each) {
        OK(end(each.comm));
        int answer;
        ncclCommGetAsyncError(each.comm, &answer);
    });
}
static void used_after_abort() { used_after(ncclCommAbort); }
static void used_after_destroy() { used_after(ncclCommDestroy); }
static void aborted_after_destroy() {
    ranks(1, true, [](Rank &each) {
        each.end();
        ncclCommAbort(each.comm);
    });
}

// Known while the calls are made, where the connections are there already; by waiting in vain otherwise.
static void both_send_first(bool connected) {
    ranks(2, true, [=](Rank &each) {
        if (connected) each.exchange();
        OK(each.send(1 - each.rank));
        OK(each.receive(1 - each.rank));
        each.sync();
    });
}
static void both_send_first_connected() { both_send_first(true); }
static void both_send_first_anew() { both_send_first(false); }

static void sends_to_itself() {
    ranks(1, true, [](Rank &each) {
        OK(each.send(0));
        OK(each.receive(0));
    });
}

static void ring_of_sends() {
    ranks(3, false, [](Rank &each) {
        each.exchange();
        each.send((each.rank + 1) % 3);
        each.settle();
        each.receive((each.rank + 2) % 3);
        each.settle();
        each.sync();
    });
}

static void waits_in_vain(bool by_event) {
    ranks(2, true, [=](Rank &each) {
        each.exchange();
        each.sync();
        if (each.rank) {
            sleep(3);
            return;
        }
        Queue second;
        Mark mark;
        OK(each.receive(1));
        OK(cuEventRecord(mark.is, each.queue.is));
        OK(cuStreamWaitEvent(second.is, mark.is, 0));
        OK(cuStreamSynchronize(by_event ? second.is : each.queue.is));
    });
}
static void waits_in_vain_for_stream() { waits_in_vain(false); }
static void waits_in_vain_for_event() { waits_in_vain(true); }

static void one_rank_only() {
    Device device;
    ncclUniqueId id;
    OK(ncclGetUniqueId(&id));
    Handle comm;
    ncclCommInitRankConfig(&comm, 2, id, 0, nullptr);
}

static void same_rank_twice() {
    ncclUniqueId id;
    OK(ncclGetUniqueId(&id));
    Device device;
    for (int each = 0; each < 2; each++) {
        Handle comm;
        Config config;
        config.blocking = 0;
        ncclCommInitRankConfig(&comm, 2, id, 0, &config);
    }
}

static void freed_while_pending() {
    ranks(2, true, [](Rank &each) {
        each.exchange();
        each.sync();
        CUdeviceptr memory;
        OK(cuMemAlloc_v2(&memory, 64));
        if (each.rank) {
            OK(each.receive(0));
            each.sync();
        } else {
            OK(ncclSend(reinterpret_cast<void *>(memory), 64, 0, 1, each.comm, each.queue.is));
            OK(cuMemFree_v2(memory));
            each.sync();
        }
    });
}

static void freed_after_abort() {
    ranks(2, false, [](Rank &each) {
        each.exchange();
        each.sync();
        if (each.rank) return each.end();
        CUdeviceptr memory;
        OK(cuMemAlloc_v2(&memory, 64));
        ncclRecv(reinterpret_cast<void *>(memory), 64, 0, 0, each.comm, each.queue.is);
        each.settle();
        OK(ncclCommAbort(each.comm));
        OK(cuMemFree_v2(memory));
        each.sync();
    });
}

static void destroyed_while_pending() {
    ranks(1, true, [](Rank &each) {
        each.exchange();
        each.end();
    });
}

static void leaks() {
    ranks(1, true, [](Rank &each) { each.sync(); });
}

static void stream_of_another_gpu() {
    ranks(2, true, [](Rank &each) {
        Device other(1 - each.rank);
        Queue queue;
        ncclSend(each.part(0), 4, 0, 1 - each.rank, each.comm, queue.is);
    });
}

static void memory_of_another_gpu() {
    ranks(2, true, [](Rank &each) {
        Device other(1 - each.rank);
        Memory memory(64);
        ncclSend(reinterpret_cast<void *>(memory.at), 4, 0, 1 - each.rank, each.comm, each.queue.is);
    });
}

static void races(bool sends) {
    ranks(1, true, [=](Rank &each) {
        each.exchange();
        each.sync();
        Queue second;
        each.exchange();
        OK(cuMemsetD8Async(sends ? each.from.at : each.to.at, 1, 4, second.is));
        OK(cuCtxSynchronize());
    });
}
static void race_with_send() { races(true); }
static void race_with_receive() { races(false); }

static void not_ready() {
    ranks(1, false, [](Rank &each) {
        GIVES(IN_PROGRESS, each.gather());
        each.gather();
    });
}

static void receives_what_it_sends() {
    ranks(1, true, [](Rank &each) {
        OK(ncclGroupStart());
        OK(each.send(0));
        OK(ncclRecv(const_cast<char *>(static_cast<const char *>(each.part(0))) + 32, 32, 0, 0, each.comm, each.queue.is));
        OK(ncclGroupEnd());
    });
}

static void group_left_open() {
    std::thread([] { OK(ncclGroupStart()); }).join();
}

// The one waits in a call for a peer meanwhile.
static void two_threads() {
    ranks(2, true, [](Rank &each) {
        if (each.rank) {
            sleep(3);
            return;
        }
        std::thread([&] {
            usleep(100000);
            int count;
            ncclCommCount(each.comm, &count);
        }).detach();
        each.send(1);
    });
}

#define SHARED "STANDIN_NCCL_SHARED_GPU=1"
// Rank 0 sends what is of a pool, which it may have opened to the other rank's GPU.
static void sends_from_a_pool(bool opened) {
    ranks(2, true, [=](Rank &each) {
        if (each.rank) {
            OK(each.receive(0));
        } else {
            CUmemPoolProps props = {};
            props.allocType = props.location.type = 1;
            CUmemoryPool pool;
            CUdeviceptr memory;
            OK(cuMemPoolCreate(&pool, &props));
            OK(cuMemAllocFromPoolAsync(&memory, 64, pool, each.queue.is));
            CUmemAccessDesc access{{1, 1}, 3};
            if (opened) OK(cuMemPoolSetAccess(pool, &access, 1));
            OK(ncclSend(reinterpret_cast<void *>(memory), 64, 0, 1, each.comm, each.queue.is));
            OK(cuMemFreeAsync(memory, each.queue.is));
            OK(cuMemPoolDestroy(pool));
        }
        each.sync();
        each.end();
    });
}
static void sends_from_an_open_pool() { sends_from_a_pool(true); }
static void sends_from_a_closed_pool() { sends_from_a_pool(false); }

const std::vector<Case> nccl_wrong_cases = {
    {"nccl_other_size", "NCCL-SIZE", "", other_size},
    {"nccl_gathers_of_other_sizes", "NCCL-SIZE", "", gathers_of_other_sizes},
    {"nccl_unmatched_send", "NCCL-SIZE", "", unmatched_send},
    {"nccl_unmatched_receive", "NCCL-SIZE", "", unmatched_receive},
    {"nccl_reordered", "NCCL-ORDER", "", reordered},
    {"nccl_group_at_the_limit", nullptr, "", group_at_the_limit},
    {"nccl_group_over_the_limit", "NCCL-GROUP-LIMIT", "", group_over_the_limit},
    {"nccl_host_memory", "NCCL-HOST-MEMORY", "", host_memory},
    {"nccl_pinned_memory", "NCCL-HOST-MEMORY", "", pinned_memory},
    {"nccl_past_the_end", "UNKNOWN-MEMORY", "", past_the_end},
    {"nccl_used_after_abort", "NCCL-USE-AFTER-ABORT", "", used_after_abort},
    {"nccl_used_after_destroy", "NCCL-USE-AFTER-ABORT", "", used_after_destroy},
    {"nccl_aborted_after_destroy", "NCCL-USE-AFTER-ABORT", "", aborted_after_destroy},
    {"nccl_both_send_first_connected", "NCCL-DEADLOCK", "", both_send_first_connected},
    {"nccl_both_send_first_anew", "NCCL-DEADLOCK", "", both_send_first_anew},
    {"nccl_sends_to_itself", "NCCL-DEADLOCK", "", sends_to_itself},
    {"nccl_ring_of_sends", "NCCL-DEADLOCK", SHARED, ring_of_sends},
    {"nccl_waits_in_vain_for_stream", "NCCL-DEADLOCK", "", waits_in_vain_for_stream},
    {"nccl_waits_in_vain_for_event", "NCCL-DEADLOCK", "", waits_in_vain_for_event},
    {"nccl_one_rank_only", "NCCL-DEADLOCK", "", one_rank_only},
    {"nccl_same_rank_twice", "NCCL-INIT", "", same_rank_twice},
    {"nccl_freed_while_pending", "UNKNOWN-MEMORY|FREED-IN-USE", "", freed_while_pending},
    {"nccl_freed_after_abort", "UNKNOWN-MEMORY|FREED-IN-USE", "", freed_after_abort},
    {"nccl_destroyed_while_pending", "NCCL-IN-USE", "STANDIN_IDLE_MS=0", destroyed_while_pending},
    {"nccl_leaks", "LEAK", "", leaks},
    {"nccl_stream_of_another_gpu", "WRONG-CONTEXT", "", stream_of_another_gpu},
    {"nccl_memory_of_another_gpu", "NCCL-WRONG-DEVICE", "", memory_of_another_gpu},
    {"nccl_sends_from_an_open_pool", nullptr, "", sends_from_an_open_pool},
    {"nccl_sends_from_a_closed_pool", "NCCL-PEER-ACCESS", "", sends_from_a_closed_pool},
    {"nccl_no_peers", nullptr, "STANDIN_PEERS=0", sends_from_a_closed_pool},
    {"nccl_race_with_send", "RACE", "", race_with_send},
    {"nccl_race_with_receive", "RACE", "", race_with_receive},
    {"nccl_not_ready", "NCCL-NOT-READY", "", not_ready},
    {"nccl_receives_what_it_sends", "NCCL-OVERLAP", "", receives_what_it_sends},
    {"nccl_group_left_open", "NCCL-GROUP", "", group_left_open},
    {"nccl_two_threads", "NCCL-THREADS", "", two_threads},
};
