/*
 * libreshard: moves the weights of a training job into an inference engine, in place.
 *
 * A logical tensor is a tensor of the Hugging Face checkpoint. A buffer is memory that a rank owns, under its framework's own name. A
 * tile says which box of a tensor lies in which buffer, where and with which strides. Each rank gives its three tables to a container
 * (rs_container_create), the ranks connect (rs_container_connect), and from then on each rs_sync_weights() fills every target with what
 * the sources hold:
 *
 *     rs_comm_t *comm;
 *     rs_container_t *container;
 *     rs_comm_local_t local = {0};
 *     rs_config_t config = {0};
 *     rs_sync_t sync = {0};
 *
 *     local.struct_size = sizeof local;
 *     local.name = "run-17";
 *     local.rank = rank;
 *     local.world = world;
 *     config.struct_size = sizeof config;
 *     config.abi = RS_ABI;
 *     sync.struct_size = sizeof sync;
 *     sync.version = 1;
 *
 *     if (rs_comm_local(&local, &comm) != RS_OK) die(rs_last_error());
 *     config.comm = comm;
 *     if (rs_container_create(&config, &layout, &container) != RS_OK) die(rs_last_error());
 *     if (rs_container_connect(container) != RS_OK) die(rs_last_error());
 *     if (rs_sync_weights(container, &sync) != RS_OK) die(rs_last_error());
 *
 * Errors. A function that can fail answers an rs_status_t: RS_OK (0), RS_IN_PROGRESS (1), or a negative RS_ERR_*. rs_last_error() is the
 * text of this thread's last failing call. Results are written on success only, except *len with RS_ERR_TOO_SMALL. The number tells
 * what is lost:
 *   -1 to -19   the call was wrong; nothing changed.
 *   -20 to -39  the layouts do not fit each other; nothing moved.
 *   -40 and on  the container failed (RS_IS_FATAL): give it a new communicator and connect again. After RS_ERR_INTERNAL, destroy it.
 * A bug in the library (a Rust panic) is RS_ERR_INTERNAL and never ends the process.
 *
 * Growth. A struct that starts with struct_size may grow at its end: zero it, set struct_size to sizeof, fill in what you need. A
 * struct shorter than the library's is filled up with zeros, and zero always means the old behaviour; a longer one is fine while the
 * part that the library does not know is zero, else RS_ERR_UNKNOWN_FIELD names the first byte that is not. A table states the size
 * of its rows, to the same rule. Of a struct that is a result (rs_param_t) only struct_size is read; the rest is written, zeros where
 * the library has nothing. Reserved fields and unknown flags must be 0.
 *
 * Ownership. Structs, tables and strings that go in are copied. Weight memory is borrowed until rebind or destroy. What comes out is
 * borrowed from its handle and says until when. Handles are counted: a container holds its own reference to its communicator, so the
 * two may be destroyed in any order. Several containers may share a communicator, which then must sync one after the other, in the
 * same order on all ranks.
 *
 * Threads. A function that takes a const handle may run beside others like it; a handle that is not const serves one thread at a time.
 * Who comes second gets RS_ERR_BUSY. rs_container_poll() and rs_container_abort() run beside anything, and destroy beside nothing. No
 * thread of the library outlives a call, but that of RS_CONFIG_WATCHDOG, and one that ncclCommAbort() keeps. A fork()ed child may not use
 * a handle of its parent.
 *
 * Collective. rs_comm_local(), rs_container_connect(), rs_sync_weights() and rs_fingerprint() are called by every rank of the
 * communicator, by ranks without weights too. All other functions are local: they wait for nobody. No wait is longer than its timeout,
 * whatever has happened to the other ranks.
 *
 * Streams. With weights on GPUs a sync is put on rs_sync_t.stream: behind what is there, which may still write the sources or read the
 * targets, and before what comes there next, which may read the targets and write the sources again. rs_sync_weights() asks the other
 * ranks, on the host, puts its work there and answers RS_IN_PROGRESS. It does not wait for the stream, but for a place on it where there
 * are hundreds of rounds, and for memory the first time after a rebind or with another `only`; never past its deadline. The stream's end
 * means that this rank has landed, unless poll then answers an error: a sync that fails lets its streams go on, over torn targets. Every
 * rank calls rs_container_poll(), which does not wait, until it answers otherwise, within the sync's timeout: RS_OK means that all have
 * landed. Until then no other call may change the container, nor use its communicator. Without polls nobody sees a deadline pass or
 * a peer die, and what then stands still on the stream goes on standing: poll, or set RS_CONFIG_WATCHDOG. With NCCL do not wait for the
 * whole device (cudaDeviceSynchronize(), cudaFree()) between polls: a little kernel on it waits for the polls of other ranks. Where any
 * rank has weights in host memory that no GPU copies, or a caller's device (rs_device_t), with a caller's communicator (rs_comm_ops_t),
 * and where streams cannot wait for words of memory (an old driver: the log says so), the call returns when all is done, on all ranks.
 * NULL is the device's default stream.
 *
 * GPUs. Buffers of RS_DEVICE_CUDA and RS_DEVICE_CUDA_HOST are copied by the library itself: the CUDA driver is loaded when a container is
 * given the first of them, or for a communicator of NCCL's, and never else. All of a container's are on one GPU, in its primary context,
 * which is that of cudaMalloc() and PyTorch. Each call leaves the thread the context that it had.
 *
 * Units and codes. Shapes, extents and strides count elements; offsets and sizes count bytes; timeouts milliseconds. Element types
 * and devices have DLPack's codes. Strings are UTF-8 and end with NUL. What is long or changes often is JSON.
 */

#ifndef RESHARD_H
#define RESHARD_H

#include <stddef.h>
#include <stdint.h>

/* Whether a status says that the container failed: it needs a new communicator and rs_container_connect(). */
#define RS_IS_FATAL(status) ((status) <= -40)

