// Device memory: address ranges that no host instruction can touch, and what an operation may reach.
//
// The addresses of all devices are one reservation without access. The bytes lie in one memory file for each device, mapped a
// second time, writable, at a constant distance: the alias, known to the driver alone. Addresses are never given out twice, unless
// STANDIN_REUSE asks for just that.
#include "standin.h"
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

namespace standin {

constexpr uint64_t PAGE = 4096;
constexpr unsigned char POISON = 0xd5;

static uint64_t range_start, range_end; // for the signal handler
static struct sigaction earlier_handler;

static void on_fault(int signal, siginfo_t *info, void *machine) {
    uint64_t address = reinterpret_cast<uint64_t>(info->si_addr);
    if (address >= range_start && address < range_end) {
        char line[128];
        int length = snprintf(line, sizeof line, "standin: HOST-ACCESS: host code touches device memory at 0x%llx\n",
                              static_cast<unsigned long long>(address));
        if (write(2, line, length) < 0) _exit(98);
        abort();
    }
    if (earlier_handler.sa_flags & SA_SIGINFO) return earlier_handler.sa_sigaction(signal, info, machine);
    // Plain, ignored or none: the instruction is tried again and meets it.
    sigaction(SIGSEGV, &earlier_handler, nullptr);
}

static uint64_t map(uint64_t at, uint64_t bytes, int access, int flags, int file, uint64_t offset) {
    void *mapped = mmap(reinterpret_cast<void *>(at), bytes, access, flags | MAP_NORESERVE, file, static_cast<off_t>(offset));
    if (mapped == MAP_FAILED) violation("NO-MEMORY", "mmap of %llu bytes: %s", (unsigned long long)bytes, strerror(errno));
    madvise(mapped, bytes, MADV_DONTDUMP);
    return reinterpret_cast<uint64_t>(mapped);
}

void reserve_ranges() {
    State &all = state();
    if (all.devices.empty()) return;
    all.span = 1ull << 38;
    uint64_t bytes = all.span * (all.devices.size() + 1);
    all.next_reserved = all.span * all.devices.size();
    all.range = map(0, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    all.alias = map(0, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (auto &device : all.devices) {
        device->memory = memfd_create("standin-device", MFD_CLOEXEC);
        if (device->memory < 0 || ftruncate(device->memory, static_cast<off_t>(all.span)) != 0)
            violation("NO-MEMORY", "memfd_create: %s", strerror(errno));
        map(all.alias + all.span * device->ordinal, all.span, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, device->memory, 0);
    }
    range_start = all.range;
    range_end = all.range + bytes;
    struct sigaction ours = {};
    ours.sa_sigaction = on_fault;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &ours, &earlier_handler);
}

bool in_device_range(uint64_t address) {
    State &all = state();
    return address >= all.range && address < all.range + all.span * (all.devices.size() + 1);
}

RegionPtr find_region(uint64_t address) {
    auto &regions = state().regions;
    auto next = regions.upper_bound(address);
    if (next == regions.begin()) return nullptr;
    auto region = std::prev(next)->second;
    return address < region->base + region->size ? region : nullptr;
}

// Address of so many fresh pages of a device's range, one of a guard behind them.
uint64_t take_pages(Device *device, uint64_t pages) {
    State &all = state();
    uint64_t page = all.range + all.span * device->ordinal + device->next;
    device->next += (pages + 1) * PAGE;
    if (device->next > all.span) violation("NO-MEMORY", "all addresses of device %d were given out", device->ordinal);
    return page;
}

unsigned char *alias_of(uint64_t address) {
    return reinterpret_cast<unsigned char *>(address - state().range + state().alias);
}

Header *header_of(const Region &region) { return reinterpret_cast<Header *>(alias_of(region.page)); }

// With STANDIN_REUSE: pages of that size that were given back last, so that a stale address meets somebody else's memory.
static std::map<std::pair<Device *, uint64_t>, std::vector<uint64_t>> reusable;

void add_region(RegionPtr region) {
    auto &dead = state().graveyard;
    dead.erase(dead.lower_bound(region->base), dead.lower_bound(region->base + region->size));
    state().regions[region->base] = region;
}

RegionPtr device_alloc(Context *context, uint64_t size, Kind kind, CUresult *error) {
    State &all = state();
    Device *device = context->device;
    *error = CUDA_ERROR_INVALID_VALUE;
    if (size == 0) return nullptr;
    *error = CUDA_ERROR_OUT_OF_MEMORY;
    uint64_t most = setting("STANDIN_MEMORY_MB", 16384) << 20;
    if (size > most || device->used + size > most) return nullptr;
    *error = CUDA_SUCCESS;
    auto region = std::make_shared<Region>();
    region->pages = (HEADER + size + PAGE - 1) / PAGE;
    auto &again = reusable[{device, region->pages}];
    if (is_set("STANDIN_REUSE") && !again.empty()) {
        region->page = again.back();
        again.pop_back();
    } else {
        region->page = take_pages(device, region->pages);
    }
    region->id = all.next_id++;
    region->base = region->page + HEADER;
    region->size = size;
    region->kind = kind;
    region->context = context;
    region->data = alias_of(region->base);
    memset(region->data, POISON, region->pages * PAGE - HEADER);
    *header_of(*region) = Header{region->id, size, 0, {}};
    device->used += size;
    add_region(region);
    return region;
}

// Whether a process that says it maps our memory still lives: one that was killed takes nothing back.
bool process_lives(int32_t process) {
    char path[64], text[512] = "";
    snprintf(path, sizeof path, "/proc/%d/stat", process);
    FILE *file = fopen(path, "r");
    if (!file) return false;
    size_t length = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[length] = 0;
    const char *name_end = strrchr(text, ')');
    return name_end && name_end[1] && name_end[2] != 'Z' && name_end[2] != 'X';
}

void check_importers(const char *call, const Header *header) {
    for (const int32_t &process : header->importers) {
        int32_t id = __atomic_load_n(&process, __ATOMIC_ACQUIRE);
        if (id && process_lives(id))
            violation("FREED-WHILE-IMPORTED", "%s: %llu bytes are open in process %d", call, (unsigned long long)header->size, id);
    }
}

// Writes this process into the allocation's header, where nobody is or who is dead.
void announce(Header *header) {
    for (int32_t &slot : header->importers) {
        int32_t expected = __atomic_load_n(&slot, __ATOMIC_ACQUIRE);
        if (expected && process_lives(expected)) continue;
        if (__atomic_compare_exchange_n(&slot, &expected, getpid(), false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) return;
    }
    violation("NO-MEMORY", "more than 32 processes import one allocation");
}

void withdraw(Header *header) {
    for (int32_t &slot : header->importers) {
        int32_t expected = getpid();
        if (__atomic_compare_exchange_n(&slot, &expected, 0, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) return;
    }
}

// Takes memory out of use. With `know`, the host must know that all that used it is finished.
void release_region(const char *call, const RegionPtr &region, bool know) {
    State &all = state();
    if (const Access *use = know ? region->shadow.unknown_to(all.host) : nullptr)
        violation("FREED-IN-USE", "%s: the host has not waited for %s, which uses the memory", call, use->note->text().c_str());
    all.regions.erase(region->base);
    all.words.erase(all.words.lower_bound(region->base), all.words.lower_bound(region->base + region->size));
    if (!region->on_device()) return;
    all.graveyard[region->base] = region->size;
    if (region->kind == Kind::Import || region->kind == Kind::Mapped) return;
    Device *device = region->context->device;
    check_importers(call, header_of(*region));
    __atomic_store_n(&header_of(*region)->freed, 1, __ATOMIC_RELEASE);
    device->used -= region->size;
    // The first page stays: importers may still look at its header.
    memset(region->data, POISON, PAGE - HEADER);
    uint64_t start = region->page - all.range - all.span * device->ordinal;
    if (region->pages > 1)
        fallocate(device->memory, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(start + PAGE),
                  static_cast<off_t>((region->pages - 1) * PAGE));
    reusable[{device, region->pages}].push_back(region->page);
}

// Says what is wrong with an address that no region holds, or not whole.
[[noreturn]] static void unknown(const std::string &who, const char *does, uint64_t address, uint64_t bytes) {
    char start[256];
    snprintf(start, sizeof start, "%s %s %llu bytes at 0x%llx", who.c_str(), does, (unsigned long long)bytes,
             (unsigned long long)address);
    if (RegionPtr region = find_region(address))
        violation(region->on_device() ? "UNKNOWN-MEMORY" : "UNREGISTERED-HOST", "%s, past the end of %llu bytes at 0x%llx", start,
                  (unsigned long long)region->size, (unsigned long long)region->base);
    auto &dead = state().graveyard;
    auto next = dead.upper_bound(address);
    if (next != dead.begin() && address < std::prev(next)->first + std::prev(next)->second)
        violation("UNKNOWN-MEMORY", "%s, within %llu bytes at 0x%llx that were freed", start,
                  (unsigned long long)std::prev(next)->second, (unsigned long long)std::prev(next)->first);
    if (in_device_range(address)) violation("UNKNOWN-MEMORY", "%s, where nothing is allocated", start);
    violation("UNREGISTERED-HOST", "%s, host memory that was neither registered nor allocated by the driver", start);
}

bool over_regions(uint64_t address, uint64_t bytes, const Part &each) {
    RegionPtr region = find_region(address);
    if (!region) return false;
    while (true) {
        uint64_t offset = address - region->base, part = std::min(bytes, region->size - offset);
        each(*region, offset, part);
        if (part == bytes) return true;
        address += part, bytes -= part;
        // Of other memory each allocation stands for itself.
        RegionPtr next = find_region(address);
        if (!next || region->kind != Kind::Mapped || next->kind != Kind::Mapped) return false;
        region = next;
    }
}

void check_range(const Call &call, uint64_t address, uint64_t bytes, const char *what) {
    if (!over_regions(address, bytes, [](Region &, uint64_t, uint64_t) {})) unknown(call.name, what, address, bytes);
}

RegionPtr start_of(const Call &call, uint64_t address) {
    RegionPtr region = find_region(address);
    if (!region) check_range(call, address, 1, "frees");
    if (region->base != address)
        violation("UNKNOWN-MEMORY", "%s: 0x%llx lies within an allocation, it is not its start", call.name,
                  (unsigned long long)address);
    return region;
}

unsigned char *reach(const Running &running, uint64_t address, uint64_t bytes, const char *does, RegionPtr *found) {
    auto complain = [&](const char *name, const char *why) {
        violation(name, "%s %s %llu bytes at 0x%llx, %s", running.access.note->text().c_str(), does, (unsigned long long)bytes,
                  (unsigned long long)address, why);
    };
    const Device *user = running.context->device;
    auto may = [&](Region &region, uint64_t, uint64_t) {
        if (!region.allocated) complain("UNKNOWN-MEMORY", "which the stream that allocates them has not done yet");
        if (region.kind == Kind::Mapped) {
            if (!region.access.count(user)) complain("NO-ACCESS", "mapped memory that cuMemSetAccess has not opened to its device");
        } else if (region.on_device()) {
            const Device *home = region.context->device;
            bool peer = region.kind == Kind::Pool ? region.pool->access.count(user) : running.context->peers.count(home);
            if (user != home && !peer && !running.any_device)
                complain("NO-PEER-ACCESS", "memory of another device, to which its context has no access");
        }
    };
    if (!over_regions(address, bytes, may)) unknown(running.access.note->text(), does, address, bytes);
    RegionPtr region = find_region(address);
    if (found) *found = region;
    // Mappings that meet also meet where the driver sees them.
    return region->data + (address - region->base);
}

// Notes a whole range as read or written by the running operation, which can reach it.
void touch(const Running &running, uint64_t address, uint64_t bytes, bool writes) {
    over_regions(address, bytes, [&](Region &region, uint64_t low, uint64_t part) {
        if (writes)
            region.shadow.write(low, low + part, running.access, *running.clock);
        else
            region.shadow.read(low, low + part, running.access, *running.clock);
    });
}

} // namespace standin
