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

/* 0 where the processor's and the system's part is there. */
int32_t dite_prepare(void) { return request_tiles(); }

int32_t dite_linear(const Weight *w, const Call *call) {
    void (*variants[])(const Weight *, const Activations *, const uint8_t *, const int8_t *, int64_t, int64_t, const Target *) = {
        token_whole, token_zero, group_whole, group_zero};
    int64_t tokens = call->tokens, blocks = divide_up(tokens, ROWS), panels = divide_up(w->out_features, COLUMNS);
    int64_t code_bytes = (blocks * ROWS + 8) * w->groups * w->padded, facts = blocks * ROWS * w->groups; /* 8 rows more: read by the last step */
    uint8_t *memory = reserve(&shared_scratch, code_bytes + 64 + 12 * facts);
    if (!memory) return NO_MEMORY;
    float *numbers = (float *)(memory + (code_bytes + 63) / 64 * 64);
    Activations x = {memory, numbers, numbers + facts, numbers + 2 * facts};
    /* A piece of work is one panel by some blocks of tokens; few panels are cut further, so that all threads have some. */
    int64_t piece = CACHED_TOKENS_BYTES / (w->groups * w->padded * ROWS);
    piece = piece < 1 ? 1 : piece > blocks ? blocks : piece;
    while (piece > 1 && panels * divide_up(blocks, piece) < 4 * call->threads) piece = divide_up(piece, 2);
    int64_t pieces = divide_up(blocks, piece);
    int32_t status = OK;
#pragma omp parallel num_threads(call->threads)
    {
        int8_t *own = reserve(&own_scratch, panel_bytes(w) + 4 * w->in_features + 64);
        float *row = (float *)own;
        if (!own) status = NO_MEMORY;
#pragma omp barrier
        if (status == OK) {
#pragma omp for schedule(static)
            for (int64_t m = 0; m < tokens; m++) quantize_token(call, w, m, row, &x);
            begin_tiles(w);
#pragma omp for schedule(dynamic, 1)
            for (int64_t work = 0; work < pieces * panels; work++) {
                int64_t panel = work % panels, from = work / panels * piece, column = panel * COLUMNS;
                const int8_t *right = (const int8_t *)w->codes + panel * stored_bytes(w);
                if (w->bits == 4) {
                    expand_panel(w, panel, own);
                    right = own;
                }
                for (int64_t block = from; block < minimum(blocks, from + piece); block++) {
                    int64_t m = block * ROWS, at = m * w->out_features + column;
                    Target to = {(char *)call->y + at * (call->y_type == FLOAT32 ? 4 : 2), w->out_features, (int)minimum(ROWS, tokens - m),
                                 (int)minimum(COLUMNS, w->out_features - column), call->y_type, call->gelu, call->bias ? call->bias + column : 0};
                    variants[call->per_group * 2 + w->has_zero](w, &x, x.codes + block * ROWS * w->groups * w->padded, right, block, panel, &to);
                }
            }
            end_tiles();
        }
    }
    return status;
}
