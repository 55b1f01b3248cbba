// Settings, messages, the count of calls, injected errors, and what is left over at the end.
#include "standin.h"
#include <cctype>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <unistd.h>

namespace standin {

static void say(const char *name, const char *details) {
    std::string line = std::string("standin: ") + name + ": " + details + "\n";
    if (write(2, line.data(), line.size()) < 0) return;
}

void violation(const char *name, const char *format, ...) {
    char details[2048];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(details, sizeof details, format, arguments);
    va_end(arguments);
    say(name, details);
    abort();
}

uint64_t setting(const char *name, uint64_t otherwise) {
    const char *text = getenv(name);
    return text && *text ? strtoull(text, nullptr, 0) : otherwise;
}

bool is_ok(const char *name) {
    const char *text = getenv(name);
    return text && !strcmp(text, "ok");
}

bool is_set(const char *name) { return setting(name, 0) != 0; }

// Never destroyed: threads may call until the very end.
State &state() {
    static State *all = new State;
    return *all;
}

// A number below `below`, from the seed (splitmix64).
uint64_t draw(uint64_t below) {
    uint64_t mixed = state().random += 0x9e3779b97f4a7c15;
    mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9;
    mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111eb;
    return (mixed ^ (mixed >> 31)) % below;
}

// What this library exports by that name; it may be built without some.
void *find_symbol(const char *name) {
    Dl_info self;
    void *library = nullptr;
    if (dladdr(reinterpret_cast<void *>(&find_symbol), &self)) library = dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (!library) return nullptr;
    void *found = dlsym(library, name);
    dlclose(library);
    return found;
}

// The error to come: from the `left`-th call on (of that name, where one is given), for one call or for all that follow.
struct Injection {
    uint64_t left = 0;
    CUresult code = CUDA_ERROR_UNKNOWN;
    std::string name;
    bool stays = false;
};
static Injection injection;

// STANDIN_FAIL: N, N:CODE, NAME:N or NAME:N:CODE.
static void read_injection() {
    const char *text = getenv("STANDIN_FAIL");
    if (!text || !*text) return;
    std::string rest = text;
    if (isalpha(rest[0])) {
        size_t colon = rest.find(':');
        injection.name = rest.substr(0, colon);
        rest = colon == std::string::npos ? "1" : rest.substr(colon + 1);
    }
    size_t colon = rest.find(':');
    injection.left = strtoull(rest.c_str(), nullptr, 0);
    if (colon != std::string::npos) injection.code = atoi(rest.c_str() + colon + 1);
}

static CUresult next_injected(const char *name) {
    if (!injection.left || (!injection.name.empty() && injection.name != name)) return 0;
    if (injection.left == 1 && injection.stays) return injection.code;
    return --injection.left ? 0 : injection.code;
}

Call::Call(const char *name) : name(name), lock(state().lock) {
    State &all = state();
    static bool read = (read_injection(), true);
    (void)read;
    if (all.finished) {
        refused = CUDA_ERROR_DEINITIALIZED;
        return;
    }
    if (!all.initialised && strcmp(name, "cuInit") != 0 && strncmp(name, "nccl", 4) != 0) {
        refused = CUDA_ERROR_NOT_INITIALIZED;
        return;
    }
    all.calls++;
    injected = next_injected(name);
}

Context *Call::context() {
    auto &stack = context_stack();
    if (stack.empty() || !stack.back()) violation("WRONG-CONTEXT", "%s: no context is current in this thread", name);
    if (!stack.back()->retained) violation("WRONG-CONTEXT", "%s: the current context was released by its last owner", name);
    return stack.back();
}

void Call::not_capturing(const StreamPtr &stream) {
    if (stream->capturing) violation("CAPTURING", "%s: stream %llu is being captured", name, (unsigned long long)stream->id);
}

struct Count {
    const char *one, *many;
    uint64_t count;
};

// Handles and memory that somebody has to give back.
static std::vector<Count> live() {
    State &all = state();
    Count device{"device allocation", "device allocations", 0}, pool{"pool allocation", "pool allocations", 0};
    Count pools{"memory pool", "memory pools", all.pools.size()};
    Count pinned{"pinned allocation", "pinned allocations", 0}, registered{"host registration", "host registrations", 0};
    Count mapped{"mapping", "mappings", 0}, handles{"handle of an allocation", "handles of allocations", 0};
    Count imports{"opened IPC handle", "opened IPC handles", 0}, retained{"retained context", "retained contexts", 0};
    for (auto &[base, region] : all.regions) {
        switch (region->kind) {
        case Kind::Device: device.count++; break;
        case Kind::Pool: pool.count += !region->freeing; break;
        case Kind::Import: imports.count += region->opened; break;
        case Kind::Mapped: mapped.count++; break;
        case Kind::Pinned: pinned.count++; break;
        case Kind::Registered: registered.count++; break;
        }
    }
    for (auto &[handle, physical] : all.physicals) handles.count += physical->handles;
    Count reserved{"address range", "address ranges", all.reserved.size()};
    Count descriptors{"descriptor of an allocation", "descriptors of allocations", exported_descriptors()};
    for (auto &device : all.devices) retained.count += device->context.retained;
    Count streams{"stream", "streams", all.stream_handles.size()}, events{"event", "events", all.events.size()};
    Count modules{"module", "modules", all.modules.size()};
    Count graphs{"graph", "graphs", all.graphs.size() + all.execs.size()};
    Count communicators{"communicator", "communicators", all.communicators};
    return {device, pool, pools, pinned, registered, imports, mapped, handles, reserved, descriptors, streams, events, modules, graphs, communicators, retained};
}

__attribute__((destructor)) static void at_exit() {
    State &all = state();
    std::string leaks;
    {
        std::unique_lock<std::mutex> lock(all.lock);
        if (!all.initialised || all.owner != getpid()) return;
        // A device would finish by itself; what can never run is left over.
        uint64_t left = run_all();
        all.finished = true;
        auto counts = live();
        counts.push_back({"operation that cannot run", "operations that cannot run", left});
        for (const Count &each : counts) {
            if (!each.count) continue;
            leaks += (leaks.empty() ? "" : ", ") + std::to_string(each.count) + " " + (each.count == 1 ? each.one : each.many);
        }
    }
    if (leaks.empty() || is_ok("STANDIN_LEAKS")) return;
    say("LEAK", leaks.c_str());
    _exit(99);
}

} // namespace standin

using namespace standin;

// What the tests ask of the stand-in itself.
EXPORT uint64_t standin_live(void) {
    std::unique_lock<std::mutex> lock(state().lock);
    uint64_t sum = 0;
    for (const Count &each : live()) sum += each.count;
    return sum;
}

EXPORT uint64_t standin_pending(void) {
    std::unique_lock<std::mutex> lock(state().lock);
    return pending_operations();
}

EXPORT uint64_t standin_calls(void) {
    std::unique_lock<std::mutex> lock(state().lock);
    return state().calls;
}

EXPORT uint64_t standin_launches(void) {
    std::unique_lock<std::mutex> lock(state().lock);
    return state().launches;
}

// The n-th call from now fails with `code` (0: CUDA_ERROR_UNKNOWN); n = 0: none does.
EXPORT void standin_fail_at(uint64_t n, int code) {
    std::unique_lock<std::mutex> lock(state().lock);
    injection = {n, code ? code : static_cast<int>(CUDA_ERROR_UNKNOWN), "", false};
}

// The n-th call from now and all after it, as when a device is lost.
EXPORT void standin_fail_from(uint64_t n, int code) {
    std::unique_lock<std::mutex> lock(state().lock);
    injection = {n, code ? code : static_cast<int>(CUDA_ERROR_UNKNOWN), "", true};
}

// The same, counting the calls of one function.
EXPORT void standin_fail_in(const char *name, uint64_t n, int code) {
    std::unique_lock<std::mutex> lock(state().lock);
    injection = {n, code ? code : static_cast<int>(CUDA_ERROR_UNKNOWN), name, false};
}

// Starts the schedule's draws over from a seed.
EXPORT void standin_seed(uint64_t seed) {
    std::unique_lock<std::mutex> lock(state().lock);
    state().random = seed;
}
