// Messages between ranks: matched as they are asked for, moved as their batches run.
#include "nccl.h"
#include <algorithm>
#include <cstring>

namespace standin {

Batch::~Batch() {
    for (Half &half : halves)
        if (half.message && half.message->ends[half.side] == this) half.message->ends[half.side] = nullptr;
}

static unsigned long long number(uint64_t value) { return value; }

// Two ends that have found each other must mean the same.
static void compare(const NcclCall &call, const Message &message, int from, int to, bool gather) {
    const char *what = gather ? "an all-gather" : "a message";
    if (message.bytes[SENDS] != message.bytes[RECEIVES])
        violation("NCCL-SIZE", "%s: %s from rank %d to rank %d: %llu bytes are sent, %llu received", call.name, what, from, to,
                  number(message.bytes[SENDS]), number(message.bytes[RECEIVES]));
    if (message.gathers[SENDS] != message.gathers[RECEIVES])
        violation("NCCL-ORDER", "%s: %s from rank %d to rank %d comes after %llu collectives of the one and %llu of the other",
                  call.name, what, from, to, number(message.gathers[SENDS]), number(message.gathers[RECEIVES]));
}

static void match(const NcclCall &call, Batch &batch, Half &half) {
    const CommPtr &comm = batch.comm;
    int from = half.side == SENDS ? comm->rank : half.peer, to = half.side == SENDS ? half.peer : comm->rank;
    std::tuple<int, int, bool> channel{from, to, half.gather};
    auto &others = comm->world->open[!half.side][channel];
    if (others.empty()) {
        half.message = std::make_shared<Message>();
        comm->world->open[half.side][channel].push_back(half.message);
    } else {
        half.message = others.front();
        others.pop_front();
    }
    Message &message = *half.message;
    message.ends[half.side] = &batch;
    message.asked[half.side] = true;
    message.bytes[half.side] = half.bytes;
    message.gathers[half.side] = comm->gathers;
    if (half.side == SENDS) message.source = half.address;
    if (message.asked[!half.side]) compare(call, message, from, to, half.gather);
    const CommPtr &peer = comm->world->ranks[half.peer];
    if (peer->dead && !peer->aborted && !message.asked[!half.side])
        violation("NCCL-SIZE", "%s: %s is to rank %d, which has destroyed its communicator without the other end", call.name,
                  batch.what.c_str(), half.peer);
}

// Within a batch everything happens at once: nothing may be received into what another part of it uses.
static void check_overlap(const NcclCall &call, const std::vector<Half> &halves) {
    std::vector<const Half *> sorted;
    for (const Half &half : halves)
        if (!half.gather) sorted.push_back(&half);
    std::sort(sorted.begin(), sorted.end(), [](const Half *a, const Half *b) { return a->address < b->address; });
    const Half *written = nullptr, *any = nullptr; // those that reach farthest
    for (const Half *half : sorted) {
        const Half *other = half->side == RECEIVES ? any : written;
        if (other && other->address + other->bytes > half->address)
            violation("NCCL-OVERLAP", "%s: a group receives into memory at 0x%llx that it also uses otherwise", call.name,
                      number(half->address));
        auto farther = [&](const Half *than) { return !than || half->address + half->bytes > than->address + than->bytes; };
        if (farther(any)) any = half;
        if (half->side == RECEIVES && farther(written)) written = half;
    }
}

// Ranks of one process reach each other's buffers directly: NCCL opens what is from cuMemAlloc to its peers, and leaves the rest as it is.
// That counts when both ends are there: until then a peer may still be about to ask for it.
static void check_peer(const Batch &batch, const Half &half) {
    RegionPtr region = find_region(half.address);
    if (!region || (!region->pool && region->kind != Kind::Mapped)) return;
    const Device *home = region->context->device, *peer = batch.comm->world->ranks[half.peer]->context->device;
    const auto &open = region->pool ? region->pool->access : region->access;
    if (peer != home && can_access(peer, home) && !open.count(peer))
        violation("NCCL-PEER-ACCESS", "%s: memory at 0x%llx is of a pool, or mapped, and not open to GPU %d, on which rank %d is",
                  batch.what.c_str(), number(half.address), peer->ordinal, half.peer);
}

// Whether the batch can only finish after itself: it waits for the other ends of its messages to start, these for what is before
// them on their ranks to finish.
static bool waits_for(const Batch *batch, const Batch *wanted, std::set<const Batch *> &seen) {
    auto finishes_after = [&](const Batch *other) {
        if (!other || other->finished || other->comm->aborted) return false;
        return other == wanted || (seen.insert(other).second && waits_for(other, wanted, seen));
    };
    if (finishes_after(batch->before.get())) return true;
    for (const Half &half : batch->halves) {
        const Batch *peer = half.message->ends[!half.side];
        if (peer && !peer->started && finishes_after(peer->before.get())) return true;
    }
    return false;
}

void post(NcclCall &call, const BatchPtr &batch) {
    const CommPtr &comm = batch->comm;
    check_overlap(call, batch->halves);
    if (comm->last && !comm->last->finished) batch->before = comm->last;
    comm->last = batch;
    for (Half &half : batch->halves) match(call, *batch, half);
    for (const Half &half : batch->halves) {
        if (!half.gather) continue;
        comm->gathers++;
        break;
    }
    std::set<const Batch *> seen;
    if (waits_for(batch.get(), batch.get(), seen))
        violation("NCCL-DEADLOCK", "%s of %s waits for a peer that waits for it: sends and receives that depend on each other belong "
                  "into one group", batch->what.c_str(), comm->name().c_str());
    for (Half &half : batch->halves) {
        Batch *peer = half.message->ends[!half.side];
        seen.clear();
        if (peer && peer != batch.get() && waits_for(peer, peer, seen))
            violation("NCCL-DEADLOCK", "%s of %s waits for a peer that waits for it: sends and receives that depend on each other "
                      "belong into one group", batch->what.c_str(), comm->name().c_str());
    }
}

// The first message of each direction needs its other end to be asked for.
bool is_connected(Batch &batch) {
    auto &known = batch.comm->connected;
    for (const Half &half : batch.halves) {
        if (half.gather || half.peer == batch.comm->rank || known.count({half.side, half.peer})) continue;
        if (!half.message->asked[!half.side]) return false;
    }
    for (const Half &half : batch.halves)
        if (!half.gather) known.insert({half.side, half.peer});
    return true;
}

static void start(Batch &batch) {
    const Stream &stream = *batch.streams[0];
    Clock clock = stream.clock;
    join(clock, stream.queue.front().host);
    for (const RecordPtr &record : stream.queue.front().after) join(clock, record->clock);
    batch.started = true;
    batch.before = nullptr;
    for (Half &half : batch.halves) {
        half.message->started[half.side] = true;
        if (half.side == SENDS) half.message->clock = clock;
    }
}

// Whether the batch, the first of its stream, can finish now. An aborted one does, without its peers.
static bool can_finish(Batch &batch) {
    if (batch.comm->aborted) return true;
    if (batch.comm->error || (batch.before && !batch.before->finished)) return false;
    if (!batch.started) start(batch);
    return std::all_of(batch.halves.begin(), batch.halves.end(),
                       [](const Half &half) { return half.message->started[!half.side]; });
}

static void take(Message &message) {
    if (message.taken) return;
    const Batch &sender = *message.ends[SENDS];
    const StreamPtr &stream = sender.streams[0];
    Running sending{stream.get(), stream->context, {stream->slot, 0, sender.note}, nullptr};
    const unsigned char *data = reach(sending, message.source, message.bytes[SENDS], "sends");
    message.data.assign(data, data + message.bytes[SENDS]);
    message.taken = true;
}

static void finish(Batch &batch, Running &running) {
    bool moves = !batch.comm->aborted;
    if (moves)
        for (const Half &half : batch.halves) check_peer(batch, half);
    for (Half &half : batch.halves) {
        if (half.side != SENDS) continue;
        if (moves) take(*half.message);
        else if (!half.message->taken) half.message->started[SENDS] = false; // and never will be
        reach(running, half.address, half.bytes, "sends");
        touch(running, half.address, half.bytes, false);
    }
    for (Half &half : batch.halves) {
        if (half.side != RECEIVES) continue;
        if (moves) {
            take(*half.message);
            join(running.stream->clock, half.message->clock);
        }
        // Until it is over, an aborted one may still write.
        unsigned char *data = reach(running, half.address, half.bytes, "receives");
        touch(running, half.address, half.bytes, true);
        if (moves) memcpy(data, half.message->data.data(), half.bytes);
    }
    batch.finished = true;
    batch.before = nullptr;
    for (Half &half : batch.halves) half.message->ends[half.side] = nullptr;
    batch.halves.clear();
}

void put_on_streams(NcclCall &call, const BatchPtr &batch) {
    RecordPtr done = enqueue(call, batch->streams[0], batch->what, [batch](Running &running) { finish(*batch, running); },
                             [&](Op &op) {
        for (size_t each = 1; each < batch->streams.size(); each++)
            if (batch->streams[each]->last) op.after.push_back(batch->streams[each]->last);
        batch->note = op.note;
        op.stuck = "NCCL-DEADLOCK";
        op.ready = [batch] { return can_finish(*batch); };
    });
    for (size_t each = 1; each < batch->streams.size(); each++)
        enqueue(call, batch->streams[each], batch->what + " on another stream", {},
                [&](Op &op) { op.after.push_back(done); });
}

} // namespace standin
