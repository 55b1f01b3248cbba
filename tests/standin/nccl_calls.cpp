// Communicators: made, asked about, aborted, destroyed.
#include "nccl.h"
#include <algorithm>
#include <chrono>
#include <climits>
#include <cstring>
#include <unistd.h>

namespace standin {

static auto &comms = *new std::map<uint64_t, CommPtr>;
static auto &dead = *new std::map<uint64_t, const char *>; // by which call
static auto &worlds = *new std::map<std::string, std::shared_ptr<World>>; // by unique id
static char last_error[1024];
static bool shared_gpus; // as STANDIN_NCCL_SHARED_GPU

// Codes of the driver's are no results of NCCL's: what stands for them is that a call of CUDA's failed.
static int result_of(CUresult injected) { return injected > ncclInProgress ? ncclUnhandledCudaError : injected; }

NcclCall::NcclCall(const char *name) : Call(name), injected_result(result_of(injected)) {
    if (refused) injected_result = ncclUnhandledCudaError;
    if (injected_result) fail(injected_result, "an injected error");
}

// Programs read it without our lock.
static void remember(const std::string &text) {
    if (text != last_error) snprintf(last_error, sizeof last_error, "%s", text.c_str());
}

int NcclCall::fail(int result, const std::string &text) {
    remember(std::string(name) + ": " + text);
    return result;
}

CommPtr NcclCall::comm(ncclComm_t handle, bool any_state) {
    uint64_t number = reinterpret_cast<uint64_t>(handle);
    auto gone = dead.find(number);
    if (gone != dead.end()) violation("NCCL-USE-AFTER-ABORT", "%s: the communicator ended by %s", name, gone->second);
    auto found = comms.find(number);
    if (found == comms.end()) violation("BAD-HANDLE", "%s: %p is not a communicator", name, static_cast<void *>(handle));
    const CommPtr &comm = found->second;
    if (any_state) return comm;
    if (comm->busy) violation("NCCL-THREADS", "%s: another thread is in a call with this communicator", name);
    if (!comm->error && (!comm->ready || comm->waiting))
        violation("NCCL-NOT-READY", "%s: ncclCommGetAsyncError has not said ncclSuccess since the last call", name);
    return comm;
}

bool NcclCall::wait(const CommPtr &comm, const char *what, const std::function<bool()> &until) {
    auto patience = std::chrono::milliseconds(setting("STANDIN_PATIENCE_MS", 10000));
    auto since = std::chrono::steady_clock::now();
    comm->busy = true;
    while (!comm->aborted && !until()) {
        if (std::chrono::steady_clock::now() - since > patience)
            violation("NCCL-DEADLOCK", "%s: %s has waited for %s in vain", name, comm->name().c_str(), what);
        lock.unlock();
        usleep(50);
        lock.lock();
    }
    comm->busy = false;
    return !comm->aborted;
}

// As the real one reads it: as many bytes as the caller has over the defaults, and of older releases only what they had.
static int read_config(NcclCall &call, const ncclConfig *given, ncclConfig &config) {
    const ncclConfig defaults{sizeof(ncclConfig), 0, 22005, INT_MIN, INT_MIN, INT_MIN, INT_MIN, nullptr, INT_MIN};
    config = defaults;
    if (given) memcpy(&config, given, std::min(given->size, sizeof config));
    if (given && config.magic != 0xcafebeef)
        return call.fail(ncclInvalidArgument, "ncclConfig_t argument not initialized via NCCL_CONFIG_INITIALIZER");
    if (config.version < 21400) config.blocking = defaults.blocking;
    if (config.version < 21700) {
        config.cgaClusterSize = config.minCTAs = config.maxCTAs = INT_MIN;
        config.netName = nullptr;
    }
    auto refuses = [&](int &value, int otherwise, int least, int most) {
        if (value == INT_MIN) value = otherwise;
        return value < least || value > most;
    };
    if (refuses(config.blocking, 1, 0, 1)) return call.fail(ncclInvalidArgument, "Invalid config blocking attribute value");
    if (refuses(config.cgaClusterSize, 4, 0, INT_MAX))
        return call.fail(ncclInvalidArgument, "Invalid config cgaClusterSize attribute value");
    if (refuses(config.minCTAs, 1, 1, INT_MAX) || refuses(config.maxCTAs, 32, 1, INT_MAX) || config.minCTAs > config.maxCTAs)
        return call.fail(ncclInvalidArgument, "Invalid config min/max channels attribute value");
    if (refuses(config.splitShare, 0, 0, 1)) return call.fail(ncclInvalidArgument, "Invalid config splitShare attribute value");
    return ncclSuccess;
}

// When the last rank has come: whether they may be together.
static void check_gpus(World &world) {
    if (shared_gpus || is_set("STANDIN_NCCL_SHARED_GPU")) return;
    for (const CommPtr &one : world.ranks)
        for (const CommPtr &other : world.ranks) {
            if (one->rank >= other->rank || one->context != other->context) continue;
            world.error = ncclInvalidUsage;
            world.text = "Duplicate GPU detected : rank " + std::to_string(one->rank) + " and rank " +
                         std::to_string(other->rank) + " both on CUDA device " + std::to_string(one->context->device->physical);
        }
}

static void enter_world(const NcclCall &call, const CommPtr &comm, int size, const ncclUniqueId &id) {
    auto &world = worlds[std::string(id.internal, sizeof id.internal)];
    if (!world) {
        world = std::make_shared<World>();
        world->ranks.resize(size);
    }
    if (static_cast<int>(world->ranks.size()) != size || world->ranks[comm->rank])
        violation("NCCL-INIT", "%s: rank %d of %d with a unique id with which %d ranks are made, this one %s", call.name, comm->rank,
                  size, static_cast<int>(world->ranks.size()), world->ranks[comm->rank] ? "already" : "not yet");
    comm->world = world;
    world->ranks[comm->rank] = comm;
    if (++world->joined == world->ranks.size()) check_gpus(*world);
}

static void end(const CommPtr &comm, const char *by) {
    State &all = state();
    comm->dead = true;
    comm->context->retained--;
    all.communicators--;
    dead[comm->handle] = by;
    comms.erase(comm->handle);
    comm->waiting = comm->last = nullptr;
    World &world = *comm->world;
    if (++world.ended < world.ranks.size()) return;
    world.ranks.clear(); // they hold the world
    for (auto each = worlds.begin(); each != worlds.end(); ++each)
        if (each->second.get() == &world) {
            worlds.erase(each);
            return;
        }
}

void begin_progress(const CommPtr &comm) {
    static const uint64_t queries[] = {0, 1, 1, 2, 3, 8};
    comm->queries = queries[draw(std::size(queries))];
}

// Whether all ranks are there, and stayed; their error, if they may not be together.
static bool is_whole(const CommPtr &comm) {
    if (comm->world->joined < comm->world->ranks.size()) return false;
    for (const CommPtr &rank : comm->world->ranks)
        if (rank->aborted && !comm->world->error) return false;
    comm->ready = true;
    if (comm->world->error && !comm->error) {
        comm->error = comm->world->error;
        remember(comm->world->text);
    }
    return true;
}

int progress(NcclCall &call, const CommPtr &comm) {
    if (comm->error) return comm->error;
    if (comm->ready && !comm->waiting) return ncclSuccess;
    if (comm->queries) {
        comm->queries--;
        return ncclInProgress;
    }
    if (!comm->ready) return is_whole(comm) ? comm->error : static_cast<int>(ncclInProgress);
    if (!is_connected(*comm->waiting)) return ncclInProgress;
    put_on_streams(call, comm->waiting);
    comm->waiting = nullptr;
    return ncclSuccess;
}

} // namespace standin

using namespace standin;

EXPORT int ncclGetVersion(int *version) {
    NCCL_BEGIN;
    if (!version) return ncclInvalidArgument;
    *version = static_cast<int>(setting("STANDIN_NCCL_VERSION", 22005));
    return ncclSuccess;
}

EXPORT int ncclGetUniqueId(ncclUniqueId *id) {
    NCCL_BEGIN;
    static uint64_t ids;
    if (!id) return ncclInvalidArgument;
    memset(id->internal, 0xd5, sizeof id->internal);
    snprintf(id->internal, sizeof id->internal, "standin %d %llu", static_cast<int>(getpid()), (unsigned long long)++ids);
    return ncclSuccess;
}

EXPORT const char *ncclGetErrorString(int result) {
    static const char *const texts[] = {"no error", "unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
                                        "unhandled system error (run with NCCL_DEBUG=INFO for details)",
                                        "internal error - please report this issue to the NCCL developers",
                                        "invalid argument (run with NCCL_DEBUG=WARN for details)",
                                        "invalid usage (run with NCCL_DEBUG=WARN for details)",
                                        "remote process exited or there was a network error", "NCCL operation in progress",
                                        "unknown result code"};
    return texts[result >= 0 && result <= ncclInProgress ? result : 8];
}

// Of the whole library, whatever communicator is given, as with the real one.
EXPORT const char *ncclGetLastError(ncclComm_t) { return last_error; }

EXPORT int ncclCommInitRankConfig(ncclComm_t *out, int size, ncclUniqueId id, int rank, ncclConfig *given) {
    NCCL_BEGIN;
    ncclConfig config;
    if (!out) return call.fail(ncclInvalidArgument, "comm is NULL");
    *out = nullptr;
    if (size < 1 || rank < 0 || rank >= size) return call.fail(ncclInvalidArgument, "Invalid rank requested");
    if (!state().initialised) return call.fail(ncclUnhandledCudaError, "the driver is not initialised");
    if (int error = read_config(call, given, config)) return error;
    auto comm = std::make_shared<Comm>();
    comm->rank = rank;
    comm->context = call.context();
    comm->blocking = config.blocking;
    comm->handle = next_handle();
    enter_world(call, comm, size, id);
    comm->context->retained++; // the runtime's, below NCCL
    comms[comm->handle] = comm;
    state().communicators++;
    *out = reinterpret_cast<ncclComm_t>(comm->handle);
    if (!comm->blocking) {
        begin_progress(comm);
        return ncclInProgress;
    }
    if (!call.wait(comm, "all ranks to come", [&] { return is_whole(comm); })) return ncclInternalError;
    if (!comm->error) return ncclSuccess;
    end(comm, call.name);
    *out = nullptr;
    return comm->error;
}

EXPORT int ncclCommInitRank(ncclComm_t *out, int size, ncclUniqueId id, int rank) {
    return ncclCommInitRankConfig(out, size, id, rank, nullptr);
}

EXPORT int ncclCommCount(ncclComm_t handle, int *count) {
    NCCL_BEGIN;
    if (!handle || !count) return call.fail(ncclInvalidArgument, "an argument is NULL");
    CommPtr comm = call.comm(handle);
    *count = comm->size();
    return comm->error;
}

EXPORT int ncclCommUserRank(ncclComm_t handle, int *rank) {
    NCCL_BEGIN;
    if (!handle || !rank) return call.fail(ncclInvalidArgument, "an argument is NULL");
    CommPtr comm = call.comm(handle);
    *rank = comm->rank;
    return comm->error;
}

EXPORT int ncclCommCuDevice(ncclComm_t handle, int *device) {
    NCCL_BEGIN;
    if (!handle || !device) return call.fail(ncclInvalidArgument, "an argument is NULL");
    CommPtr comm = call.comm(handle);
    *device = comm->context->device->ordinal;
    return comm->error;
}

EXPORT int ncclCommGetAsyncError(ncclComm_t handle, int *error) {
    NCCL_BEGIN;
    if (!handle || !error) return call.fail(ncclInvalidArgument, "an argument is NULL");
    CommPtr comm = call.comm(handle, true);
    *error = comm->busy ? static_cast<int>(ncclInProgress) : progress(call, comm);
    return ncclSuccess;
}

// What is on streams ends when its turn comes, and moves nothing; what is not there yet is dropped.
EXPORT int ncclCommAbort(ncclComm_t handle) {
    NcclCall call(__func__);
    if (call.refused || !handle) return ncclSuccess;
    CommPtr comm = call.comm(handle, true);
    comm->aborted = true;
    end(comm, call.name);
    return call.injected_result;
}

EXPORT int ncclCommDestroy(ncclComm_t handle) {
    NcclCall call(__func__);
    if (call.refused || !handle) return ncclSuccess;
    CommPtr comm = call.comm(handle);
    if (comm->last && !comm->last->finished)
        violation("NCCL-IN-USE", "%s: %s has not run", call.name, comm->last->what.c_str());
    for (auto &open : comm->world->open)
        for (auto &[channel, messages] : open)
            if (!messages.empty() && (std::get<0>(channel) == comm->rank || std::get<1>(channel) == comm->rank) &&
                !comm->world->ranks[std::get<0>(channel) == comm->rank ? std::get<1>(channel) : std::get<0>(channel)]->aborted)
                violation("NCCL-SIZE", "%s: a message from rank %d to rank %d has only one end", call.name, std::get<0>(channel),
                          std::get<1>(channel));
    end(comm, call.name);
    return call.injected_result;
}

// From now on ncclCommGetAsyncError says so, and nothing of the communicator runs any more until it is aborted.
EXPORT void standin_nccl_async_error(ncclComm_t handle, int code) {
    NcclCall call(__func__);
    call.comm(handle, true)->error = code;
}

// From now on ranks of one communicator may have one GPU, for worlds with more ranks than GPUs.
EXPORT void standin_nccl_share_gpus(void) {
    NcclCall call(__func__);
    shared_gpus = true;
}
