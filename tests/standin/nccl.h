// A NCCL for tests: communicators between the threads of one process, over the stand-in driver, stricter than the real one.
//
// Ranks tell each other nothing but messages: an all-gather is one from each rank to each. Both ends of a message are halves of a
// batch, which is what one rank enqueues at once: a group, or a call outside of one. A batch starts when it is first in its stream
// and the one before it is finished; it finishes once all its messages have started at their other ends too.
//
// The driver's lock guards everything in here as well.
#pragma once
#include "standin.h"
#include <set>
#include <tuple>

struct ncclUniqueId {
    char internal[128];
};
struct ncclConfig {
    size_t size;
    unsigned magic;
    unsigned version;
    int blocking, cgaClusterSize, minCTAs, maxCTAs;
    const char *netName;
    int splitShare;
};
static_assert(sizeof(ncclConfig) == 48, "as in nccl.h of 2.20");
using ncclComm_t = struct ncclComm *;

enum : int {
    ncclSuccess = 0,
    ncclUnhandledCudaError = 1,
    ncclSystemError = 2,
    ncclInternalError = 3,
    ncclInvalidArgument = 4,
    ncclInvalidUsage = 5,
    ncclRemoteError = 6,
    ncclInProgress = 7,
};

namespace standin {

struct Comm;
struct Batch;
using CommPtr = std::shared_ptr<Comm>;
using BatchPtr = std::shared_ptr<Batch>;

enum Side { SENDS, RECEIVES };

struct Message {
    Batch *ends[2] = {nullptr, nullptr}; // that has not finished
    bool asked[2] = {false, false}, started[2] = {false, false}, taken = false;
    uint64_t bytes[2] = {0, 0}, gathers[2] = {0, 0};
    uint64_t source = 0;
    std::vector<unsigned char> data; // once taken
    Clock clock;                     // what the sender's batch knew
};
using MessagePtr = std::shared_ptr<Message>;

struct Half {
    Side side;
    int peer;
    bool gather; // part of an all-gather
    uint64_t address, bytes;
    MessagePtr message;
};

struct Batch {
    CommPtr comm;
    std::string what;
    std::vector<StreamPtr> streams; // it lies in the first; the others wait for it, and it for them
    std::vector<Half> halves;
    BatchPtr before; // of the same communicator, until this one starts
    bool started = false, finished = false;
    NotePtr note;
    ~Batch();
};

// The ranks that gave one unique id.
struct World {
    std::vector<CommPtr> ranks;
    size_t joined = 0, ended = 0;
    int error = ncclSuccess; // why nobody gets a communicator
    std::string text;
    // By sender, receiver, and whether it is part of an all-gather: what one end has asked for and the other has not.
    std::map<std::tuple<int, int, bool>, std::deque<MessagePtr>> open[2];
};

struct Comm {
    uint64_t handle = 0;
    std::shared_ptr<World> world;
    int rank = 0;
    Context *context = nullptr;
    bool blocking = true, ready = false, dead = false, aborted = false, busy = false;
    int error = ncclSuccess; // that ncclCommGetAsyncError tells from now on
    uint64_t queries = 0;    // more of them say ncclInProgress
    uint64_t gathers = 0;    // asked for so far
    BatchPtr waiting;       // not on its streams yet
    BatchPtr last;
    std::set<std::pair<int, int>> connected; // side and peer
    int size() const { return static_cast<int>(world->ranks.size()); }
    std::string name() const { return "rank " + std::to_string(rank) + " of " + std::to_string(size()); }
};

// A call of NCCL's interface: a driver's call, with what `failed` says of it.
class NcclCall : public Call {
  public:
    explicit NcclCall(const char *name);
    int injected_result; // ncclSuccess: none
    // The communicator, ready for use, or in use by nobody (`any_state`).
    CommPtr comm(ncclComm_t handle, bool any_state = false);
    int fail(int result, const std::string &text);
    // Sleeps, with the lock free, until that is so; a communicator that is aborted meanwhile ends it: whether it was not.
    bool wait(const CommPtr &comm, const char *what, const std::function<bool()> &until);
};
#define NCCL_BEGIN                                                                                                               \
    standin::NcclCall call(__func__);                                                                                            \
    if (call.injected_result) return call.injected_result

// nccl_messages.cpp
void post(NcclCall &call, const BatchPtr &batch);
bool is_connected(Batch &batch);
void put_on_streams(NcclCall &call, const BatchPtr &batch);

// nccl_calls.cpp
// What the communicator has in hand: a step of it, if it does not block.
int progress(NcclCall &call, const CommPtr &comm);
void begin_progress(const CommPtr &comm);

} // namespace standin
