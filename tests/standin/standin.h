// A driver for tests: the CUDA driver interface over host memory, stricter than the real one. See README.md for what it watches.
//
// One lock guards everything in here. It is never held while a call sleeps. Functions that want the lock held take `Call &` or are
// called from one that has it. The stand-in NCCL, a library of its own, uses these functions and this lock too.
#pragma once
#include "cuda_types.h"
#include "races.h"
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

namespace standin __attribute__((visibility("default"))) {

// Prints `standin: NAME: details` and aborts.
[[noreturn]] void violation(const char *name, const char *format, ...) __attribute__((format(printf, 2, 3)));
uint64_t setting(const char *name, uint64_t otherwise);
bool is_set(const char *name);
bool is_ok(const char *name); // "ok": a violation that the test asks to let pass

struct Device;
struct Header;
struct Context;
struct Stream;
struct Module;
using StreamPtr = std::shared_ptr<Stream>;

// What a finished operation leaves behind: what later ones wait for, and what those who waited know.
struct Record {
    bool done = false;
    Clock clock;
    Stream *stream; // valid until done
};
using RecordPtr = std::shared_ptr<Record>;

// An operation while it runs.
struct Running {
    Stream *stream;
    Context *context;
    Access access;
    const Clock *clock;
    bool any_device = false; // reaches the memory of devices to which its context has no access
    const std::string &name() const { return access.note->what; }
};
using Work = std::function<void(Running &)>;

struct Op {
    NotePtr note;
    Clock host;                   // what the host knew when it enqueued this
    std::vector<RecordPtr> after; // beyond what is before it in its own stream
    std::function<bool()> ready;  // none: always
    Work work;
    const char *stuck = "DEADLOCK"; // what it is where it never gets ready
    Module *module = nullptr;
    RecordPtr finished;
};

// What a captured graph runs, in the order of the calls; `after` counts in the same list.
struct Node {
    Op op;
    std::vector<size_t> after;
    Stream *lane;
};

struct Graph {
    Context *context;
    StreamPtr origin;
    int mode = 0;             // 0: global, 1: of the thread, 2: relaxed
    const void *thread;       // that began
    bool open = true;
    std::vector<Node> nodes;
    std::map<Stream *, std::vector<size_t>> ends; // what the next node of each captured stream comes after
    std::vector<StreamPtr> lanes;                 // those streams
};
using GraphPtr = std::shared_ptr<Graph>;

struct GraphExec {
    GraphPtr graph;
    RecordPtr last; // of its latest launch
};

struct Stream {
    uint64_t id;
    uint32_t slot; // in clocks
    Context *context;
    unsigned flags;
    int priority;
    bool destroyed = false; // the handle is gone; what is queued still runs
    int capturing = 0;
    GraphPtr capture;
    uint64_t enqueued = 0;
    std::deque<Op> queue;
    RecordPtr last; // of the operation enqueued last
    Clock clock;    // of the operation run last
};

struct Event {
    Context *context;
    unsigned flags;
    RecordPtr record; // none: never recorded
    GraphPtr capture; // recorded while its stream was captured, after these nodes
    std::vector<size_t> nodes;
};

struct Context {
    Device *device;
    unsigned retained = 0;
    unsigned flags = 0;
    std::set<const Device *> peers; // whose memory its kernels may touch
    StreamPtr legacy;               // the NULL stream
};

// Where stream-ordered memory comes from. Its handle is its address.
struct Pool {
    Device *device;
    std::set<const Device *> access = {}; // who may touch its memory, beyond its own device
};
using PoolPtr = std::shared_ptr<Pool>;

struct Device {
    int ordinal;  // as this process sees it
    int physical; // the same in all processes
    int memory = -1;
    uint64_t next = 0; // first free byte of its range
    uint64_t used = 0;
    uint64_t files = 0; // of physical memory that are open
    PoolPtr pool;      // the default one
    Context context;
};

enum class Kind { Device, Pool, Import, Mapped, Pinned, Registered };

// What cuMemCreate makes, or an import of it. It lies in a memory file of its own, whose descriptor is all that another process needs;
// the file begins with a page that holds its header. There until nothing refers to it and nothing maps it.
struct Physical {
    uint64_t id, size;
    Device *device;
    int file, types; // types: of handles for which it was made
    Header *header;
    bool imported;
    unsigned handles, mappings;
};
using PhysicalPtr = std::shared_ptr<Physical>;

// Memory that operations may touch. Operations reach `base` at `data`.
struct Region {
    uint64_t id, base, size;
    Kind kind;
    Context *context;
    unsigned char *data;
    bool allocated = true; // pool memory: its allocation has run
    bool freeing = false;  // pool memory: its release is enqueued
    uint64_t page = 0, pages = 0;   // its pages within all devices' range
    unsigned opened = 0;            // imports: how often
    uint64_t owner = 0, remote = 0; // imports: whose, and its number there
    PoolPtr pool;                   // pool memory: whose
    PhysicalPtr physical;           // mapped: what is there
    std::set<const Device *> access; // mapped: who may touch it
    Shadow shadow;
    bool on_device() const { return kind == Kind::Device || kind == Kind::Pool || kind == Kind::Import || kind == Kind::Mapped; }
};
using RegionPtr = std::shared_ptr<Region>;

// At the start of the first page of every device allocation, seen by the processes that map it.
struct Header {
    uint64_t id;
    uint64_t size;
    uint32_t freed;
    int32_t importers[32]; // process ids, 0: none
};
constexpr uint64_t HEADER = 256; // the allocation starts behind it, aligned to this and to no more
static_assert(sizeof(Header) <= HEADER, "the header fits");

struct Function {
    std::string name;
    std::vector<unsigned> params; // bytes of each
    unsigned static_shared = 0;
    unsigned max_threads = 1024;
    unsigned dynamic_shared = 0; // allowed by cuFuncSetAttribute, beyond the usual
    Module *module;
};

struct Module {
    Context *context;
    std::string ptx;
    std::vector<std::unique_ptr<Function>> functions;
};

struct State {
    std::mutex lock;
    bool initialised = false, finished = false;
    int owner = 0; // the process that initialised
    std::vector<std::unique_ptr<Device>> devices;
    uint64_t range = 0, alias = 0, span = 0; // device addresses; where the driver itself sees them; bytes of each device
    std::map<uint64_t, RegionPtr> regions;   // by base
    std::map<uint64_t, uint64_t> graveyard;  // base to size of what was freed
    std::map<uint64_t, uint64_t> reserved;   // addresses for mappings: base to size
    uint64_t next_reserved = 0;              // they have a range of their own, behind the devices'
    std::unordered_map<uint64_t, PhysicalPtr> physicals; // by handle
    std::set<PoolPtr> pools;                             // that were made
    std::vector<StreamPtr> streams;          // all that live or have work
    std::unordered_map<uint64_t, StreamPtr> stream_handles;
    std::unordered_map<uint64_t, Event> events;
    std::unordered_map<uint64_t, std::unique_ptr<Module>> modules;
    std::unordered_map<uint64_t, Function *> functions;
    std::unordered_map<uint64_t, GraphPtr> graphs;
    std::unordered_map<uint64_t, GraphExec> execs;
    uint64_t next_handle = 0x5a0000000000, next_id = 1, next_stream = 1;
    std::vector<uint32_t> ticks; // of each slot
    std::vector<uint32_t> free_slots;
    Clock host; // what the host knows to be finished
    struct Word {
        uint64_t value;
        Clock clock;
    };
    std::map<uint64_t, Word> words; // that operations wrote
    uint64_t random = 1;
    uint64_t calls = 0, launches = 0, steps = 0;
    uint64_t communicators = 0; // of NCCL that somebody has to give back
};
State &state();
uint64_t draw(uint64_t below);
void *find_symbol(const char *name);

// One call of the interface: takes the lock, counts, and may be told to fail.
class Call {
  public:
    explicit Call(const char *name);
    const char *name;
    std::unique_lock<std::mutex> lock;
    CUresult refused = 0;  // not initialised: returns at once
    CUresult injected = 0; // what it is to return; releasing calls do their work all the same, as real ones do
    Context *context();    // the current one; none is a violation
    void not_capturing(const StreamPtr &stream);
    void safe_in_capture(); // for calls that a capture in progress forbids
};
#define BEGIN                                                                                                                    \
    standin::Call call(__func__);                                                                                                \
    if (call.refused || call.injected) return call.refused ? call.refused : call.injected
#define BEGIN_RELEASE                                                                                                            \
    standin::Call call(__func__);                                                                                                \
    if (call.refused) return call.refused

// contexts.cpp
std::vector<Context *> &context_stack();
Context *context_of(const char *call, CUcontext handle);
Device *device_of(CUdevice ordinal);
bool can_access(const Device *from, const Device *to);

// memory.cpp
void reserve_ranges();
bool in_device_range(uint64_t address);
RegionPtr find_region(uint64_t address);
RegionPtr device_alloc(Context *context, uint64_t size, Kind kind, CUresult *error);
void add_region(RegionPtr region);
void release_region(const char *call, const RegionPtr &region, bool know);
uint64_t take_pages(Device *device, uint64_t pages);
unsigned char *alias_of(uint64_t address);
Header *header_of(const Region &region);
bool process_lives(int32_t process);
// Writes this process into the header of memory that another one made, or takes it out again.
void announce(Header *header);
void withdraw(Header *header);
void check_importers(const char *call, const Header *header);
// Where the regions that hold a range meet without a gap, calls `each(region, offset in it, bytes)`; whether they hold all of it.
using Part = std::function<void(Region &, uint64_t, uint64_t)>;
bool over_regions(uint64_t address, uint64_t bytes, const Part &each);
// The driver's pointer to memory that the running operation may touch; everything else is a violation.
unsigned char *reach(const Running &running, uint64_t address, uint64_t bytes, const char *does, RegionPtr *found = nullptr);
void touch(const Running &running, uint64_t address, uint64_t bytes, bool writes);
// As an argument of a call: known memory, whole.
void check_range(const Call &call, uint64_t address, uint64_t bytes, const char *what);
// What begins at an address, to be given back.
RegionPtr start_of(const Call &call, uint64_t address);

// api_mappings.cpp
uint64_t exported_descriptors();

// schedule.cpp
StreamPtr new_stream(Context *context, unsigned flags, int priority);
uint64_t next_handle();
StreamPtr stream_of(Call &call, CUstream handle, bool of_current_context = true);
// Appends an operation. `more` may add what it waits for.
RecordPtr enqueue(Call &call, const StreamPtr &stream, std::string what, Work work, const std::function<void(Op &)> &more = {});
// The stream's handle is gone; its slot is free once its work is done.
void retire(const StreamPtr &stream);
// What a query does: lets a few operations run, perhaps none. Whether those of the record are done; the host knows it then.
bool query(const RecordPtr &record);
void wait_until(Call &call, const std::vector<RecordPtr> &records);
uint64_t pending_operations();
// Runs all that can run; how many operations cannot.
uint64_t run_all();
Event &event_of(Call &call, CUevent handle);
bool module_in_use(const Module *module);

// graphs.cpp
void capture(Call &call, const StreamPtr &stream, Op op);
void capture_record(Event &event, const StreamPtr &stream);
CUresult capture_wait(Call &call, const StreamPtr &stream, const Event &event);
bool graph_uses(const Module *module);

// kernels.cpp
struct Launch {
    unsigned grid[3], block[3], shared;
    void *const *params;
};
struct Kernel {
    const char *name;
    std::vector<unsigned> params;
    bool writes_once; // no byte is written twice, or read and written, by one launch: its blocks run in any order
    void (*run)(const Launch &launch);
};
const Kernel *find_kernel(const std::string &name);
void run_kernel(Running &running, const Kernel &kernel, const Launch &launch);

// ptx.cpp
CUresult load_ptx(const char *text, Module &module);

} // namespace standin
