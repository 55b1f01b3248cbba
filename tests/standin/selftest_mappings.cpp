// Physical memory, address ranges and mappings, in one process and between two.
#include "selftest.h"
#include <csignal>
#include <fcntl.h>
#include <sys/wait.h>

static const size_t PIECE = 2 << 20; // the granularity

static CUmemAllocationProp prop(int types = 1, int device = 0) {
    CUmemAllocationProp prop = {};
    prop.type = 1, prop.requestedHandleTypes = types, prop.location = {1, device};
    return prop;
}

static CUmemGenericAllocationHandle create(size_t size = PIECE, int types = 1, int device = 0) {
    CUmemGenericAllocationHandle handle;
    CUmemAllocationProp wanted = prop(types, device);
    OK(cuMemCreate(&handle, size, &wanted, 0));
    return handle;
}

static void open_to(CUdeviceptr at, size_t size, int device) {
    CUmemAccessDesc access = {{1, device}, 3};
    OK(cuMemSetAccess(at, size, &access, 1));
}

// Pieces of one range, one behind the other.
struct Range {
    CUdeviceptr at;
    size_t size = 0;
    std::vector<size_t> sizes;
    explicit Range(std::vector<size_t> sizes, int types = 1, int device = 0) : sizes(sizes) {
        for (size_t piece : sizes) size += piece;
        OK(cuMemAddressReserve(&at, size, 0, 0, 0));
        size_t end = 0;
        for (size_t piece : sizes) {
            CUmemGenericAllocationHandle handle = create(piece, types, device);
            OK(cuMemMap(at + end, piece, 0, handle, 0));
            OK(cuMemRelease(handle)); // the mapping keeps it
            end += piece;
        }
    }
    ~Range() {
        OK(cuMemUnmap(at, size));
        OK(cuMemAddressFree(at, size));
    }
};

static void fill(CUdeviceptr at, size_t bytes) {
    OK(cuMemsetD8Async(at, 7, bytes, nullptr));
    OK(cuStreamSynchronize(nullptr));
}

static void mappings() {
    Device device;
    uint64_t before = standin_live();
    {
        Range range({PIECE, 3 * PIECE});
        open_to(range.at, range.size, 0);
        HOLDS(words_at(range.at, 1)[0] == 0xd5d5d5d5);
        fill(range.at + PIECE - 100, 200); // lies in both
        HOLDS(words_at(range.at + PIECE - 4, 2)[1] == 0x07070707);
        Memory memory(200);
        OK(cuMemcpyAsync(memory.at, range.at + PIECE - 100, 200, nullptr));
        HOLDS(words_at(memory.at, 50)[49] == 0x07070707);
        uint64_t size = 0, start = 0, block[2] = {}, types = 0, capable = 9;
        int kinds[] = {18, 19, 20, 14, 10};
        void *out[] = {&size, &start, &block[0], &types, &capable};
        OK(cuPointerGetAttributes(5, kinds, out, range.at + PIECE + 5));
        HOLDS(start == range.at + PIECE && size == 3 * PIECE && types == 1 && !static_cast<unsigned>(capable));
        OK(cuPointerGetAttribute(&block[1], 20, range.at));
        HOLDS(block[0] != block[1]);
        CUmemGenericAllocationHandle first, second;
        OK(cuMemRetainAllocationHandle(&first, reinterpret_cast<void *>(range.at)));
        OK(cuMemRetainAllocationHandle(&second, reinterpret_cast<void *>(range.at + PIECE - 1)));
        HOLDS(first == second);
        OK(cuMemRelease(first));
        OK(cuMemRelease(second));
        GIVES(CUDA_ERROR_INVALID_VALUE, cuMemRetainAllocationHandle(&first, reinterpret_cast<void *>(memory.at)));
        CUipcMemHandle handle;
        GIVES(CUDA_ERROR_INVALID_VALUE, cuIpcGetMemHandle(&handle, range.at));
    }
    HOLDS(standin_live() == before);
}

static void arguments_that_do_not_fit() {
    Device device;
    CUmemGenericAllocationHandle handle = create(), hidden = create(PIECE, 0), none;
    CUdeviceptr at;
    CUmemAllocationProp wanted = prop(), odd = prop(8), nowhere = prop(1, 77);
    size_t granularity = 0;
    OK(cuMemGetAllocationGranularity(&granularity, &wanted, 0));
    HOLDS(granularity == PIECE);
    GIVES(CUDA_ERROR_INVALID_VALUE, cuMemCreate(&none, PIECE + 4096, &wanted, 0));
    GIVES(CUDA_ERROR_NOT_SUPPORTED, cuMemCreate(&none, PIECE, &odd, 0));
    GIVES(CUDA_ERROR_INVALID_DEVICE, cuMemCreate(&none, PIECE, &nowhere, 0));
    GIVES(CUDA_ERROR_OUT_OF_MEMORY, cuMemCreate(&none, 1ull << 40, &wanted, 0));
    GIVES(CUDA_ERROR_INVALID_VALUE, cuMemAddressReserve(&at, PIECE + 4096, 0, 0, 0));
    GIVES(CUDA_ERROR_OUT_OF_MEMORY, cuMemAddressReserve(&at, 1ull << 60, 0, 0, 0));
    OK(cuMemAddressReserve(&at, 2 * PIECE, 0, 0, 0));
    GIVES(CUDA_ERROR_INVALID_VALUE, cuMemMap(at, 2 * PIECE, 0, handle, 0)); // more than there is
    GIVES(CUDA_ERROR_INVALID_VALUE, cuMemMap(at + 4096, PIECE, 0, handle, 0));
    GIVES(CUDA_ERROR_INVALID_VALUE, cuMemMap(at, PIECE / 2, 0, handle, 0));
    GIVES(CUDA_ERROR_INVALID_VALUE, cuMemMap(at, PIECE, PIECE, handle, 0));
    GIVES(CUDA_ERROR_INVALID_VALUE, cuMemMap(at + 2 * PIECE, PIECE, 0, handle, 0)); // not reserved
    OK(cuMemMap(at, PIECE, 0, handle, 0));
    GIVES(CUDA_ERROR_INVALID_VALUE, cuMemMap(at, PIECE, 0, hidden, 0)); // taken
    CUmemAccessDesc access = {{1, 0}, 3}, reading = {{1, 0}, 1};
    GIVES(CUDA_ERROR_INVALID_VALUE, cuMemSetAccess(at, 2 * PIECE, &access, 1)); // not all mapped
    GIVES(CUDA_ERROR_NOT_SUPPORTED, cuMemSetAccess(at, PIECE, &reading, 1));
    int file = -1;
    GIVES(CUDA_ERROR_INVALID_VALUE, cuMemExportToShareableHandle(&file, hidden, 1, 0));
    GIVES(CUDA_ERROR_INVALID_VALUE, cuMemImportFromShareableHandle(&none, reinterpret_cast<void *>(0), 1)); // of another kind
    // Another handle to the same memory, by way of a descriptor.
    OK(cuMemExportToShareableHandle(&file, handle, 1, 0));
    OK(cuMemImportFromShareableHandle(&none, reinterpret_cast<void *>(static_cast<intptr_t>(file)), 1));
    HOLDS(none == handle);
    close(file);
    OK(cuMemRelease(none));
    OK(cuMemUnmap(at, PIECE));
    OK(cuMemAddressFree(at, 2 * PIECE));
    OK(cuMemRelease(handle));
    OK(cuMemRelease(hidden));
}

static void no_access() {
    Device device;
    Range range({PIECE});
    fill(range.at, 4);
}

static void access_to_a_part() {
    Device device;
    Range range({PIECE, PIECE});
    open_to(range.at, PIECE, 0);
    fill(range.at + PIECE - 4, 8);
}

static void access_of_another_device() {
    Device first(0), second(1);
    Range range({PIECE});
    open_to(range.at, PIECE, 0);
    OK(cuCtxEnablePeerAccess(first.context, 0)); // says nothing about mappings
    Kernel kernel;
    kernel.run(nullptr, range.at, 0, 1, 1);
    OK(cuStreamSynchronize(nullptr));
}

static void a_peer_may() {
    Device first(0), second(1);
    Range range({PIECE}, 1, 0);
    open_to(range.at, PIECE, 1);
    fill(range.at, 4);
}

static void a_stranger_may_not() {
    Device first(0), second(1);
    Range range({PIECE}, 1, 0);
    CUmemAccessDesc access = {{1, 1}, 3};
    GIVES(CUDA_ERROR_INVALID_DEVICE, cuMemSetAccess(range.at, PIECE, &access, 1));
}

static void past_the_mappings() {
    Device device;
    Range range({PIECE}), other({PIECE});
    open_to(range.at, PIECE, 0);
    open_to(other.at, PIECE, 0);
    fill(range.at + PIECE - 4, 8);
}

static void unmapped_in_use() {
    Device device;
    Queue queue;
    Range range({PIECE});
    open_to(range.at, PIECE, 0);
    OK(cuMemsetD8Async(range.at, 7, 4, queue.is));
}

static void use_after_unmap() {
    Device device;
    CUdeviceptr at;
    {
        Range range({PIECE});
        open_to(at = range.at, PIECE, 0);
    }
    OK(cuMemsetD8Async(at, 7, 4, nullptr));
}

static void unmap_a_part() {
    Device device;
    Range range({2 * PIECE});
    OK(cuMemUnmap(range.at, PIECE));
}

static void release_twice() {
    Device device;
    CUmemGenericAllocationHandle handle = create();
    OK(cuMemRelease(handle));
    OK(cuMemRelease(handle));
}

static void release_what_is_mapped_twice() {
    Device device;
    Range range({PIECE});
    CUmemGenericAllocationHandle handle;
    OK(cuMemRetainAllocationHandle(&handle, reinterpret_cast<void *>(range.at)));
    OK(cuMemRelease(handle));
    OK(cuMemRelease(handle));
}

static void range_with_a_mapping() {
    Device device;
    Range range({PIECE});
    OK(cuMemAddressFree(range.at, PIECE));
}

static void range_twice() {
    Device device;
    CUdeviceptr at;
    OK(cuMemAddressReserve(&at, PIECE, 0, 0, 0));
    OK(cuMemAddressFree(at, PIECE));
    OK(cuMemAddressFree(at, PIECE));
}

static void handle_left() {
    Device device;
    create();
}

static void range_left() {
    Device device;
    CUdeviceptr at;
    OK(cuMemAddressReserve(&at, PIECE, 0, 0, 0));
}

static int exported(CUdeviceptr at) {
    CUmemGenericAllocationHandle handle;
    int file = -1;
    OK(cuMemRetainAllocationHandle(&handle, reinterpret_cast<void *>(at)));
    OK(cuMemExportToShareableHandle(&file, handle, 1, 0));
    OK(cuMemRelease(handle));
    return file;
}

static void descriptor_left() {
    Device device;
    Range range({PIECE});
    exported(range.at);
}

// The second process: maps what the first exported, and reads and writes it.
static void import(int words[2], int answers[2], bool stays) {
    Device device;
    int file[2];
    char path[64];
    HOLDS(read(words[0], file, sizeof file) == sizeof file);
    CUdeviceptr at;
    OK(cuMemAddressReserve(&at, 3 * PIECE, 0, 0, 0));
    for (int each = 0; each < 2; each++) {
        snprintf(path, sizeof path, "/proc/%d/fd/%d", getppid(), file[each]);
        int own = open(path, O_RDWR | O_CLOEXEC);
        CUmemGenericAllocationHandle handle;
        OK(cuMemImportFromShareableHandle(&handle, reinterpret_cast<void *>(static_cast<intptr_t>(own)), 1));
        close(own);
        OK(cuMemMap(at + each * PIECE, (1 + each) * PIECE, 0, handle, 0));
        OK(cuMemRelease(handle));
    }
    open_to(at, 3 * PIECE, 0);
    HOLDS(words_at(at + PIECE - 4, 2)[1] == 0x07070707);
    OK(cuMemsetD8Async(at, 9, 4, nullptr));
    OK(cuStreamSynchronize(nullptr));
    if (stays) {
        HOLDS(write(answers[1], "", 1) == 1);
        pause();
    }
    OK(cuMemUnmap(at, 3 * PIECE));
    OK(cuMemAddressFree(at, 3 * PIECE));
    HOLDS(write(answers[1], "", 1) == 1);
}

static void between_processes(bool stays) {
    int words[2], answers[2];
    HOLDS(!pipe(words) && !pipe(answers));
    pid_t child = fork();
    if (child == 0) {
        alarm(stays ? 2 : 0); // it must not outlive us
        import(words, answers, stays);
        exit(0);
    }
    Device device;
    {
        Range range({PIECE, 2 * PIECE});
        open_to(range.at, range.size, 0);
        fill(range.at, range.size);
        int file[] = {exported(range.at), exported(range.at + PIECE)};
        HOLDS(write(words[1], file, sizeof file) == sizeof file);
        char answer;
        HOLDS(read(answers[0], &answer, 1) == 1);
        close(file[0]), close(file[1]);
        HOLDS(words_at(range.at, 1)[0] == 0x09090909);
    }
    int status = 0;
    waitpid(child, &status, 0);
    HOLDS(status == 0);
}
static void mapped_by_two() { between_processes(false); }
static void given_up_while_mapped() { between_processes(true); }

const std::vector<Case> mapping_cases = {
    {"mappings", nullptr, "", mappings},
    {"arguments_that_do_not_fit", nullptr, "", arguments_that_do_not_fit},
    {"mapped_no_access", "NO-ACCESS", "", no_access},
    {"mapped_access_to_a_part", "NO-ACCESS", "", access_to_a_part},
    {"mapped_access_of_another_device", "NO-ACCESS", "", access_of_another_device},
    {"mapped_a_peer_may", nullptr, "", a_peer_may},
    {"mapped_a_stranger_may_not", nullptr, "STANDIN_PEERS=0", a_stranger_may_not},
    {"past_the_mappings", "UNKNOWN-MEMORY", "", past_the_mappings},
    {"unmapped_in_use", "FREED-IN-USE|UNKNOWN-MEMORY", "", unmapped_in_use},
    {"use_after_unmap", "UNKNOWN-MEMORY", "", use_after_unmap},
    {"unmap_a_part", "UNKNOWN-MEMORY", "", unmap_a_part},
    {"release_twice", "BAD-HANDLE", "", release_twice},
    {"release_what_is_mapped_twice", "BAD-HANDLE", "", release_what_is_mapped_twice},
    {"range_with_a_mapping", "FREED-IN-USE", "", range_with_a_mapping},
    {"range_freed_twice", "UNKNOWN-MEMORY", "", range_twice},
    {"handle_left", "LEAK", "", handle_left},
    {"range_left", "LEAK", "", range_left},
    {"descriptor_left", "LEAK", "", descriptor_left},
    {"mapped_by_two", nullptr, "", mapped_by_two},
    {"given_up_while_mapped", "FREED-WHILE-IMPORTED", "", given_up_while_mapped},
};
