/* Compressed matrices spread over threads: brought back as a whole, or multiplied by rows as they are. */
#include <stdlib.h>

#include "kernels.h"

#define EXPORT __attribute__((visibility("default")))
#define SERIAL_ELEMENTS 16384
#define MOST_INPUTS 192 /* rows of x at a time: with a block of columns each, they stay in a core's second cache */

static int64_t align_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

/* out: [rows][columns] of the matrix's dtype, contiguous. */
EXPORT void flexrun_decode_codes(const struct groupwise *m, void *out, int threads) {
    const struct groupwise_kernels *kernels = flexrun_selected()->groupwise;
    int64_t tile_out = TILE_ROWS * m->columns * element_bytes(m->dtype), tiles = (m->rows + TILE_ROWS - 1) / TILE_ROWS;
#pragma omp parallel for num_threads(threads) if (threads > 1 && m->rows * m->columns > SERIAL_ELEMENTS)
    for (int64_t tile = 0; tile < tiles; tile++) kernels->decode_tile(m, tile, (char *)out + tile * tile_out);
}

/* Returns 0, or -1 where memory is short. */
EXPORT int flexrun_multiply_codes(const struct product *p, int threads) {
    const struct groupwise_kernels *kernels = flexrun_selected()->groupwise;
    const struct groupwise *m = &p->matrix;
    int inner = kernels->inner_dtype(p);
    int64_t block = block_columns(inner), blocks = (padded_columns(m) + block - 1) / block;
    int64_t capacity = p->inputs < MOST_INPUTS ? p->inputs : MOST_INPUTS;
    int64_t panels = (m->rows + kernels->panel_rows - 1) / kernels->panel_rows;
    int64_t x_bytes = align_up(blocks * capacity * block * inner_bytes(inner));
    int64_t sums_bytes = align_up(2 * capacity * m->groups * 4), totals_bytes = capacity * MOST_PANEL_ROWS * 4;
    int64_t factors_bytes = MOST_PANEL_GROUPS * 2 * MOST_PANEL_ROWS * 4;
    int64_t thread_bytes = totals_bytes + factors_bytes + PANEL_BYTES;
    if (m->rows * m->columns * p->inputs <= SERIAL_ELEMENTS) threads = 1;
    char *memory = aligned_alloc(64, (size_t)(x_bytes + sums_bytes + threads * thread_bytes));
    if (!memory) return -1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int thread = thread_number();
        char *own = memory + x_bytes + sums_bytes + thread * thread_bytes;
        struct panel panel = {(float *)own, (float *)(own + totals_bytes), own + totals_bytes + factors_bytes};
        float *sums = (float *)(memory + x_bytes);
        struct inputs inputs = {memory, sums, sums + capacity * m->groups, 0, 0, capacity};
        for (; inputs.first < p->inputs; inputs.first += capacity) {
            int64_t left = p->inputs - inputs.first;
            inputs.count = left < capacity ? left : capacity;
#pragma omp for schedule(static)
            for (int64_t slot = 0; slot < inputs.count; slot++) kernels->load_input(p, &inputs, slot);
#pragma omp for schedule(dynamic, 1)
            for (int64_t number = 0; number < panels; number++)
                kernels->multiply_panel(p, number * kernels->panel_rows, &inputs, &panel);
        }
    }
    free(memory);
    return 0;
}
