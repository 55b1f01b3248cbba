/*
 * A communicator and a device of one's own: four processes that speak through socket pairs, with weights in memory that only "the
 * device" may touch. Ranks 0 and 1 train: each holds half the rows of a matrix. Ranks 2 and 3 serve: one holds the left half of the
 * columns, the other the right half, transposed and with padding behind it. Both need a vector that both trainers hold.
 *
 *     cc -std=c99 own_pipes.c $(pkg-config --cflags --libs reshard) && ./a.out
 *
 * The device is host memory that is mapped without any access right while no function of the device runs, so a library that touched
 * it would crash. Its copies are queued and done later, one by one, when somebody asks whether they are done. In the end rank 3
 * dies, and the others are told.
 */
#define _DEFAULT_SOURCE
#include <reshard.h>

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { WORLD = 4, ROWS = 256, COLUMNS = 192, HALF = COLUMNS / 2, PAD = 3, DEVICE_TYPE = 12 /* DLPack's kDLExtDev */ };

#define MUST(what) ((what) ? (void)0 : die(#what))

static void die(const char *what) {
    fprintf(stderr, "own_pipes: %s failed: %s; %s\n", what, strerror(errno), rs_last_error());
    exit(1);
}

static void *zeroed(size_t bytes) {
    void *out = calloc(1, bytes);
    MUST(out != NULL);
    return out;
}

/* ------------------------------------------------------------------ the device */

typedef struct block_t { void *data; size_t bytes; struct block_t *next; } block_t;
typedef struct queued_t { rs_copy_t copy; void *freed; struct queued_t *next; } queued_t; /* a copy, or memory to give back */

typedef struct device_t {
    block_t *blocks;         /* all memory of the device */
    queued_t *first, **last; /* what is not done yet */
    uint64_t started, done;  /* how much was queued, and done, so far */
    int events, released;
} device_t;

/* Lets this process touch the device's memory, or forbids it. */
static void device_access(device_t *d, int rights) {
    for (block_t *b = d->blocks; b != NULL; b = b->next) {
        MUST(mprotect(b->data, b->bytes, rights) == 0);
    }
}

static void copy_axis(const rs_copy_t *c, uint32_t axis, const char *src, char *dst) {
    if (axis == c->rank) {
        memcpy(dst, src, c->run_bytes);
        return;
    }
    for (uint64_t i = 0; i < c->extent[axis]; i++) {
        copy_axis(c, axis + 1, src + i * c->src_stride[axis], dst + i * c->dst_stride[axis]);
    }
}

static void unmap(device_t *d, void *memory) {
    block_t **at = &d->blocks, *found;

    while (*at != NULL && (*at)->data != memory) {
        at = &(*at)->next;
    }
    MUST(*at != NULL);
    found = *at;
    *at = found->next;
    munmap(found->data, found->bytes);
    free(found);
}

static queued_t *enqueue(device_t *d) {
    queued_t *q = zeroed(sizeof *q);

    *d->last = q;
    d->last = &q->next;
    d->started++;
    return q;
}

/* Does at most so much of what is queued. */
static void device_work(device_t *d, uint64_t most) {
    device_access(d, PROT_READ | PROT_WRITE);
    while (d->first != NULL && most-- > 0) {
        queued_t *q = d->first;
        if (q->freed != NULL) {
            unmap(d, q->freed);
        } else {
            copy_axis(&q->copy, 0, q->copy.src, q->copy.dst);
        }
        d->first = q->next;
        d->done++;
        free(q);
    }
    if (d->first == NULL) {
        d->last = &d->first;
    }
    device_access(d, PROT_NONE);
}

static rs_status_t device_alloc(void *ctx, uint64_t bytes, void **out) {
    device_t *d = ctx;
    block_t *b = zeroed(sizeof *b);

    b->bytes = bytes;
    b->data = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (b->data == MAP_FAILED) {
        free(b);
        return RS_ERR_MEMORY;
    }
    b->next = d->blocks;
    d->blocks = b;
    *out = b->data;
    return RS_OK;
}

/* Copies that were started before may still need it. */
static void device_free(void *ctx, void *memory) { enqueue(ctx)->freed = memory; }

static rs_status_t device_copy(void *ctx, const rs_copy_t *copies, size_t count, void *stream) {
    (void)stream; /* there is one queue only, in which everything is in order */
    for (size_t i = 0; i < count; i++) {
        enqueue(ctx)->copy = copies[i];
    }
    return RS_OK;
}

/* A mark is how much was queued before it. */
static rs_status_t device_record(void *ctx, void *stream, void **out) {
    device_t *d = ctx;
    uint64_t *mark = zeroed(sizeof *mark);

    (void)stream;
    *mark = d->started;
    *out = mark;
    d->events++;
    return RS_OK;
}

static rs_status_t device_wait(void *ctx, void *stream, void *event) {
    (void)ctx, (void)stream, (void)event; /* what is started later comes later anyway */
    return RS_OK;
}

static rs_status_t device_query(void *ctx, void *event) {
    device_t *d = ctx;

    if (d->done < *(uint64_t *)event) {
        device_work(d, 1);
    }
    return d->done >= *(uint64_t *)event ? RS_OK : RS_IN_PROGRESS;
}

static void device_forget(void *ctx, void *event) {
    ((device_t *)ctx)->events--;
    free(event);
}

static void device_release(void *ctx) { ((device_t *)ctx)->released++; }

/* ------------------------------------------------------------------ the communicator */

typedef struct part_t { char *data; size_t left; struct part_t *next; } part_t;

typedef struct pipes_t {
    int rank, sockets[WORLD];
    part_t *out[WORLD], *in[WORLD]; /* what is to be sent to and received from each rank, in order */
    device_t *device;
    int ended, released;
} pipes_t;

static void append(part_t **list, const void *data, uint64_t bytes) {
    part_t *p = zeroed(sizeof *p);

    p->data = (char *)(size_t)data;
    p->left = bytes;
    while (*list != NULL) {
        list = &(*list)->next;
    }
    *list = p;
}

static void drop(part_t **list) {
    part_t *p = *list;

    *list = p->next;
    free(p);
}

/* Moves what can be moved without waiting. 0: nothing is left; 1: something is; -1: a peer is gone. */
static int move(pipes_t *c) {
    int left = 0, gone = 0;

    device_access(c->device, PROT_READ | PROT_WRITE);
    for (int peer = 0; peer < WORLD && !gone; peer++) {
        while (c->out[peer] != NULL) {
            ssize_t n = send(c->sockets[peer], c->out[peer]->data, c->out[peer]->left, MSG_DONTWAIT | MSG_NOSIGNAL);
            if (n < 0) {
                gone |= errno != EAGAIN && errno != EINTR;
                break;
            }
            c->out[peer]->data += n;
            c->out[peer]->left -= (size_t)n;
            if (c->out[peer]->left == 0) drop(&c->out[peer]);
        }
        while (c->in[peer] != NULL) {
            ssize_t n = recv(c->sockets[peer], c->in[peer]->data, c->in[peer]->left, MSG_DONTWAIT);
            if (n <= 0) {
                gone |= n == 0 || (errno != EAGAIN && errno != EINTR);
                break;
            }
            c->in[peer]->data += n;
            c->in[peer]->left -= (size_t)n;
            if (c->in[peer]->left == 0) drop(&c->in[peer]);
        }
        left |= c->out[peer] != NULL || c->in[peer] != NULL;
    }
    device_access(c->device, PROT_NONE);
    return gone ? -1 : left;
}

static long now_ms(void) {
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static rs_status_t pipes_allgather(void *ctx, const void *send, void *recv, uint64_t bytes, uint32_t timeout_ms) {
    pipes_t *c = ctx;
    long end = now_ms() + (long)timeout_ms;
    int left;

    memcpy((char *)recv + (size_t)c->rank * bytes, send, bytes);
    for (int peer = 0; peer < WORLD; peer++) {
        if (peer != c->rank && bytes > 0) {
            append(&c->out[peer], send, bytes);
            append(&c->in[peer], (char *)recv + (size_t)peer * bytes, bytes);
        }
    }
    while ((left = move(c)) > 0) {
        struct pollfd wait[WORLD];
        if (now_ms() >= end) return RS_ERR_TIMEOUT;
        for (int peer = 0; peer < WORLD; peer++) {
            wait[peer].fd = c->in[peer] != NULL || c->out[peer] != NULL ? c->sockets[peer] : -1;
            wait[peer].events = (short)((c->in[peer] != NULL ? POLLIN : 0) | (c->out[peer] != NULL ? POLLOUT : 0));
        }
        poll(wait, WORLD, 10);
    }
    return left < 0 ? RS_ERR_PEER : RS_OK;
}

static rs_status_t pipes_begin(void *ctx) {
    (void)ctx;
    return RS_OK;
}

static rs_status_t pipes_send(void *ctx, const void *data, uint64_t bytes, int32_t peer, void *stream) {
    (void)stream;
    append(&((pipes_t *)ctx)->out[peer], data, bytes);
    return RS_OK;
}

static rs_status_t pipes_recv(void *ctx, void *data, uint64_t bytes, int32_t peer, void *stream) {
    (void)stream;
    append(&((pipes_t *)ctx)->in[peer], data, bytes);
    return RS_OK;
}

static rs_status_t pipes_end(void *ctx) {
    pipes_t *c = ctx;

    device_work(c->device, UINT64_MAX); /* what was started on the stream comes first */
    return move(c) < 0 ? RS_ERR_PEER : RS_OK;
}

static rs_status_t pipes_poll(void *ctx) {
    int left = move(ctx);

    return left < 0 ? RS_ERR_PEER : left > 0 ? RS_IN_PROGRESS : RS_OK;
}

/* Memory is touched inside the functions above only, so hanging up is all there is to do: the peers' calls fail. */
static void pipes_abort(void *ctx) {
    pipes_t *c = ctx;

    for (int peer = 0; peer < WORLD; peer++) {
        if (peer != c->rank) shutdown(c->sockets[peer], SHUT_RDWR);
    }
    c->ended = 1;
}

static void pipes_release(void *ctx) {
    pipes_t *c = ctx;

    for (int peer = 0; peer < WORLD; peer++) {
        while (c->out[peer] != NULL) drop(&c->out[peer]);
        while (c->in[peer] != NULL) drop(&c->in[peer]);
        if (peer != c->rank) close(c->sockets[peer]);
    }
    c->released++;
}

/* ------------------------------------------------------------------ a rank */

static uint16_t matrix(int row, int column, int version) { return (uint16_t)(row * COLUMNS + column + 7919 * version); }
static uint16_t vector(int i, int version) { return (uint16_t)(31 * i + version); }

static rs_buffer_t buffer(const char *name, void *data, uint32_t role, int64_t rows, int64_t columns) {
    rs_buffer_t b;

    memset(&b, 0, sizeof b);
    b.name = name;
    b.data = data;
    b.size_bytes = (uint64_t)(rows * columns) * sizeof(uint16_t);
    b.device_type = DEVICE_TYPE;
    b.role = role;
    b.dtype.code = 4; /* bf16 */
    b.dtype.bits = 16;
    b.dtype.lanes = 1;
    b.ndim = 2;
    b.shape[0] = rows;
    b.shape[1] = columns;
    b.strides[0] = columns;
    b.strides[1] = 1;
    return b;
}

/* The box of `rows` x `columns` from (row, column) of the matrix, with these strides in buffer 0. */
static rs_tile_t box(int64_t row, int64_t column, int64_t rows, int64_t columns, int64_t down, int64_t right) {
    rs_tile_t t;

    memset(&t, 0, sizeof t);
    t.rank = 2;
    t.view[0] = ROWS, t.view[1] = COLUMNS;
    t.origin[0] = row, t.origin[1] = column;
    t.extent[0] = rows, t.extent[1] = columns;
    t.stride[0] = down, t.stride[1] = right;
    return t;
}

/* Writes a trainer's weights, or poisons a server's. */
static void fill(device_t *d, int rank, int version, uint16_t *m, uint16_t *v) {
    device_access(d, PROT_READ | PROT_WRITE);
    for (int i = 0; rank < 2 && i < ROWS / 2 * COLUMNS; i++) {
        m[i] = matrix(rank * ROWS / 2 + i / COLUMNS, i % COLUMNS, version);
    }
    for (int i = 0; rank >= 2 && i < ROWS * HALF + PAD * ROWS; i++) {
        m[i] = 0xdead;
    }
    for (int i = 0; i < COLUMNS; i++) {
        v[i] = rank < 2 ? vector(i, version) : 0xdead;
    }
    device_access(d, PROT_NONE);
}

/* The number of elements that are not what they must be. */
static int wrong(device_t *d, int rank, int version, const uint16_t *m, const uint16_t *v) {
    int bad = 0;

    device_access(d, PROT_READ);
    for (int row = 0; rank >= 2 && row < ROWS; row++) {
        for (int column = 0; column < HALF; column++) {
            uint16_t got = rank == 2 ? m[row * HALF + column] : m[column * ROWS + row];
            bad += got != matrix(row, column + (rank - 2) * HALF, version);
        }
    }
    for (int i = 0; rank == 3 && i < PAD * ROWS; i++) {
        bad += m[ROWS * HALF + i] != 0xdead; /* the pads stay as they were */
    }
    for (int i = 0; i < COLUMNS; i++) {
        bad += v[i] != vector(i, version);
    }
    device_access(d, PROT_NONE);
    return bad;
}

static void run(int rank, const int *sockets) {
    static device_t device; /* the library uses both until it calls their release */
    static pipes_t pipes;
    rs_device_t d;
    rs_comm_ops_t ops;
    rs_config_t config;
    rs_sync_t sync;
    rs_layout_t layout;
    rs_tensor_t tensors[2];
    rs_buffer_t buffers[2];
    rs_tile_t tiles[2];
    rs_param_t param;
    rs_comm_t *comm;
    rs_container_t *container;
    rs_status_t status;
    void *m, *v;

    device.last = &device.first;
    pipes.rank = rank;
    pipes.device = &device;
    memcpy(pipes.sockets, sockets, sizeof pipes.sockets);

    memset(&d, 0, sizeof d);
    d.struct_size = sizeof d;
    d.ctx = &device;
    d.release = device_release;
    d.device_type = DEVICE_TYPE;
    d.alloc = device_alloc;
    d.free = device_free;
    d.copy = device_copy;
    d.event_record = device_record;
    d.event_wait = device_wait;
    d.event_query = device_query;
    d.event_destroy = device_forget;

    memset(&ops, 0, sizeof ops);
    ops.struct_size = sizeof ops;
    ops.ctx = &pipes;
    ops.release = pipes_release;
    ops.rank = rank;
    ops.world_size = WORLD;
    ops.allgather = pipes_allgather;
    ops.group_begin = pipes_begin;
    ops.group_end = pipes_end;
    ops.send = pipes_send;
    ops.recv = pipes_recv;
    ops.poll = pipes_poll;
    ops.abort = pipes_abort;
    MUST(rs_comm_custom(&ops, &comm) == RS_OK);

    memset(tensors, 0, sizeof tensors);
    tensors[0].name = "model.matrix";
    tensors[0].rank = 2;
    tensors[0].shape[0] = ROWS, tensors[0].shape[1] = COLUMNS;
    tensors[1].name = "model.vector";
    tensors[1].rank = 1;
    tensors[1].shape[0] = COLUMNS;

    MUST(device_alloc(&device, (ROWS * HALF + PAD * ROWS) * sizeof(uint16_t), &m) == RS_OK);
    MUST(device_alloc(&device, COLUMNS * sizeof(uint16_t), &v) == RS_OK);
    if (rank < 2) {
        buffers[0] = buffer("train.matrix", m, RS_SOURCE, ROWS / 2, COLUMNS);
        tiles[0] = box(rank * ROWS / 2, 0, ROWS / 2, COLUMNS, COLUMNS, 1);
    } else if (rank == 2) {
        buffers[0] = buffer("serve.matrix", m, RS_TARGET, ROWS, HALF);
        tiles[0] = box(0, 0, ROWS, HALF, HALF, 1);
    } else {
        buffers[0] = buffer("serve.matrix", m, RS_TARGET, HALF + PAD, ROWS);
        buffers[0].flags = RS_BUFFER_PADDED;
        tiles[0] = box(0, HALF, ROWS, HALF, 1, ROWS);
    }
    buffers[1] = buffer(rank < 2 ? "train.vector" : "serve.vector", v, rank < 2 ? RS_SOURCE : RS_TARGET, 1, COLUMNS);
    memset(&tiles[1], 0, sizeof tiles[1]);
    tiles[1].tensor = 1;
    tiles[1].buffer = 1;
    tiles[1].rank = 1;
    tiles[1].view[0] = tiles[1].extent[0] = COLUMNS;
    tiles[1].stride[0] = 1;

    memset(&layout, 0, sizeof layout);
    layout.struct_size = sizeof layout;
    layout.tensors = tensors;
    layout.tensor_count = 2;
    layout.tensor_size = sizeof tensors[0];
    layout.buffers = buffers;
    layout.buffer_count = 2;
    layout.buffer_size = sizeof buffers[0];
    layout.tiles = tiles;
    layout.tile_count = 2;
    layout.tile_size = sizeof tiles[0];

    memset(&config, 0, sizeof config);
    config.struct_size = sizeof config;
    config.abi = RS_ABI;
    config.comm = comm;
    config.device = &d;
    config.staging_bytes = 32768; /* little, so that several messages are needed */
    config.timeout_ms = 20000;
    MUST(rs_container_create(&config, &layout, &container) == RS_OK);
    rs_comm_destroy(comm); /* the container has a reference of its own */
    MUST(rs_container_connect(container) == RS_OK);

    memset(&sync, 0, sizeof sync);
    sync.struct_size = sizeof sync;
    memset(&param, 0, sizeof param);
    param.struct_size = sizeof param;
    for (int version = 1; version <= 2; version++) {
        fill(&device, rank, version, m, v);
        sync.version = (uint64_t)version;
        status = rs_sync_weights(container, &sync);
        while (status == RS_IN_PROGRESS) {
            status = rs_container_poll(container);
        }
        MUST(status == RS_OK);
        if (wrong(&device, rank, version, m, v) != 0) {
            fprintf(stderr, "rank %d, version %d: %d wrong elements\n", rank, version, wrong(&device, rank, version, m, v));
            exit(1);
        }
        MUST(rs_get_param(container, buffers[0].name, &param) == RS_OK);
        MUST(param.data == m && param.version == sync.version);
    }
    if (rank == 3) {
        _exit(0);
    }
    sync.version = 3;
    status = rs_sync_weights(container, &sync);
    if (status != RS_ERR_PEER || strstr(rs_last_error(), "-41 (RS_ERR_PEER)") == NULL || !pipes.ended) {
        fprintf(stderr, "rank %d, a dead peer: %s: %s\n", rank, rs_status_name(status), rs_last_error());
        exit(1);
    }
    MUST(device.released == 0 && pipes.released == 0);
    rs_container_destroy(container);
    MUST(device.released == 1 && pipes.released == 1 && device.events == 0);
    device_free(&device, m);
    device_free(&device, v);
    device_work(&device, UINT64_MAX);
    MUST(device.blocks == NULL && device.first == NULL);
    exit(0);
}

int main(void) {
    int sockets[WORLD][WORLD];
    int failed = 0;

    for (int a = 0; a < WORLD; a++) {
        sockets[a][a] = -1;
        for (int b = a + 1; b < WORLD; b++) {
            int pair[2];
            MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
            sockets[a][b] = pair[0];
            sockets[b][a] = pair[1];
        }
    }
    for (int rank = 0; rank < WORLD; rank++) {
        pid_t child = fork();
        MUST(child >= 0);
        if (child == 0) {
            for (int a = 0; a < WORLD; a++) { /* the other ranks' ends: a dead rank's peers must see it hang up */
                for (int b = 0; b < WORLD; b++) {
                    if (a != rank && a != b) close(sockets[a][b]);
                }
            }
            run(rank, sockets[rank]);
        }
    }
    for (int a = 0; a < WORLD; a++) {
        for (int b = 0; b < WORLD; b++) {
            if (a != b) close(sockets[a][b]);
        }
    }
    for (int rank = 0; rank < WORLD; rank++) {
        int how;
        MUST(wait(&how) > 0);
        failed += !WIFEXITED(how) || WEXITSTATUS(how) != 0;
    }
    printf(failed == 0 ? "two versions arrived, then a rank died and the others knew\n" : "%d ranks failed\n", failed);
    return failed != 0;
}
