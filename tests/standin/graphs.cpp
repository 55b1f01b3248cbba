// Streams captured into graphs, as real ones are: what is enqueued is kept instead, and runs at each launch of the graph.
//
// A launch gives each captured stream a stream of its own for the time, so that what the graph forgot to order is seen as
// elsewhere.
#include "standin.h"
#include <algorithm>
#include <set>

namespace standin {

// What a thread is known by, and which calls it allows itself while something is captured.
static thread_local int thread_mode = 0;

void Call::safe_in_capture() {
    if (thread_mode == 2) return;
    for (const StreamPtr &stream : state().streams) {
        const Graph *graph = stream->capture.get();
        if (graph && (graph->mode == 0 || (graph->mode == 1 && graph->thread == &thread_mode)))
            violation("CAPTURING", "%s: not while stream %llu is being captured", name, (unsigned long long)stream->id);
    }
}

void capture(Call &call, const StreamPtr &stream, Op op) {
    Graph &graph = *stream->capture;
    if (!op.after.empty()) violation("CAPTURING", "%s: it waits for what is not captured", call.name);
    op.host.clear();
    graph.nodes.push_back({std::move(op), graph.ends[stream.get()], stream.get()});
    graph.ends[stream.get()] = {graph.nodes.size() - 1};
}

void capture_record(Event &event, const StreamPtr &stream) {
    event.record = nullptr;
    event.capture = stream->capture;
    event.nodes = stream->capture->ends[stream.get()];
}

// A stream that waits for a captured event is captured from then on.
CUresult capture_wait(Call &call, const StreamPtr &stream, const Event &event) {
    constexpr CUresult MERGE = 902, ISOLATION = 905;
    if (!event.capture) return ISOLATION;
    if (!event.capture->open) violation("CAPTURING", "%s: the event's capture has ended", call.name);
    if (stream->capture && stream->capture != event.capture) return MERGE;
    if (!stream->capture) {
        stream->capture = event.capture;
        stream->capturing = 1;
        event.capture->lanes.push_back(stream);
    }
    auto &ends = event.capture->ends[stream.get()];
    for (size_t node : event.nodes)
        if (std::find(ends.begin(), ends.end(), node) == ends.end()) ends.push_back(node);
    return CUDA_SUCCESS;
}

bool graph_uses(const Module *module) {
    auto uses = [&](const Graph &graph) {
        return std::any_of(graph.nodes.begin(), graph.nodes.end(), [&](const Node &node) { return node.op.module == module; });
    };
    for (auto &[handle, graph] : state().graphs)
        if (uses(*graph)) return true;
    for (auto &[handle, exec] : state().execs)
        if (uses(*exec.graph)) return true;
    return false;
}

// Whether all that was captured comes before the end of the stream where the capture began.
static bool is_joined(Graph &graph) {
    std::set<size_t> reached;
    std::vector<size_t> open = graph.ends[graph.origin.get()];
    while (!open.empty()) {
        size_t node = open.back();
        open.pop_back();
        if (!reached.insert(node).second) continue;
        for (size_t before : graph.nodes[node].after) open.push_back(before);
    }
    return reached.size() == graph.nodes.size();
}

// Enqueues the nodes between a first and a last operation in the stream.
static void launch(Call &call, const StreamPtr &stream, GraphExec &exec) {
    const Graph &graph = *exec.graph;
    RecordPtr begin = enqueue(call, stream, "begin of a graph", {}, [&](Op &op) {
        if (exec.last) op.after.push_back(exec.last); // launches of one graph wait for each other
    });
    std::map<Stream *, StreamPtr> lanes;
    std::vector<RecordPtr> records;
    for (const Node &node : graph.nodes) {
        StreamPtr &lane = lanes[node.lane];
        if (!lane) lane = new_stream(graph.context, CU_STREAM_NON_BLOCKING, 0);
        records.push_back(enqueue(call, lane, node.op.note->what + " of a graph", node.op.work, [&](Op &op) {
            op.after.push_back(begin);
            for (size_t before : node.after) op.after.push_back(records[before]);
            op.ready = node.op.ready;
            op.module = node.op.module;
        }));
    }
    exec.last = enqueue(call, stream, "end of a graph", {}, [&](Op &op) {
        for (const RecordPtr &record : records) op.after.push_back(record);
    });
    for (auto &[captured, lane] : lanes) retire(lane);
}

} // namespace standin

using namespace standin;
using CUgraph = struct CUgraph_st *;
using CUgraphExec = struct CUgraphExec_st *;

EXPORT CUresult cuThreadExchangeStreamCaptureMode(int *mode) {
    BEGIN;
    if (*mode < 0 || *mode > 2) return CUDA_ERROR_INVALID_VALUE;
    std::swap(*mode, thread_mode);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamBeginCapture_v2(CUstream handle, int mode) {
    BEGIN;
    StreamPtr stream = stream_of(call, handle);
    if (mode < 0 || mode > 2) return CUDA_ERROR_INVALID_VALUE;
    if (stream == stream->context->legacy) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    call.not_capturing(stream);
    auto graph = std::make_shared<Graph>();
    graph->context = stream->context;
    graph->origin = stream;
    graph->mode = mode;
    graph->thread = &thread_mode;
    graph->lanes.push_back(stream);
    stream->capture = graph;
    stream->capturing = 1;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamEndCapture(CUstream handle, CUgraph *out) {
    BEGIN;
    StreamPtr stream = stream_of(call, handle, false);
    constexpr CUresult UNMATCHED = 903, UNJOINED = 904;
    GraphPtr graph = stream->capture;
    if (!graph || graph->origin != stream) return UNMATCHED;
    graph->open = false;
    for (const StreamPtr &lane : graph->lanes) {
        lane->capture = nullptr;
        lane->capturing = 0;
    }
    *out = nullptr;
    if (!is_joined(*graph)) return UNJOINED;
    uint64_t number = next_handle();
    state().graphs[number] = graph;
    *out = reinterpret_cast<CUgraph>(number);
    return CUDA_SUCCESS;
}

template <typename Table, typename Handle> static auto &held(const Call &call, Table &table, Handle handle) {
    auto found = table.find(reinterpret_cast<uint64_t>(handle));
    if (found == table.end())
        violation("BAD-HANDLE", "%s: %p is no graph, or was destroyed", call.name, static_cast<void *>(handle));
    return found->second;
}

EXPORT CUresult cuGraphInstantiateWithFlags(CUgraphExec *out, CUgraph graph, unsigned long long) {
    BEGIN;
    call.context();
    GraphPtr instance = held(call, state().graphs, graph);
    uint64_t number = next_handle();
    state().execs[number] = {instance, nullptr};
    *out = reinterpret_cast<CUgraphExec>(number);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGraphUpload(CUgraphExec exec, CUstream stream) {
    BEGIN;
    held(call, state().execs, exec);
    stream_of(call, stream);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGraphLaunch(CUgraphExec exec, CUstream handle) {
    BEGIN;
    GraphExec &instance = held(call, state().execs, exec);
    StreamPtr stream = stream_of(call, handle);
    call.not_capturing(stream); // graphs within graphs are not modelled
    launch(call, stream, instance);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGraphExecDestroy(CUgraphExec exec) {
    BEGIN_RELEASE;
    held(call, state().execs, exec);
    state().execs.erase(reinterpret_cast<uint64_t>(exec));
    return call.injected;
}

EXPORT CUresult cuGraphDestroy(CUgraph graph) {
    BEGIN_RELEASE;
    held(call, state().graphs, graph);
    state().graphs.erase(reinterpret_cast<uint64_t>(graph));
    return call.injected;
}
