// Streams captured into graphs.
#include "selftest.h"

struct Graph {
    void *graph = nullptr, *exec = nullptr;
    // Two streams that fork from `queue` and join it, or do not.
    Graph(CUstream queue, CUstream other, Kernel &kernel, CUdeviceptr memory, bool ordered, bool joined) {
        Mark fork, join;
        OK(cuStreamBeginCapture_v2(queue, 0));
        kernel.run(queue, memory, 0, 100, 1);
        OK(cuEventRecord(fork.is, queue));
        OK(cuStreamWaitEvent(other, fork.is, 0));
        int status = 0;
        OK(cuStreamIsCapturing(other, &status));
        HOLDS(status == 1);
        kernel.run(other, memory + 400, memory, 100, 1);
        OK(cuEventRecord(join.is, other));
        if (!ordered) kernel.run(queue, memory, 0, 100, 7);
        if (joined) OK(cuStreamWaitEvent(queue, join.is, 0));
        kernel.run(queue, memory + 800, joined ? memory + 400 : memory, 100, 1);
        GIVES(joined ? 0 : 904, cuStreamEndCapture(queue, &graph));
        if (joined) OK(cuGraphInstantiateWithFlags(&exec, graph, 0));
    }
    ~Graph() {
        if (!graph) return;
        OK(cuGraphExecDestroy(exec));
        OK(cuGraphDestroy(graph));
    }
};

static void replay(bool ordered) {
    Device device;
    Kernel kernel;
    Queue first, second, third;
    Memory memory(1200);
    Graph graph(first.is, second.is, kernel, memory.at, ordered, true);
    OK(cuStreamQuery(first.is));
    for (uint32_t word : words_at(memory.at, 300)) HOLDS(word == 0xd5d5d5d5); // nothing ran
    for (int round = 0; round < 2; round++) {
        OK(cuMemsetD8Async(memory.at, 0, 1200, third.is));
        OK(cuGraphLaunch(graph.exec, third.is));
        OK(cuStreamSynchronize(third.is));
        for (int each = 0; each < 300; each++) HOLDS(words_at(memory.at, 300)[each] == 1u + each / 100);
    }
}
static void graph() { replay(true); }
static void race_in_a_graph() { replay(false); }

static void graph_not_joined() {
    Device device;
    Kernel kernel;
    Queue first, second;
    Memory memory(1200);
    Graph graph(first.is, second.is, kernel, memory.at, true, false);
}

static void graph_and_stream() {
    Device device;
    Kernel kernel;
    Queue first, second, third;
    Memory memory(1200);
    Graph graph(first.is, second.is, kernel, memory.at, true, true);
    OK(cuGraphLaunch(graph.exec, third.is));
    OK(cuMemsetD8Async(memory.at, 0, 1200, first.is));
    OK(cuCtxSynchronize());
}

static void graph_outlives_module() {
    Device device;
    Queue first, second;
    Memory memory(1200);
    Kernel *kernel = new Kernel;
    Graph graph(first.is, second.is, *kernel, memory.at, true, true);
    delete kernel;
}

static void leaks_graph() {
    Device device;
    Kernel kernel;
    Queue first, second;
    Memory memory(1200);
    new Graph(first.is, second.is, kernel, memory.at, true, true);
    exit(0);
}

template <typename Call> static void while_capturing(Call call) {
    Device device;
    Queue queue, other;
    Mark mark;
    OK(cuEventRecord(mark.is, other.is));
    OK(cuStreamBeginCapture_v2(queue.is, getenv("RELAXED") ? 2 : 0));
    call(queue.is, mark.is);
    void *graph = nullptr;
    OK(cuStreamEndCapture(queue.is, &graph));
    OK(cuGraphDestroy(graph));
    OK(cuCtxSynchronize());
}
static void capture_and_synchronise() {
    while_capturing([](CUstream queue, CUevent) { OK(cuStreamSynchronize(queue)); });
}
static void capture_and_allocate() {
    while_capturing([](CUstream, CUevent) {
        CUdeviceptr memory;
        OK(cuMemAlloc_v2(&memory, 1));
        OK(cuMemFree_v2(memory));
    });
}
static void capture_and_query() {
    while_capturing([](CUstream, CUevent event) {
        CUresult result = cuEventQuery(event);
        HOLDS(result == 0 || result == CUDA_ERROR_NOT_READY);
    });
}
static void capture_and_wait_outside() {
    while_capturing([](CUstream queue, CUevent event) { GIVES(905, cuStreamWaitEvent(queue, event, 0)); });
}
static void capture_and_exchange_mode() {
    while_capturing([](CUstream, CUevent event) {
        int mode = 2;
        OK(cuThreadExchangeStreamCaptureMode(&mode));
        CUresult result = cuEventQuery(event);
        HOLDS(result == 0 || result == CUDA_ERROR_NOT_READY);
        OK(cuThreadExchangeStreamCaptureMode(&mode));
        HOLDS(mode == 2);
    });
}

const std::vector<Case> graph_cases = {
    {"graph", nullptr, "", graph},
    {"race_in_a_graph", "RACE", "", race_in_a_graph},
    {"graph_not_joined", nullptr, "", graph_not_joined},
    {"race_of_graph_and_stream", "RACE", "", graph_and_stream},
    {"graph_outlives_module", "MODULE-IN-USE", "", graph_outlives_module},
    {"leaks_graph", "LEAK", "", leaks_graph},
    {"capture_and_synchronise", "CAPTURING", "", capture_and_synchronise},
    {"capture_and_allocate", "CAPTURING", "", capture_and_allocate},
    {"capture_and_query", "CAPTURING", "", capture_and_query},
    {"capture_relaxed_and_query", nullptr, "RELAXED=1", capture_and_query},
    {"capture_and_exchange_mode", nullptr, "", capture_and_exchange_mode},
    {"capture_and_wait_outside", nullptr, "", capture_and_wait_outside},
};
