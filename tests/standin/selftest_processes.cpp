// Two processes that share memory.
#include "selftest.h"
#include <csignal>
#include <functional>
#include <sys/wait.h>

// Runs `other` in a second process, connected by pipes; whether it ended well.
struct Channel {
    int in, out;
    template <typename T> void send(const T &value) { HOLDS(write(out, &value, sizeof value) == sizeof value); }
    template <typename T> T take() {
        T value;
        HOLDS(read(in, &value, sizeof value) == sizeof value);
        return value;
    }
};

static pid_t child;

static Channel start(const std::function<void(Channel)> &other) {
    int there[2], back[2];
    HOLDS(!pipe(there) && !pipe(back));
    child = fork();
    if (child == 0) {
        close(there[1]), close(back[0]);
        other({there[0], back[1]});
        exit(0);
    }
    close(there[0]), close(back[1]);
    return {back[0], there[1]};
}

static void finish() {
    int status = 0;
    waitpid(child, &status, 0);
    HOLDS(status == 0);
}

static void share() {
    Channel peer = start([](Channel parent) {
        Device device;
        CUdeviceptr base = 0, again = 0;
        auto handle = parent.take<CUipcMemHandle>();
        OK(cuIpcOpenMemHandle_v2(&base, handle, 1));
        OK(cuIpcOpenMemHandle_v2(&again, handle, 1));
        HOLDS(base == again);
        CUdeviceptr start = 0;
        size_t bytes = 0;
        OK(cuMemGetAddressRange_v2(&start, &bytes, base + 77));
        HOLDS(start == base && bytes == 10000);
        HOLDS(words_at(base + 4000, 1)[0] == 0x01010101);
        OK(cuMemsetD8Async(base, 2, 4, nullptr));
        OK(cuStreamSynchronize(nullptr));
        OK(cuIpcCloseMemHandle(again));
        OK(cuIpcCloseMemHandle(base));
        parent.send(1);
    });
    Device device;
    Memory memory(10000);
    CUipcMemHandle handle;
    OK(cuMemsetD8Async(memory.at, 1, 10000, nullptr));
    OK(cuStreamSynchronize(nullptr));
    OK(cuIpcGetMemHandle(&handle, memory.at + 5000));
    peer.send(handle);
    peer.take<int>();
    HOLDS(words_at(memory.at, 1)[0] == 0x02020202);
    CUdeviceptr own;
    GIVES(CUDA_ERROR_INVALID_CONTEXT, cuIpcOpenMemHandle_v2(&own, handle, 1));
    finish();
}

// Streams of two processes that take turns by words in memory that both map.
static void words_across() {
    auto turns = [](CUdeviceptr words, CUdeviceptr data, CUstream stream, int self) {
        for (uint64_t round = 0; round < 20; round++) {
            if (self || round) OK(cuStreamWaitValue64_v2(stream, words + 8 * !self, round + self, 0));
            OK(cuMemsetD8Async(data, static_cast<unsigned char>(2 * round + self), 1000, stream));
            OK(cuStreamWriteValue64_v2(stream, words + 8 * self, round + 1, 0));
        }
        OK(cuStreamSynchronize(stream));
    };
    Channel peer = start([&](Channel parent) {
        Device device;
        Queue queue;
        CUdeviceptr base = 0;
        OK(cuIpcOpenMemHandle_v2(&base, parent.take<CUipcMemHandle>(), 1));
        turns(base, base + 16, queue.is, 1);
        HOLDS(words_at(base + 16, 1)[0] == 0x27272727);
        OK(cuIpcCloseMemHandle(base));
    });
    Device device;
    Queue queue;
    Memory memory(2000);
    char zeros[16] = {};
    OK(cuMemcpyHtoD_v2(memory.at, zeros, 16));
    CUipcMemHandle handle;
    OK(cuIpcGetMemHandle(&handle, memory.at));
    peer.send(handle);
    turns(memory.at, memory.at + 16, queue.is, 0);
    finish();
}

static void freed_while_imported() {
    Channel peer = start([](Channel parent) {
        Device device;
        CUdeviceptr base = 0;
        OK(cuIpcOpenMemHandle_v2(&base, parent.take<CUipcMemHandle>(), 1));
        parent.send(1);
        pause();
    });
    CUipcMemHandle handle;
    Device device;
    Memory memory(10000);
    OK(cuIpcGetMemHandle(&handle, memory.at));
    peer.send(handle);
    peer.take<int>();
    if (getenv("KILL_IT")) {
        kill(child, SIGKILL); // nobody has waited for it: a dead importer maps nothing
        usleep(100000);
    } else {
        alarm(5);
        pid_t importer = child;
        if (fork() == 0) { // the importer must not outlive us
            usleep(500000);
            kill(importer, SIGKILL);
            _exit(0);
        }
    }
}

static void freed_after_close() {
    Channel peer = start([](Channel parent) {
        Device device;
        CUdeviceptr base = 0;
        OK(cuIpcOpenMemHandle_v2(&base, parent.take<CUipcMemHandle>(), 1));
        OK(cuIpcCloseMemHandle(base));
        parent.send(1);
        parent.take<int>();
    });
    Device device;
    {
        Memory memory(10000);
        CUipcMemHandle handle;
        OK(cuIpcGetMemHandle(&handle, memory.at));
        peer.send(handle);
        peer.take<int>();
    }
    peer.send(1);
    finish();
}

static void not_shareable() {
    Device device;
    Queue queue;
    CUipcMemHandle handle;
    Memory memory(100);
    unsigned capable = 0;
    OK(cuPointerGetAttribute(&capable, 10, memory.at));
    HOLDS(capable);
    OK(cuIpcGetMemHandle(&handle, memory.at));
    CUdeviceptr pool;
    OK(cuMemAllocAsync(&pool, 100, queue.is));
    GIVES(CUDA_ERROR_INVALID_VALUE, cuIpcGetMemHandle(&handle, pool));
    OK(cuMemFreeAsync(pool, queue.is));
    OK(cuStreamSynchronize(queue.is));
    memset(&handle, 0, sizeof handle);
    CUdeviceptr opened;
    GIVES(CUDA_ERROR_INVALID_VALUE, cuIpcOpenMemHandle_v2(&opened, handle, 1));
}

static void handle_of_freed_memory() {
    Channel peer = start([](Channel parent) {
        Device device;
        CUdeviceptr base = 0;
        GIVES(CUDA_ERROR_MAP_FAILED, cuIpcOpenMemHandle_v2(&base, parent.take<CUipcMemHandle>(), 1));
    });
    Device device;
    CUipcMemHandle handle;
    {
        Memory memory(10000);
        OK(cuIpcGetMemHandle(&handle, memory.at));
    }
    peer.send(handle);
    finish();
}

static void import_not_closed() {
    Channel peer = start([](Channel parent) {
        OK(cuInit(0));
        CUcontext context;
        OK(cuDevicePrimaryCtxRetain(&context, 0));
        OK(cuCtxSetCurrent(context));
        CUdeviceptr base = 0;
        OK(cuIpcOpenMemHandle_v2(&base, parent.take<CUipcMemHandle>(), 1));
    });
    Device device;
    Memory memory(10000);
    CUipcMemHandle handle;
    OK(cuIpcGetMemHandle(&handle, memory.at));
    peer.send(handle);
    int status = 0;
    waitpid(child, &status, 0);
    HOLDS(WIFEXITED(status) && WEXITSTATUS(status) == 99);
    abort(); // the case is one of violation
}

const std::vector<Case> process_cases = {
    {"share", nullptr, "", share},
    {"words_across", nullptr, "", words_across},
    {"freed_while_imported", "FREED-WHILE-IMPORTED", "", freed_while_imported},
    {"importer_was_killed", nullptr, "KILL_IT=1", freed_while_imported},
    {"freed_after_close", nullptr, "", freed_after_close},
    {"not_shareable", nullptr, "", not_shareable},
    {"handle_of_freed_memory", nullptr, "", handle_of_freed_memory},
    {"import_not_closed", "LEAK", "", import_not_closed},
};
