// Groups, and what is asked for in them.
#include "nccl.h"

namespace standin {

constexpr size_t GROUP_LIMIT = 4096;

// What a thread has asked for since its outermost ncclGroupStart.
struct Group {
    unsigned depth = 0;
    size_t operations = 0;
    int error = ncclSuccess;
    std::vector<BatchPtr> batches; // one of each communicator, in the order of their first use
    ~Group() {
        if (depth) violation("NCCL-GROUP", "a thread ends within a group");
    }
};
static thread_local Group group;

static BatchPtr batch_of(const CommPtr &comm) {
    for (const BatchPtr &batch : group.batches)
        if (batch->comm == comm) return batch;
    auto batch = std::make_shared<Batch>();
    batch->comm = comm;
    group.batches.push_back(batch);
    return batch;
}

// Memory of the communicator's own GPU, whole.
static void check_memory(const NcclCall &call, const Comm &comm, uint64_t address, uint64_t bytes) {
    RegionPtr region = find_region(address);
    if (region ? !region->on_device() : !in_device_range(address))
        violation("NCCL-HOST-MEMORY", "%s: 0x%llx is host memory%s, expected is memory of a GPU", call.name,
                  (unsigned long long)address, region ? ", pinned" : "");
    check_range(call, address, bytes, "uses");
    if (region->context != comm.context)
        violation("NCCL-WRONG-DEVICE", "%s: 0x%llx is memory of device %d, the communicator is of device %d", call.name,
                  (unsigned long long)address, region->context->device->ordinal, comm.context->device->ordinal);
}

// The stream, which must be of the communicator's GPU, whichever is current.
static StreamPtr stream_for(NcclCall &call, const Comm &comm, CUstream handle) {
    context_stack().push_back(comm.context);
    StreamPtr stream = stream_of(call, handle);
    context_stack().pop_back();
    call.not_capturing(stream);
    if (stream->capture) violation("CAPTURING", "%s: graphs with communication are not modelled", call.name);
    return stream;
}

static int submit(NcclCall &call) {
    auto batches = std::move(group.batches);
    int error = group.error;
    size_t operations = group.operations;
    group.batches.clear();
    group.error = ncclSuccess;
    group.operations = 0;
    if (error) return error;
    int result = ncclSuccess;
    for (const BatchPtr &batch : batches) {
        if (batch->what.empty()) batch->what = "a group of " + std::to_string(operations) + " operations of NCCL";
        batch->comm->waiting = batch;
        post(call, batch);
        if (!batch->comm->blocking) begin_progress(batch->comm);
    }
    for (const BatchPtr &batch : batches) {
        const CommPtr &comm = batch->comm;
        if (!comm->blocking) {
            result = ncclInProgress;
            continue;
        }
        if (!call.wait(comm, "the peers of its first messages", [&] { return is_connected(*batch); })) return ncclInternalError;
        comm->waiting = nullptr;
        put_on_streams(call, batch);
    }
    return result;
}

// One operation: its parts, in the open group or in one of its own.
static int ask(NcclCall &call, const CommPtr &comm, CUstream handle, std::vector<Half> halves) {
    StreamPtr stream = stream_for(call, *comm, handle);
    for (const Half &half : halves) check_memory(call, *comm, half.address, half.bytes);
    if (comm->error) return group.error = comm->error;
    if (++group.operations > GROUP_LIMIT)
        violation("NCCL-GROUP-LIMIT", "%s: more than %zu operations in one group", call.name, GROUP_LIMIT);
    BatchPtr batch = batch_of(comm);
    bool known = false;
    for (const StreamPtr &each : batch->streams) known |= each == stream;
    if (!known) batch->streams.push_back(stream);
    batch->halves.insert(batch->halves.end(), halves.begin(), halves.end());
    if (group.depth) return ncclSuccess;
    batch->what = call.name;
    return submit(call);
}

static uint64_t address_of(const void *pointer) { return reinterpret_cast<uint64_t>(pointer); }

static uint64_t size_of_type(int type) {
    static const uint64_t bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
    return type < 0 || type > 9 ? 0 : bytes[type];
}

static int send_or_receive(NcclCall &call, Side side, const void *pointer, size_t count, int type, int peer, ncclComm_t handle,
                           CUstream stream) {
    if (!handle) return call.fail(ncclInvalidArgument, "comm is NULL");
    CommPtr comm = call.comm(handle);
    if (!size_of_type(type)) return group.error = call.fail(ncclInvalidArgument, "no such type");
    if (peer < 0 || peer >= comm->size()) return group.error = call.fail(ncclInvalidArgument, "no such peer");
    if (!count) violation("NCCL-SIZE", "%s: an empty message to or from rank %d", call.name, peer);
    return ask(call, comm, stream, {{side, peer, false, address_of(pointer), count * size_of_type(type), nullptr}});
}

} // namespace standin

using namespace standin;

#define NCCL_BEGIN_IN_GROUP                                                                                                      \
    NcclCall call(__func__);                                                                                                     \
    if (call.injected_result) return group.depth ? group.error = call.injected_result : call.injected_result

EXPORT int ncclGroupStart() {
    NCCL_BEGIN;
    group.depth++;
    return ncclSuccess;
}

// Also one that fails closes the group; nothing of it is done then.
EXPORT int ncclGroupEnd() {
    NcclCall call(__func__);
    if (!group.depth) return call.fail(ncclInvalidUsage, "no group is open");
    if (call.injected_result) group.error = call.injected_result;
    return --group.depth ? ncclSuccess : submit(call);
}

EXPORT int ncclSend(const void *from, size_t count, int type, int peer, ncclComm_t comm, CUstream stream) {
    NCCL_BEGIN_IN_GROUP;
    return send_or_receive(call, SENDS, from, count, type, peer, comm, stream);
}

EXPORT int ncclRecv(void *to, size_t count, int type, int peer, ncclComm_t comm, CUstream stream) {
    NCCL_BEGIN_IN_GROUP;
    return send_or_receive(call, RECEIVES, to, count, type, peer, comm, stream);
}

EXPORT int ncclAllGather(const void *from, void *to, size_t count, int type, ncclComm_t handle, CUstream stream) {
    NCCL_BEGIN_IN_GROUP;
    if (!handle) return call.fail(ncclInvalidArgument, "comm is NULL");
    CommPtr comm = call.comm(handle);
    uint64_t bytes = count * size_of_type(type);
    if (!size_of_type(type)) return group.error = call.fail(ncclInvalidArgument, "no such type");
    if (!bytes) violation("NCCL-SIZE", "%s: nothing to gather", call.name);
    check_memory(call, *comm, address_of(to), bytes * comm->size());
    std::vector<Half> halves;
    for (int peer = 0; peer < comm->size(); peer++) {
        halves.push_back({SENDS, peer, true, address_of(from), bytes, nullptr});
        halves.push_back({RECEIVES, peer, true, address_of(to) + peer * bytes, bytes, nullptr});
    }
    return ask(call, comm, stream, halves);
}
