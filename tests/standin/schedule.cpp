// Streams as queues that run as late as the interface allows, in an order across streams that is drawn from a seed.
//
// Nothing runs when it is enqueued. Operations run within queries (a few, perhaps none), within synchronisation (until what it
// waits for is done), and, so that other processes and a host that watches a word get on, in a thread of ours once the process has
// called nothing for a while, as a device works by itself.
#include "standin.h"
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <thread>
#include <unistd.h>

namespace standin {

using Time = std::chrono::steady_clock;

static unsigned waiters;                              // threads within a synchronisation
static auto &arrival = *new std::condition_variable; // something was enqueued; never destroyed, as the thread never ends

StreamPtr new_stream(Context *context, unsigned flags, int priority) {
    State &all = state();
    auto stream = std::make_shared<Stream>();
    stream->id = all.next_stream++;
    if (all.free_slots.empty()) {
        stream->slot = static_cast<uint32_t>(all.ticks.size());
        all.ticks.push_back(0);
    } else {
        stream->slot = all.free_slots.back();
        all.free_slots.pop_back();
    }
    stream->context = context;
    stream->flags = flags;
    stream->priority = priority;
    all.streams.push_back(stream);
    return stream;
}

static void forget_drained(const StreamPtr &stream) {
    if (!stream->destroyed || !stream->queue.empty()) return;
    State &all = state();
    all.free_slots.push_back(stream->slot);
    all.streams.erase(std::find(all.streams.begin(), all.streams.end(), stream));
}

void retire(const StreamPtr &stream) {
    stream->destroyed = true;
    forget_drained(stream);
}

static bool can_run(const Stream &stream) {
    if (stream.queue.empty()) return false;
    const Op &head = stream.queue.front();
    for (const RecordPtr &record : head.after)
        if (!record->done) return false;
    return !head.ready || head.ready();
}

// Runs the first operation of a stream.
static void run_head(const StreamPtr &stream) {
    State &all = state();
    Op op = std::move(stream->queue.front());
    stream->queue.pop_front();
    join(stream->clock, op.host);
    for (const RecordPtr &record : op.after) join(stream->clock, record->clock);
    uint32_t tick = ++all.ticks[stream->slot];
    if (stream->clock.size() <= stream->slot) stream->clock.resize(stream->slot + 1, 0);
    stream->clock[stream->slot] = tick;
    Running running{stream.get(), stream->context, {stream->slot, tick, op.note}, &stream->clock};
    if (op.work) op.work(running);
    op.finished->clock = stream->clock;
    op.finished->done = true;
    all.steps++;
    forget_drained(stream);
}

static StreamPtr pick(const std::function<bool(const StreamPtr &)> &wanted) {
    std::vector<StreamPtr> able;
    for (const StreamPtr &stream : state().streams)
        if (wanted(stream) && can_run(*stream)) able.push_back(stream);
    return able.empty() ? nullptr : able[draw(able.size())];
}

static StreamPtr pick_any() {
    return pick([](const StreamPtr &) { return true; });
}

static StreamPtr shared(Stream *stream) {
    for (const StreamPtr &each : state().streams)
        if (each.get() == stream) return each;
    return nullptr;
}

// A stream whose next operation has to run before the record is done; none where they all wait for a value.
static StreamPtr pick_needed(const RecordPtr &record, std::set<Stream *> &seen) {
    if (record->done || !seen.insert(record->stream).second) return nullptr;
    StreamPtr stream = shared(record->stream);
    if (can_run(*stream)) return stream;
    for (const RecordPtr &each : stream->queue.front().after)
        if (StreamPtr needed = pick_needed(each, seen)) return needed;
    return nullptr;
}

enum Mode { LAZY, RANDOM, OTHERS_FIRST, MODES };

static StreamPtr pick_for(const RecordPtr &record, Mode mode) {
    StreamPtr chosen;
    std::set<Stream *> seen;
    if (mode == LAZY) chosen = pick_needed(record, seen);
    if (mode == OTHERS_FIRST) chosen = pick([&](const StreamPtr &stream) { return stream.get() != record->stream; });
    return chosen ? chosen : pick_any();
}

static bool finished(const RecordPtr &record) {
    if (!record) return true;
    if (record->done) join(state().host, record->clock);
    return record->done;
}

bool query(const RecordPtr &record) {
    static const unsigned steps[] = {0, 0, 1, 1, 2, 3, 8, 64};
    for (unsigned left = steps[draw(std::size(steps))]; left; left--) {
        StreamPtr stream = pick_any();
        if (!stream) break;
        run_head(stream);
    }
    return finished(record);
}

// Lets the lock go for a moment.
static void pause(Call &call, unsigned microseconds) {
    call.lock.unlock();
    usleep(microseconds);
    call.lock.lock();
}

// The operation that all others in front of the record wait for.
static const Op &culprit(const RecordPtr &record) {
    const Op &head = shared(record->stream)->queue.front();
    for (const RecordPtr &before : head.after)
        if (!before->done) return culprit(before);
    return head;
}

[[noreturn]] static void deadlock(const Call &call, const RecordPtr &record) {
    const Op &head = culprit(record);
    violation(head.stuck, "%s: nothing has run for %llu ms; first in line is %s%s", call.name,
              (unsigned long long)setting("STANDIN_PATIENCE_MS", 10000), head.note->text().c_str(),
              head.ready ? ", and what that waits for does not come" : "");
}

void wait_until(Call &call, const std::vector<RecordPtr> &records) {
    State &all = state();
    auto patience = std::chrono::milliseconds(setting("STANDIN_PATIENCE_MS", 10000));
    Mode mode = static_cast<Mode>(draw(MODES));
    uint64_t steps = all.steps;
    auto since = Time::now();
    waiters++;
    for (const RecordPtr &record : records) {
        while (!finished(record)) {
            if (StreamPtr stream = pick_for(record, mode)) {
                run_head(stream);
                continue;
            }
            if (steps != all.steps) {
                steps = all.steps;
                since = Time::now();
            }
            if (Time::now() - since > patience) deadlock(call, record);
            pause(call, 100);
        }
    }
    waiters--;
}

uint64_t pending_operations() {
    uint64_t count = 0;
    for (const StreamPtr &stream : state().streams) count += stream->queue.size();
    return count;
}

uint64_t run_all() {
    while (StreamPtr stream = pick_any()) run_head(stream);
    return pending_operations();
}

// The device by itself. It begins where the process has called nothing for STANDIN_IDLE_MS, and goes on while that is so.
static void idle_work(uint64_t idle_ms) {
    State &all = state();
    uint64_t calls = 0, quiet_ms = 0;
    std::unique_lock<std::mutex> lock(all.lock);
    while (!all.finished) {
        if (!pending_operations()) arrival.wait(lock);
        lock.unlock();
        usleep(1000);
        lock.lock();
        quiet_ms = calls == all.calls && !waiters ? quiet_ms + 1 : 0;
        calls = all.calls;
        if (quiet_ms < idle_ms || all.finished) continue;
        if (StreamPtr stream = pick_any()) run_head(stream);
    }
}

static void start_idle_work() {
    static bool started;
    uint64_t idle_ms = setting("STANDIN_IDLE_MS", 50);
    if (started || !idle_ms) return;
    started = true;
    sigset_t every, before; // signals are the program's own business
    sigfillset(&every);
    sigdelset(&every, SIGSEGV);
    pthread_sigmask(SIG_SETMASK, &every, &before);
    std::thread(idle_work, idle_ms).detach();
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

// The legacy NULL stream and the blocking streams of its context wait for each other.
static void order_with_legacy(Call &call, const Stream &stream, Op &op) {
    const StreamPtr &legacy = stream.context->legacy;
    if (stream.flags & CU_STREAM_NON_BLOCKING) return;
    if (&stream != legacy.get()) {
        if (legacy->last) op.after.push_back(legacy->last);
        return;
    }
    for (const StreamPtr &other : state().streams) {
        if (other->context != stream.context || (other->flags & CU_STREAM_NON_BLOCKING)) continue;
        call.not_capturing(other);
        if (other->last) op.after.push_back(other->last);
    }
}

RecordPtr enqueue(Call &call, const StreamPtr &stream, std::string what, Work work, const std::function<void(Op &)> &more) {
    if (!stream->capture) call.not_capturing(stream);
    Op op;
    op.note = std::make_shared<Note>(Note{std::move(what), stream->id, ++stream->enqueued, false});
    op.host = state().host;
    op.work = std::move(work);
    op.finished = std::make_shared<Record>();
    op.finished->stream = stream.get();
    if (stream->capture) {
        if (more) more(op);
        capture(call, stream, std::move(op));
        return nullptr;
    }
    order_with_legacy(call, *stream, op);
    if (more) more(op);
    stream->last = op.finished;
    RecordPtr finished = op.finished;
    stream->queue.push_back(std::move(op));
    start_idle_work();
    arrival.notify_one();
    return finished;
}

bool module_in_use(const Module *module) {
    for (const StreamPtr &stream : state().streams)
        for (const Op &op : stream->queue)
            if (op.module == module) return true;
    return graph_uses(module);
}

uint64_t next_handle() { return state().next_handle += 16; }

static StreamPtr per_thread_stream(Context *context) {
    static thread_local std::map<Context *, StreamPtr> streams;
    StreamPtr &stream = streams[context];
    if (!stream) stream = new_stream(context, 0, 0);
    return stream;
}

// 0 and 1 are the legacy stream of the current context, 2 is the thread's own.
StreamPtr stream_of(Call &call, CUstream handle, bool of_current_context) {
    Context *context = call.context();
    uint64_t number = reinterpret_cast<uint64_t>(handle);
    if (number <= 1) return context->legacy;
    if (number == 2) return per_thread_stream(context);
    auto found = state().stream_handles.find(number);
    if (found == state().stream_handles.end())
        violation("BAD-HANDLE", "%s: 0x%llx is not a stream, or was destroyed", call.name, (unsigned long long)number);
    const StreamPtr &stream = found->second;
    if (of_current_context && stream->context != context)
        violation("WRONG-CONTEXT", "%s: stream %llu is of device %d, current is the context of device %d", call.name,
                  (unsigned long long)stream->id, stream->context->device->ordinal, context->device->ordinal);
    return stream;
}

Event &event_of(Call &call, CUevent handle) {
    call.context();
    auto found = state().events.find(reinterpret_cast<uint64_t>(handle));
    if (found == state().events.end())
        violation("BAD-HANDLE", "%s: %p is not an event, or was destroyed", call.name, static_cast<void *>(handle));
    return found->second;
}

} // namespace standin
