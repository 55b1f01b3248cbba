/* A program outside the repository, built against an installed libreshard: a 2 x 3 tensor moves from one buffer of this process into
 * another one that holds it transposed. Prints the version and what arrived. With OVERRUN the target's memory is one element shorter
 * than the caller promises, which an address sanitizer must see. */
#include <reshard.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef OVERRUN
#define OVERRUN 0
#endif

static void must(rs_status_t status, const char *what) {
    if (status != RS_OK) {
        fprintf(stderr, "%s: %s: %s\n", what, rs_status_name(status), rs_last_error());
        exit(1);
    }
}

static rs_buffer_t buffer(const char *name, void *data, uint32_t role, int64_t rows, int64_t columns) {
    rs_buffer_t b;
    memset(&b, 0, sizeof b);
    b.name = name;
    b.data = data;
    b.size_bytes = (uint64_t)(rows * columns) * sizeof(float);
    b.device_type = RS_DEVICE_CPU;
    b.role = role;
    b.dtype.code = 2; /* DLPack: float */
    b.dtype.bits = 32;
    b.dtype.lanes = 1;
    b.ndim = 2;
    b.shape[0] = rows;
    b.shape[1] = columns;
    b.strides[0] = columns;
    b.strides[1] = 1;
    return b;
}

static rs_tile_t tile(uint32_t in_buffer, int64_t row_stride, int64_t column_stride) {
    rs_tile_t t;
    memset(&t, 0, sizeof t);
    t.buffer = in_buffer;
    t.rank = 2;
    t.view[0] = t.extent[0] = 2;
    t.view[1] = t.extent[1] = 3;
    t.stride[0] = row_stride;
    t.stride[1] = column_stride;
    return t;
}

int main(void) {
    float source[6] = {1, 2, 3, 4, 5, 6};
    float *target = malloc((6 - OVERRUN) * sizeof(float));
    rs_tensor_t tensor;
    rs_buffer_t buffers[2];
    rs_tile_t tiles[2];
    rs_layout_t layout;
    rs_config_t config;
    rs_sync_t sync;
    rs_comm_t *comm;
    rs_container_t *container;

    if (target == NULL) {
        return 1;
    }
    memset(&tensor, 0, sizeof tensor);
    tensor.name = "weight";
    tensor.rank = 2;
    tensor.shape[0] = 2;
    tensor.shape[1] = 3;
    buffers[0] = buffer("trained", source, RS_SOURCE, 2, 3);
    buffers[1] = buffer("served", target, RS_TARGET, 3, 2);
    tiles[0] = tile(0, 3, 1);
    tiles[1] = tile(1, 1, 2);

    memset(&layout, 0, sizeof layout);
    layout.struct_size = sizeof layout;
    layout.tensors = &tensor;
    layout.tensor_count = 1;
    layout.tensor_size = sizeof tensor;
    layout.buffers = buffers;
    layout.buffer_count = 2;
    layout.buffer_size = sizeof buffers[0];
    layout.tiles = tiles;
    layout.tile_count = 2;
    layout.tile_size = sizeof tiles[0];

    must(rs_comm_loopback(1, 0, 1, &comm), "rs_comm_loopback");
    memset(&config, 0, sizeof config);
    config.struct_size = sizeof config;
    config.abi = RS_ABI;
    config.comm = comm;
    must(rs_container_create(&config, &layout, &container), "rs_container_create");
    must(rs_container_connect(container), "rs_container_connect");
    memset(&sync, 0, sizeof sync);
    sync.struct_size = sizeof sync;
    sync.version = 1;
    must(rs_sync_weights(container, &sync), "rs_sync_weights");
    rs_container_destroy(container);
    rs_comm_destroy(comm);

    printf("libreshard %u: %g %g %g %g %g %g\n", (unsigned)rs_version(), target[0], target[1], target[2], target[3], target[4],
           target[5]);
    free(target);
    return 0;
}
