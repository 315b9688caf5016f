/* Compressed matrices: the layout of flexrun/compress/groupwise.py, and what the instruction-set files do with it. */
#ifndef FLEXRUN_GROUPWISE_H
#define FLEXRUN_GROUPWISE_H

#include <stdint.h>

#define TILE_ROWS 16
#define PANEL_TILES 4
#define MOST_PANEL_ROWS 64   /* rows of a matrix that are brought back and multiplied together, of any instruction set */
#define MOST_PANEL_GROUPS 8  /* groups of the columns that are */

struct groupwise {
    const uint8_t *codes;    /* of each panel of PANEL_TILES tiles or the rest: [runs of columns][tiles][32] */
    const uint16_t *factors; /* float16, of each panel: [groups][tiles][2][16], or [1] where symmetric */
    int64_t rows, columns, tile_bytes, groups;
    int group_shift;            /* columns of a group, as a power of two */
    int bits, symmetric, dtype; /* dtype: of x, bias and out, or of the matrix that is brought back */
};

/* out[input][row] = sum of x[input] * weights[row] (+ bias[row]). */
struct product {
    struct groupwise matrix;
    const void *x, *bias; /* bias may be NULL */
    void *out;
    int64_t inputs, x_stride, out_stride;
    int x_bits; /* 16: x as it is; 8: rounded, see int8.inc.h */
};

/* Some rows of x, made ready once for all rows of the matrix. */
struct inputs {
    void *x;       /* [blocks of columns][capacity][columns of a block], in the inner dtype, filled up with 0 */
    float *sums;   /* [capacity][groups]: of x */
    float *scales; /* [capacity][groups]: of x in 8 bits */
    int64_t first, count, capacity;
};

/* What a thread works in. */
struct panel {
    float *totals;  /* [capacity][MOST_PANEL_ROWS] */
    float *factors; /* [MOST_PANEL_GROUPS][2][MOST_PANEL_ROWS] */
    void *weights;  /* PANEL_BYTES */
};
#define PANEL_BYTES (32 << 10)

struct groupwise_kernels {
    int64_t panel_rows;
    /* rows of one tile to out [rows][columns], contiguous, in the matrix's dtype */
    void (*decode_tile)(const struct groupwise *, int64_t tile, void *out);
    /* What is multiplied: bfloat16, or 8 bits, where x is and the CPU has dot products of it, else float32. */
    int (*inner_dtype)(const struct product *);
    /* row ``slot`` of the inputs */
    void (*load_input)(const struct product *, const struct inputs *, int64_t slot);
    /* rows [row, row + panel_rows) of the matrix by all inputs, to their place in out */
    void (*multiply_panel)(const struct product *, int64_t row, const struct inputs *, const struct panel *);
};

#define INT8 3 /* beside the dtypes of kernels.h: of what is multiplied only */

static inline int64_t inner_bytes(int inner) { return inner == INT8 ? 1 : inner == 0 ? 4 : 2; }

/* Columns that are brought back together: at most 256, a multiple of any group. */
static inline int64_t block_columns(int inner) { return inner == 0 ? 128 : 256; }

static inline int64_t padded_columns(const struct groupwise *m) { return (m->columns + 31) / 32 * 32; }

#endif
