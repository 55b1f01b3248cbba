// Streams, events, words, and races.
#include "selftest.h"
#include <chrono>
#include <thread>

static void runs_late_but_runs() {
    Device device;
    Queue queue;
    Mark mark;
    Pinned pinned(8);
    Memory memory(8);
    pinned.words()[0] = 0;
    OK(cuMemsetD8Async(memory.at, 1, 8, queue.is));
    OK(cuMemcpyAsync(pinned.address(), memory.at, 8, queue.is));
    OK(cuEventRecord(mark.is, queue.is));
    int queries = 0;
    while (cuEventQuery(mark.is) == CUDA_ERROR_NOT_READY) queries++;
    HOLDS(pinned.words()[0] == 0x0101010101010101 && queries < 10000);
    OK(cuStreamQuery(queue.is));
}

// The device gets on by itself, for those who watch a word.
static void runs_while_the_host_is_idle() {
    Device device;
    Queue queue;
    Pinned pinned(8);
    pinned.words()[0] = 0;
    OK(cuStreamWriteValue64_v2(queue.is, pinned.address(), 7, 0));
    HOLDS(pinned.words()[0] == 0);
    while (__atomic_load_n(pinned.words(), __ATOMIC_ACQUIRE) != 7) usleep(100);
    OK(cuStreamSynchronize(queue.is));
}

static void two_streams(bool wait, bool read) {
    Device device;
    Queue first, second;
    Mark mark;
    Memory memory(800), other(800);
    OK(cuMemsetD8Async(memory.at, 1, 800, first.is));
    OK(cuEventRecord(mark.is, first.is));
    if (wait) OK(cuStreamWaitEvent(second.is, mark.is, 0));
    if (read)
        OK(cuMemcpyDtoDAsync_v2(other.at, memory.at + 400, 400, second.is));
    else
        OK(cuMemsetD8Async(memory.at + 799, 2, 1, second.is));
    OK(cuCtxSynchronize());
    HOLDS(words_at(read ? other.at : memory.at, 1)[0] == 0x01010101);
}
static void event_orders() { two_streams(true, true); }
static void race_write_read() { two_streams(false, true); }
static void race_write_write() { two_streams(false, false); }

static void race_read_write() {
    Device device;
    Queue first, second;
    Memory memory(800), other(800);
    OK(cuMemcpyDtoDAsync_v2(other.at, memory.at, 400, first.is));
    OK(cuMemsetD8Async(memory.at, 2, 1, second.is));
    OK(cuCtxSynchronize());
}

static void reads_do_not_race() {
    Device device;
    Queue first, second;
    Memory memory(800), other(800), third(800);
    OK(cuMemcpyDtoDAsync_v2(other.at, memory.at, 400, first.is));
    OK(cuMemcpyDtoDAsync_v2(third.at, memory.at, 400, second.is));
    // Beside it is not into it.
    OK(cuMemsetD8Async(memory.at + 400, 2, 400, second.is));
    OK(cuCtxSynchronize());
}

static void kernel_strides(bool overlap) {
    Device device;
    Queue first, second;
    Memory memory(800);
    Kernel kernel;
    for (int each = 0; each < 10; each++) {
        kernel.run(first.is, memory.at + 80 * each, 0, 10, 1);
        kernel.run(second.is, memory.at + 80 * each + (overlap && each == 9 ? 36 : 40), 0, 10, 2);
    }
    OK(cuCtxSynchronize());
    if (!overlap)
        for (int each = 0; each < 200; each++) HOLDS(words_at(memory.at, 200)[each] == 1u + each / 10 % 2);
}
static void kernels_apart() { kernel_strides(false); }
static void race_of_kernels() { kernel_strides(true); }

static void event_recorded_again() {
    Device device;
    Queue first, second;
    Mark mark;
    Memory memory(8);
    OK(cuEventRecord(mark.is, first.is));
    OK(cuStreamWaitEvent(second.is, mark.is, 0)); // this record, not the next
    OK(cuMemsetD8Async(memory.at, 1, 8, first.is));
    OK(cuEventRecord(mark.is, first.is));
    OK(cuMemsetD8Async(memory.at, 2, 8, second.is));
    OK(cuCtxSynchronize());
}

static void host_orders() {
    Device device;
    Queue first, second;
    Mark mark;
    Memory memory(8);
    OK(cuMemsetD8Async(memory.at, 1, 8, first.is));
    OK(cuEventRecord(mark.is, first.is));
    OK(cuEventSynchronize(mark.is));
    std::thread([&] {
        OK(cuCtxSetCurrent(device.context));
        OK(cuMemsetD8Async(memory.at, 2, 8, second.is));
        OK(cuStreamSynchronize(second.is));
    }).join();
    HOLDS(words_at(memory.at, 1)[0] == 0x02020202);
}

static void legacy(unsigned flags) {
    Device device;
    Queue first(flags), second(flags);
    Memory memory(8);
    OK(cuMemsetD8Async(memory.at, 1, 8, first.is));
    OK(cuMemsetD8Async(memory.at, 2, 8, nullptr));
    OK(cuMemsetD8Async(memory.at, 3, 8, second.is));
    OK(cuStreamSynchronize(second.is));
    OK(cuCtxSynchronize());
    HOLDS(words_at(memory.at, 1)[0] == 0x03030303);
}
static void legacy_orders() { legacy(0); }
static void legacy_does_not_order() { legacy(1); }

static void wait_unrecorded() {
    Device device;
    Mark mark;
    OK(cuStreamWaitEvent(nullptr, mark.is, 0));
}

static void query_unrecorded() {
    Device device;
    Mark mark;
    OK(cuEventQuery(mark.is));
}

static void wait_unrecorded_allowed() {
    Device device;
    Queue queue;
    Mark mark;
    OK(cuStreamWaitEvent(queue.is, mark.is, 0));
    OK(cuEventQuery(mark.is));
    OK(cuEventSynchronize(mark.is));
    OK(cuStreamSynchronize(queue.is));
}

static void words(bool wait, unsigned how, uint64_t value, uint64_t written) {
    Device device;
    Queue first, second;
    Memory memory(800), word(8);
    OK(cuMemcpyHtoD_v2(word.at, "\0\0\0\0\0\0\0", 8));
    if (wait) OK(cuStreamWaitValue64_v2(second.is, word.at, value, how));
    OK(cuMemsetD8Async(memory.at, 2, 800, second.is));
    OK(cuMemsetD8Async(memory.at, 1, 800, first.is));
    OK(cuStreamWriteValue64_v2(first.is, word.at, written, 0));
    OK(cuStreamSynchronize(second.is));
    HOLDS(words_at(memory.at, 1)[0] == 0x02020202);
    OK(cuCtxSynchronize());
}
static void word_at_least() { words(true, CU_STREAM_WAIT_VALUE_GEQ, 5, 6); }
static void word_equal() { words(true, CU_STREAM_WAIT_VALUE_EQ, 5, 5); }
static void word_and() { words(true, CU_STREAM_WAIT_VALUE_AND, 6, 2); }
static void word_nor() {
    Device device;
    Queue queue;
    Pinned word(8);
    word.words()[0] = ~1ull;
    OK(cuStreamWaitValue64_v2(queue.is, word.address(), 0, CU_STREAM_WAIT_VALUE_NOR));
    OK(cuStreamSynchronize(queue.is));
    GIVES(CUDA_ERROR_INVALID_VALUE, cuStreamWaitValue64_v2(queue.is, word.address() + 4, 0, 0));
    GIVES(CUDA_ERROR_INVALID_VALUE, cuStreamWaitValue64_v2(queue.is, word.address(), 0, 4));
}
static void word_without_wait() { words(false, 0, 5, 6); }
static void word_never_comes() { words(true, CU_STREAM_WAIT_VALUE_GEQ, 7, 6); }

static void host_stores_word() {
    Device device;
    Queue queue;
    Pinned word(8);
    word.words()[0] = 0;
    OK(cuStreamWaitValue64_v2(queue.is, word.address(), 1, 0));
    std::thread host([&] {
        usleep(100000);
        __atomic_store_n(word.words(), 1, __ATOMIC_RELEASE);
    });
    OK(cuStreamSynchronize(queue.is));
    host.join();
}

// Streams of two threads that wait for each other's words.
static void threads() {
    Device device;
    Pinned words(16);
    words.words()[0] = words.words()[1] = 0;
    auto run = [&](int self) {
        OK(cuCtxSetCurrent(device.context));
        Queue queue;
        Mark mark;
        Memory memory(1000);
        for (uint64_t round = 1; round <= 50; round++) {
            OK(cuMemsetD8Async(memory.at, static_cast<unsigned char>(round), 1000, queue.is));
            OK(cuStreamWriteValue64_v2(queue.is, words.address() + 8 * self, round, 0));
            OK(cuStreamWaitValue64_v2(queue.is, words.address() + 8 * !self, round, 0));
            OK(cuEventRecord(mark.is, queue.is));
            if (round % 2) OK(cuEventSynchronize(mark.is));
            while (cuEventQuery(mark.is)) std::this_thread::yield();
        }
    };
    std::thread other(run, 1);
    run(0);
    other.join();
}

static void pool(bool ordered, bool before_free) {
    Device device;
    Queue first, second;
    Mark mark;
    CUdeviceptr memory;
    OK(cuMemAllocAsync(&memory, 800, first.is));
    OK(cuEventRecord(mark.is, first.is));
    if (ordered) OK(cuStreamWaitEvent(second.is, mark.is, 0));
    OK(cuMemsetD8Async(memory, 1, 800, second.is));
    OK(cuEventRecord(mark.is, second.is));
    if (before_free) OK(cuStreamWaitEvent(first.is, mark.is, 0));
    OK(cuMemFreeAsync(memory, first.is));
    OK(cuCtxSynchronize());
}
static void pool_in_order() { pool(true, true); }
static void pool_used_early() { pool(false, true); }
static void pool_freed_early() { pool(true, false); }

static void pool_freed_twice() {
    Device device;
    CUdeviceptr memory;
    OK(cuMemAllocAsync(&memory, 800, nullptr));
    OK(cuMemFreeAsync(memory, nullptr));
    OK(cuMemFreeAsync(memory, nullptr));
}

static void pool_used_after_free() {
    Device device;
    Queue queue;
    CUdeviceptr memory;
    OK(cuMemAllocAsync(&memory, 800, queue.is));
    OK(cuMemFreeAsync(memory, queue.is));
    OK(cuMemsetD8Async(memory, 1, 800, queue.is));
    OK(cuStreamSynchronize(queue.is));
}

static void pool_freed_by_the_host() {
    Device device;
    Queue queue;
    CUdeviceptr memory;
    OK(cuMemAllocAsync(&memory, 800, queue.is));
    OK(cuMemsetD8Async(memory, 1, 800, queue.is));
    OK(cuStreamSynchronize(queue.is));
    OK(cuMemFree_v2(memory));
}

static void work_left_at_the_end() {
    Device device;
    Queue queue;
    Mark mark;
    CUdeviceptr memory;
    OK(cuMemAllocAsync(&memory, 8, queue.is));
    if (getenv("TOO_LATE")) OK(cuMemFreeAsync(memory, queue.is));
    OK(cuMemsetD8Async(memory, 1, 8, queue.is));
    if (!getenv("TOO_LATE")) OK(cuMemFreeAsync(memory, queue.is));
    OK(cuEventRecord(mark.is, queue.is));
}

static void leaks_operations() {
    Device device;
    Queue queue;
    Pinned word(8);
    word.words()[0] = 0;
    OK(cuStreamWaitValue64_v2(queue.is, word.address(), 1, 0));
    exit(0);
}

static void work_outlives_its_stream() {
    Device device;
    Memory memory(8);
    {
        Queue queue;
        OK(cuMemsetD8Async(memory.at, 1, 8, queue.is));
    }
    OK(cuCtxSynchronize());
    HOLDS(words_at(memory.at, 1)[0] == 0x01010101);
}

const std::vector<Case> order_cases = {
    {"runs_late_but_runs", nullptr, "STANDIN_IDLE_MS=0", runs_late_but_runs},
    {"runs_while_the_host_is_idle", nullptr, "", runs_while_the_host_is_idle},
    {"event_orders", nullptr, "", event_orders},
    {"race_write_read", "RACE", "", race_write_read},
    {"race_write_write", "RACE", "", race_write_write},
    {"race_read_write", "RACE", "", race_read_write},
    {"reads_do_not_race", nullptr, "", reads_do_not_race},
    {"kernels_apart", nullptr, "", kernels_apart},
    {"race_of_kernels", "RACE", "", race_of_kernels},
    {"event_recorded_again", "RACE", "", event_recorded_again},
    {"host_orders", nullptr, "", host_orders},
    {"legacy_orders", nullptr, "", legacy_orders},
    {"legacy_does_not_order", "RACE", "", legacy_does_not_order},
    {"wait_unrecorded", "UNRECORDED-EVENT", "", wait_unrecorded},
    {"wait_unrecorded_allowed", nullptr, "STANDIN_UNRECORDED=ok", wait_unrecorded_allowed},
    {"query_unrecorded", "UNRECORDED-EVENT", "", query_unrecorded},
    {"word_at_least", nullptr, "", word_at_least},
    {"word_equal", nullptr, "", word_equal},
    {"word_and", nullptr, "", word_and},
    {"word_nor", nullptr, "", word_nor},
    {"word_without_wait", "RACE", "", word_without_wait},
    {"word_never_comes", "DEADLOCK", "", word_never_comes},
    {"host_stores_word", nullptr, "", host_stores_word},
    {"threads", nullptr, "", threads},
    {"pool_in_order", nullptr, "", pool_in_order},
    {"pool_used_early", "UNORDERED-USE|UNKNOWN-MEMORY", "", pool_used_early},
    {"pool_freed_early", "UNORDERED-USE|UNKNOWN-MEMORY", "", pool_freed_early},
    {"pool_freed_twice", "UNKNOWN-MEMORY", "STANDIN_IDLE_MS=0", pool_freed_twice},
    {"pool_used_after_free", "UNKNOWN-MEMORY", "", pool_used_after_free},
    {"pool_freed_by_the_host", nullptr, "", pool_freed_by_the_host},
    {"work_left_at_the_end", nullptr, "STANDIN_IDLE_MS=0", work_left_at_the_end},
    {"wrong_work_left_at_the_end", "UNKNOWN-MEMORY", "STANDIN_IDLE_MS=0 TOO_LATE=1", work_left_at_the_end},
    {"leaks_operations", "LEAK", "", leaks_operations},
    {"work_outlives_its_stream", nullptr, "", work_outlives_its_stream},
};
