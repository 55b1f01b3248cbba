/*
 * One rank of a small inference engine for Llama models, tensor parallel the way vLLM is: its own parameters, the tables that describe
 * them to libreshard, greedy decoding on the CPU. A C interface, so that a program of any language can hold an engine rank.
 *
 * Functions that answer int: 0 is success; after a failure engine_error() tells this thread why. One thread at a time per engine.
 */
#ifndef ENGINE_H
#define ENGINE_H

#include <stdint.h>

#include <reshard.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct engine engine;

/*
 * A rank with empty parameters; NULL on failure. `model_dir` holds model.txt (the model's sizes). The vocabulary of each rank ends in
 * `padding_rows` rows of no token. The `ranks` engine ranks meet in the shared memory `team_fd` (a memfd, empty at first; the caller may
 * close it afterwards).
 */
engine *engine_open(const char *model_dir, int rank, int ranks, int padding_rows, int team_fd);
void engine_close(engine *e);
const char *engine_error(void);

/*
 * The rank's parameters as targets of a sync; valid until engine_close(). Who describes the world by a spec binds the rows of `buffers`
 * and leaves the other two tables, by which the engine loads its reference.
 */
const rs_layout_t *engine_layout(const engine *e);

/* Loads the parameters from weights.bin in the model's folder: what a sync is compared with. */
int engine_load(engine *e, const char *model_dir);

/* Fills the padding of the vocabulary with NaN; engine_check_padding() fails if a bit of it has changed since. */
void engine_poison_padding(engine *e);
int engine_check_padding(const engine *e);

/* Collective over the engine's ranks: the `count` most likely tokens, one after the other, that follow the prompt. */
int engine_generate(engine *e, const int32_t *prompt, int prompt_count, int32_t *tokens, int count);

/* Bytes per second of plain memcpy of as many bytes as this rank's parameters have, over and over for half a second between warm pages:
   called by all ranks at once, their sum is the machine's rate. */
double engine_memcpy_rate(const engine *e);

#ifdef __cplusplus
}
#endif

#endif
