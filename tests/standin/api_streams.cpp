// Streams, events, and the words that streams of several processes wait for.
#include "standin.h"

using namespace standin;

static CUresult create_stream(Call &call, CUstream *handle, unsigned flags, int priority) {
    Context *context = call.context();
    if (flags & ~CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
    uint64_t number = next_handle();
    state().stream_handles[number] = new_stream(context, flags, priority);
    *handle = reinterpret_cast<CUstream>(number);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
    BEGIN;
    return create_stream(call, stream, flags, 0);
}

EXPORT CUresult cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int priority) {
    BEGIN;
    return create_stream(call, stream, flags, priority);
}

// What is queued still runs, as with the real one.
EXPORT CUresult cuStreamDestroy_v2(CUstream handle) {
    BEGIN_RELEASE;
    StreamPtr stream = stream_of(call, handle, false);
    if (reinterpret_cast<uint64_t>(handle) <= 2) violation("BAD-HANDLE", "%s: a default stream", call.name);
    call.not_capturing(stream);
    state().stream_handles.erase(reinterpret_cast<uint64_t>(handle));
    retire(stream);
    return call.injected;
}

EXPORT CUresult cuStreamQuery(CUstream handle) {
    BEGIN;
    StreamPtr stream = stream_of(call, handle, false);
    call.not_capturing(stream);
    return query(stream->last) ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

EXPORT CUresult cuStreamSynchronize(CUstream handle) {
    BEGIN;
    StreamPtr stream = stream_of(call, handle, false);
    call.not_capturing(stream);
    wait_until(call, {stream->last});
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamGetCtx(CUstream handle, CUcontext *context) {
    BEGIN;
    *context = reinterpret_cast<CUcontext>(stream_of(call, handle, false)->context);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamGetFlags(CUstream handle, unsigned *flags) {
    BEGIN;
    *flags = stream_of(call, handle, false)->flags;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamGetPriority(CUstream handle, int *priority) {
    BEGIN;
    *priority = stream_of(call, handle, false)->priority;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamGetId(CUstream handle, unsigned long long *id) {
    BEGIN;
    *id = stream_of(call, handle, false)->id;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamIsCapturing(CUstream handle, int *status) {
    BEGIN;
    *status = stream_of(call, handle, false)->capturing;
    return CUDA_SUCCESS;
}

// Says that a stream is being captured (1) or not (0), without a graph: an operation on such a stream is a violation.
EXPORT void standin_capture(CUstream handle, int status) {
    Call call(__func__);
    stream_of(call, handle, false)->capturing = status;
}

EXPORT CUresult cuEventCreate(CUevent *handle, unsigned flags) {
    BEGIN;
    if (flags & ~7u) return CUDA_ERROR_INVALID_VALUE;
    if ((flags & CU_EVENT_INTERPROCESS) && !(flags & CU_EVENT_DISABLE_TIMING)) return CUDA_ERROR_INVALID_VALUE;
    uint64_t number = next_handle();
    state().events[number] = Event{call.context(), flags, nullptr, nullptr, {}};
    *handle = reinterpret_cast<CUevent>(number);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuEventDestroy_v2(CUevent handle) {
    BEGIN_RELEASE;
    event_of(call, handle);
    state().events.erase(reinterpret_cast<uint64_t>(handle));
    return call.injected;
}

EXPORT CUresult cuEventRecord(CUevent handle, CUstream stream_handle) {
    BEGIN;
    Event &event = event_of(call, handle);
    StreamPtr stream = stream_of(call, stream_handle, false);
    if (event.context != stream->context)
        violation("WRONG-CONTEXT", "%s: the event is of device %d, the stream of device %d", call.name,
                  event.context->device->ordinal, stream->context->device->ordinal);
    event.capture = nullptr;
    if (stream->capture) capture_record(event, stream);
    else event.record = enqueue(call, stream, call.name, {});
    return CUDA_SUCCESS;
}

static RecordPtr recorded(Call &call, CUevent handle) {
    Event &event = event_of(call, handle);
    if (event.capture) violation("CAPTURING", "%s: the event was recorded while its stream was captured", call.name);
    if (!event.record && !is_ok("STANDIN_UNRECORDED"))
        violation("UNRECORDED-EVENT", "%s: the event was never recorded, which real drivers take for done: it orders nothing",
                  call.name);
    return event.record;
}

EXPORT CUresult cuEventQuery(CUevent handle) {
    BEGIN;
    call.safe_in_capture();
    return query(recorded(call, handle)) ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

EXPORT CUresult cuEventSynchronize(CUevent handle) {
    BEGIN;
    wait_until(call, {recorded(call, handle)});
    return CUDA_SUCCESS;
}

static CUresult elapsed(Call &call, float *milliseconds, CUevent start, CUevent end) {
    if ((event_of(call, start).flags | event_of(call, end).flags) & CU_EVENT_DISABLE_TIMING) return CUDA_ERROR_INVALID_HANDLE;
    RecordPtr from = recorded(call, start), to = recorded(call, end);
    if (!from || !to) return CUDA_ERROR_INVALID_HANDLE;
    if (!from->done || !to->done) return CUDA_ERROR_NOT_READY;
    *milliseconds = 1;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuEventElapsedTime(float *milliseconds, CUevent start, CUevent end) {
    BEGIN;
    return elapsed(call, milliseconds, start, end);
}

EXPORT CUresult cuEventElapsedTime_v2(float *milliseconds, CUevent start, CUevent end) {
    BEGIN;
    return elapsed(call, milliseconds, start, end);
}

EXPORT CUresult cuStreamWaitEvent(CUstream handle, CUevent event, unsigned flags) {
    BEGIN;
    if (flags) return CUDA_ERROR_INVALID_VALUE;
    StreamPtr stream = stream_of(call, handle, false);
    if (stream->capture || event_of(call, event).capture) return capture_wait(call, stream, event_of(call, event));
    RecordPtr record = recorded(call, event);
    enqueue(call, stream, call.name, {}, [&](Op &op) { if (record) op.after.push_back(record); });
    return CUDA_SUCCESS;
}

static bool satisfies(uint64_t word, uint64_t value, unsigned how) {
    switch (how) {
    case CU_STREAM_WAIT_VALUE_GEQ: return static_cast<int64_t>(word - value) >= 0;
    case CU_STREAM_WAIT_VALUE_EQ: return word == value;
    case CU_STREAM_WAIT_VALUE_AND: return (word & value) != 0;
    default: return (~(word | value)) != 0;
    }
}

// The checks of both; the word is looked at again when its operation runs.
static CUresult check_word(Call &call, CUdeviceptr address) {
    if (address % 8) return CUDA_ERROR_INVALID_VALUE;
    check_range(call, address, 8, "uses a word of");
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamWaitValue64_v2(CUstream handle, CUdeviceptr address, uint64_t value, unsigned flags) {
    BEGIN;
    StreamPtr stream = stream_of(call, handle);
    unsigned how = flags & ~static_cast<unsigned>(CU_STREAM_WAIT_VALUE_FLUSH);
    if (how > CU_STREAM_WAIT_VALUE_NOR) return CUDA_ERROR_INVALID_VALUE;
    if (flags & CU_STREAM_WAIT_VALUE_FLUSH) return CUDA_ERROR_NOT_SUPPORTED; // as where the attribute says so
    if (CUresult error = check_word(call, address)) return error;
    NotePtr note;
    auto read = [address](const Running &running) {
        auto *word = reinterpret_cast<uint64_t *>(reach(running, address, 8, "waits for a word of"));
        return __atomic_load_n(word, __ATOMIC_ACQUIRE);
    };
    // A value of our own stream brings what that stream knew. One from elsewhere, another process or the host, may stand for
    // whatever was published before, so all of that counts as known: no race is seen where there may be none.
    Work work = [address, read](Running &running) {
        auto word = state().words.find(address);
        bool ours = word != state().words.end() && word->second.value == read(running);
        join(running.stream->clock, ours ? word->second.clock : state().host);
    };
    enqueue(call, stream, call.name, work, [&](Op &op) {
        Running waiting{stream.get(), stream->context, {stream->slot, 0, op.note}, nullptr};
        op.ready = [waiting, read, value, how] { return satisfies(read(waiting), value, how); };
    });
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamWriteValue64_v2(CUstream handle, CUdeviceptr address, uint64_t value, unsigned flags) {
    BEGIN;
    StreamPtr stream = stream_of(call, handle);
    if (flags > 1) return CUDA_ERROR_INVALID_VALUE;
    if (CUresult error = check_word(call, address)) return error;
    enqueue(call, stream, call.name, [address, value](Running &running) {
        auto *word = reinterpret_cast<uint64_t *>(reach(running, address, 8, "writes a word of"));
        __atomic_store_n(word, value, __ATOMIC_RELEASE);
        state().words[address] = {value, *running.clock};
        join(state().host, *running.clock); // the host, or whoever tells it, may have seen the value
    });
    return CUDA_SUCCESS;
}
