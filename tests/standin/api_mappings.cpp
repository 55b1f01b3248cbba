// Physical memory, address ranges, and what is mapped where: the virtual memory interface, as behind PyTorch's expandable segments.
//
// Arguments that do not fit are errors, as with the real driver. Violations are what a real one lets pass or only sometimes punishes:
// a use without access, an unmapping of what is in use or of a part, a handle released once too often. That the owner gives up memory
// which another process maps is no mistake for the real driver, which keeps it: here it is, as that process would read on what nobody
// writes any more.
#include "standin.h"
#include <cstring>
#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace standin {

constexpr uint64_t PAGE = 4096;
constexpr uint64_t MAGIC = 0x70616d6e61747321;
constexpr int POSIX_FILE_DESCRIPTOR = 1, PINNED = 1, DEVICE = 1, READ_WRITE = 3;
constexpr const char *NAME = "standin-physical";

// At the start of the file.
struct FileHeader {
    Header header;
    uint64_t magic;
    int32_t device, types; // device: its number in all processes
};
static_assert(sizeof(FileHeader) <= PAGE, "the header fits");

static uint64_t granularity() { return setting("STANDIN_GRANULARITY", 2 << 20); }
static bool fits(uint64_t number) { return number % granularity() == 0; }

// Descriptors of such files in this process that are not the driver's own.
uint64_t exported_descriptors() {
    uint64_t count = 0;
    DIR *list = opendir("/proc/self/fd");
    if (!list) return 0;
    while (dirent *each = readdir(list)) {
        char target[64] = "";
        if (readlinkat(dirfd(list), each->d_name, target, sizeof target - 1) > 0)
            count += strncmp(target, "/memfd:", 7) == 0 && strncmp(target + 7, NAME, strlen(NAME)) == 0;
    }
    closedir(list);
    for (auto &device : state().devices) count -= device->files;
    return count;
}

static PhysicalPtr physical_of(const Call &call, CUmemGenericAllocationHandle handle) {
    auto found = state().physicals.find(handle);
    if (found == state().physicals.end() || !found->second->handles)
        violation("BAD-HANDLE", "%s: 0x%llx is no handle of an allocation", call.name, handle);
    return found->second;
}

// The physical memory in a file of this device, with a handle to it.
static CUresult open_physical(int file, Device *device, uint64_t size, int types, bool imported, CUmemGenericAllocationHandle *out) {
    void *header = mmap(nullptr, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (header == MAP_FAILED) violation("NO-MEMORY", "mmap: %s", strerror(errno));
    auto physical = std::make_shared<Physical>(
        Physical{state().next_id++, size, device, file, types, static_cast<Header *>(header), imported, 1, 0});
    device->files++;
    *out = next_handle();
    state().physicals[*out] = physical;
    return CUDA_SUCCESS;
}

// Gives memory up that nothing refers to any more.
static void give_up(const char *call, CUmemGenericAllocationHandle handle, const PhysicalPtr &physical) {
    if (physical->handles || physical->mappings) return;
    if (physical->imported) {
        withdraw(physical->header);
    } else {
        if (!is_ok("STANDIN_UNMAPPED")) check_importers(call, physical->header);
        __atomic_store_n(&physical->header->freed, 1, __ATOMIC_RELEASE);
        physical->device->used -= physical->size;
    }
    munmap(physical->header, PAGE);
    close(physical->file);
    physical->device->files--;
    state().physicals.erase(handle);
}

static CUmemGenericAllocationHandle handle_of(const PhysicalPtr &physical) {
    for (auto &[handle, each] : state().physicals)
        if (each == physical) return handle;
    return 0;
}

// Calls `each` for all mappings of a range; whether they make it up without a gap, each of them whole.
static bool over_mappings(uint64_t address, uint64_t size, const std::function<void(const RegionPtr &)> &each) {
    std::vector<RegionPtr> list;
    for (uint64_t at = address; at < address + size; at += list.back()->size) {
        RegionPtr region = find_region(at);
        if (!region || region->kind != Kind::Mapped || region->base != at || region->size > address + size - at) return false;
        list.push_back(region);
    }
    for (const RegionPtr &region : list) each(region);
    return true;
}

} // namespace standin

using namespace standin;

EXPORT CUresult cuMemGetAllocationGranularity(size_t *out, const CUmemAllocationProp *prop, int) {
    BEGIN;
    if (prop->type != PINNED || prop->location.type != DEVICE) return CUDA_ERROR_NOT_SUPPORTED;
    if (!device_of(prop->location.id)) return CUDA_ERROR_INVALID_DEVICE;
    *out = granularity();
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemCreate(CUmemGenericAllocationHandle *out, size_t size, const CUmemAllocationProp *prop,
                            unsigned long long flags) {
    BEGIN;
    if (prop->type != PINNED || prop->location.type != DEVICE || (prop->requestedHandleTypes & ~POSIX_FILE_DESCRIPTOR))
        return CUDA_ERROR_NOT_SUPPORTED;
    Device *device = device_of(prop->location.id);
    if (!device) return CUDA_ERROR_INVALID_DEVICE;
    if (!size || !fits(size) || flags) return CUDA_ERROR_INVALID_VALUE;
    uint64_t most = setting("STANDIN_MEMORY_MB", 16384) << 20;
    if (size > most || device->used + size > most) return CUDA_ERROR_OUT_OF_MEMORY;
    int file = memfd_create(NAME, MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, static_cast<off_t>(PAGE + size)) != 0) violation("NO-MEMORY", "memfd: %s", strerror(errno));
    void *data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, PAGE);
    if (data == MAP_FAILED) violation("NO-MEMORY", "mmap: %s", strerror(errno));
    memset(data, 0xd5, size);
    munmap(data, size);
    device->used += size;
    CUresult error = open_physical(file, device, size, prop->requestedHandleTypes, false, out);
    auto *header = reinterpret_cast<FileHeader *>(state().physicals[*out]->header);
    *header = {Header{state().physicals[*out]->id, size, 0, {}}, MAGIC, device->physical, prop->requestedHandleTypes};
    return error;
}

EXPORT CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    BEGIN_RELEASE;
    PhysicalPtr physical = physical_of(call, handle);
    physical->handles--;
    give_up(call.name, handle, physical);
    return call.injected;
}

EXPORT CUresult cuMemAddressReserve(CUdeviceptr *out, size_t size, size_t alignment, CUdeviceptr, unsigned long long flags) {
    BEGIN;
    if (!size || !fits(size) || (alignment & (alignment - 1)) || alignment > granularity() || flags) return CUDA_ERROR_INVALID_VALUE;
    State &all = state();
    uint64_t start = (all.range + all.next_reserved + granularity() - 1) / granularity() * granularity();
    if (size > all.span || start + size + granularity() > all.range + all.span * (all.devices.size() + 1))
        return CUDA_ERROR_OUT_OF_MEMORY;
    all.next_reserved = start + size + granularity() - all.range; // a guard behind it
    all.reserved[start] = size;
    *out = start;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemAddressFree(CUdeviceptr address, size_t size) {
    BEGIN_RELEASE;
    auto found = state().reserved.find(address);
    if (found == state().reserved.end() || found->second != size)
        violation("UNKNOWN-MEMORY", "%s: %llu bytes at 0x%llx were not reserved", call.name, (unsigned long long)size, address);
    auto next = state().regions.lower_bound(address);
    if (next != state().regions.end() && next->first < address + size)
        violation("FREED-IN-USE", "%s: there is a mapping at 0x%llx", call.name, (unsigned long long)next->first);
    state().reserved.erase(found);
    state().graveyard[address] = size;
    return call.injected;
}

EXPORT CUresult cuMemMap(CUdeviceptr address, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
                         unsigned long long flags) {
    BEGIN;
    PhysicalPtr physical = physical_of(call, handle);
    State &all = state();
    auto range = all.reserved.upper_bound(address);
    if (range == all.reserved.begin() || size > all.span) return CUDA_ERROR_INVALID_VALUE;
    --range;
    bool inside = address + size <= range->first + range->second;
    if (!size || !fits(size) || !fits(address) || offset || flags || size > physical->size || !inside) return CUDA_ERROR_INVALID_VALUE;
    auto next = all.regions.lower_bound(address);
    if (find_region(address) || (next != all.regions.end() && next->first < address + size)) return CUDA_ERROR_INVALID_VALUE;
    auto region = std::make_shared<Region>();
    region->data = alias_of(address);
    void *mapped = mmap(region->data, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, physical->file, PAGE);
    if (mapped == MAP_FAILED) violation("NO-MEMORY", "mmap: %s", strerror(errno));
    madvise(mapped, size, MADV_DONTDUMP);
    region->id = all.next_id++;
    region->base = address;
    region->size = size;
    region->kind = Kind::Mapped;
    region->context = &physical->device->context;
    region->physical = physical;
    physical->mappings++;
    add_region(region);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemUnmap(CUdeviceptr address, size_t size) {
    BEGIN_RELEASE;
    bool whole = size && over_mappings(address, size, [&](const RegionPtr &region) {
        release_region(call.name, region, true);
        mmap(region->data, region->size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
        region->physical->mappings--;
        give_up(call.name, handle_of(region->physical), region->physical);
    });
    if (!whole)
        violation("UNKNOWN-MEMORY", "%s: %llu bytes at 0x%llx are not whole mappings", call.name, (unsigned long long)size, address);
    return call.injected;
}

EXPORT CUresult cuMemSetAccess(CUdeviceptr address, size_t size, const CUmemAccessDesc *list, size_t count) {
    BEGIN;
    for (size_t each = 0; each < count; each++) {
        if (list[each].location.type != DEVICE || !device_of(list[each].location.id)) return CUDA_ERROR_INVALID_DEVICE;
        // Of reading alone it is not said which memory can have it.
        if (list[each].flags && list[each].flags != READ_WRITE) return CUDA_ERROR_NOT_SUPPORTED;
    }
    bool reachable = true;
    auto check = [&](const RegionPtr &region) {
        for (size_t each = 0; each < count; each++)
            reachable = reachable && can_access(device_of(list[each].location.id), region->physical->device);
    };
    auto set = [&](const RegionPtr &region) {
        for (size_t each = 0; each < count; each++) {
            Device *device = device_of(list[each].location.id);
            if (list[each].flags) region->access.insert(device);
            else region->access.erase(device);
        }
    };
    if (!size || !over_mappings(address, size, check)) return CUDA_ERROR_INVALID_VALUE;
    if (!reachable) return CUDA_ERROR_INVALID_DEVICE;
    over_mappings(address, size, set);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle *out, void *address) {
    BEGIN;
    RegionPtr region = find_region(reinterpret_cast<uint64_t>(address));
    if (!region || region->kind != Kind::Mapped) return CUDA_ERROR_INVALID_VALUE;
    region->physical->handles++;
    *out = handle_of(region->physical);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemExportToShareableHandle(void *out, CUmemGenericAllocationHandle handle, int type, unsigned long long flags) {
    BEGIN;
    PhysicalPtr physical = physical_of(call, handle);
    if (type != POSIX_FILE_DESCRIPTOR || !(physical->types & type) || flags) return CUDA_ERROR_INVALID_VALUE;
    int file = fcntl(physical->file, F_DUPFD_CLOEXEC, 0);
    if (file < 0) return CUDA_ERROR_OUT_OF_MEMORY;
    memcpy(out, &file, sizeof file);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *out, void *shared, int type) {
    BEGIN;
    if (type != POSIX_FILE_DESCRIPTOR) return CUDA_ERROR_INVALID_VALUE;
    int given = static_cast<int>(reinterpret_cast<intptr_t>(shared));
    FileHeader header;
    struct stat theirs, ours;
    if (fstat(given, &theirs) != 0 || pread(given, &header, sizeof header, 0) != sizeof header || header.magic != MAGIC)
        return CUDA_ERROR_INVALID_VALUE;
    // Memory that this process has already is the same memory.
    for (auto &[handle, physical] : state().physicals)
        if (fstat(physical->file, &ours) == 0 && ours.st_dev == theirs.st_dev && ours.st_ino == theirs.st_ino) {
            physical->handles++;
            *out = handle;
            return CUDA_SUCCESS;
        }
    Device *home = nullptr;
    for (auto &device : state().devices)
        if (device->physical == header.device) home = device.get();
    if (!home || __atomic_load_n(&header.header.freed, __ATOMIC_ACQUIRE)) return CUDA_ERROR_INVALID_VALUE;
    int file = fcntl(given, F_DUPFD_CLOEXEC, 0);
    if (file < 0) return CUDA_ERROR_OUT_OF_MEMORY;
    CUresult error = open_physical(file, home, header.header.size, header.types, true, out);
    announce(state().physicals[*out]->header);
    return error;
}
