/* Quantized linears on CPUs. Compiled on first use for the processor it runs on; see ../build.py. */

#include "activations.h"
#include "pack.h"

#if defined(__AMX_INT8__)
#include "gemm_amx.h"
#elif defined(__AVX512VNNI__)
#include "gemm_vnni.h"
#else
#include "gemm_plain.h"
#endif

#ifdef _OPENMP
#include <omp.h>
#endif

#include "normalize.h"
#include "weight_only.h"

VARIANT(token_whole, 0, 0)
VARIANT(token_zero, 0, 1)
VARIANT(group_whole, 1, 0)
VARIANT(group_zero, 1, 1)

enum { CACHED_TOKENS_BYTES = 1 << 20 }; /* activations that stay in the second cache while the panels of the weight pass */
enum { MANY_BLOCKS = 4 };              /* for each thread, before tokens and not panels are shared out */

/* 0 where the processor's and the system's part is there. */
int32_t dite_prepare(void) { return request_tiles(); }

typedef void Multiply(const Weight *, const Activations *, const uint8_t *, const int8_t *, int64_t, int64_t, const Target *);

/* One panel by the blocks of tokens in [from, end); `own` has room for the panel. */
INLINE void multiply_panel(const Weight *w, const Call *call, const Activations *x, int64_t panel, int64_t from, int64_t end, int8_t *own) {
    static Multiply *const variants[] = {token_whole, token_zero, group_whole, group_zero};
    const int8_t *right = (const int8_t *)w->codes + panel * stored_bytes(w);
    int64_t column = panel * COLUMNS;
    if (w->bits == 4) {
        expand_panel(w, panel, own);
        right = own;
    }
    for (int64_t block = from; block < end; block++) {
        int64_t m = block * ROWS, at = m * w->out_features + column;
        Target to = {(char *)call->y + at * (call->y_type == FLOAT32 ? 4 : 2), w->out_features, (int)minimum(ROWS, call->tokens - m),
                     (int)minimum(COLUMNS, w->out_features - column), call->y_type, call->gelu, call->bias ? call->bias + column : 0};
        variants[call->per_group * 2 + w->has_zero](w, x, x->codes + block * ROWS * w->groups * w->padded, right, block, panel, &to);
    }
}

/* Many tokens are shared out: a thread quantizes some blocks of them and multiplies these by all panels, so that no codes go from one core's cache to
   another's. Of few, all threads quantize some, and then the panels are shared out: each is expanded once. */
int32_t dite_linear(const Weight *w, const Call *call) {
    int64_t tokens = call->tokens, blocks = divide_up(tokens, ROWS), panels = divide_up(w->out_features, COLUMNS);
    int64_t code_bytes = (blocks * ROWS + 8) * w->groups * w->padded, facts = blocks * ROWS * w->groups; /* 8 rows more: read by the last step */
    uint8_t *memory = reserve(&shared_scratch, code_bytes + 64 + 12 * facts);
    if (!memory) return NO_MEMORY;
    float *numbers = (float *)(memory + (code_bytes + 63) / 64 * 64);
    Activations x = {memory, numbers, numbers + facts, numbers + 2 * facts};
    int shared_out = blocks >= MANY_BLOCKS * call->threads;
    int64_t most = CACHED_TOKENS_BYTES / (w->groups * w->padded * ROWS);
    if (shared_out) most = minimum(most, divide_up(blocks, call->threads));
    int64_t pieces = divide_up(blocks, most < 1 ? 1 : most);
    if (!shared_out)
        while (pieces < blocks && panels * pieces < 4 * call->threads) pieces = minimum(blocks, 2 * pieces);
    int64_t piece = divide_up(blocks, pieces);
    int32_t status = OK;
#pragma omp parallel num_threads(call->threads)
    {
        int8_t *own = reserve(&own_scratch, panel_bytes(w) + 4 * w->in_features + 64);
        float *row = (float *)own;
        if (!own) status = NO_MEMORY;
#pragma omp barrier
        if (status == OK) {
            begin_tiles(w);
            if (shared_out) {
#pragma omp for schedule(dynamic, 1)
                for (int64_t from = 0; from < blocks; from += piece) {
                    for (int64_t m = from * ROWS; m < minimum(tokens, (from + piece) * ROWS); m++) quantize_token(call, w, m, row, &x);
                    for (int64_t panel = 0; panel < panels; panel++) multiply_panel(w, call, &x, panel, from, minimum(blocks, from + piece), own);
                }
            } else {
#pragma omp for schedule(static)
                for (int64_t m = 0; m < tokens; m++) quantize_token(call, w, m, row, &x);
#pragma omp for schedule(dynamic, 1)
                for (int64_t work = 0; work < pieces * panels; work++) {
                    int64_t from = work / panels * piece;
                    multiply_panel(w, call, &x, work % panels, from, minimum(blocks, from + piece), own);
                }
            }
            end_tiles();
        }
    }
    return status;
}
