/* What the instruction-set files provide and what dispatch.c does with it: serial kernels here, threads there. */
#ifndef FLEXRUN_KERNELS_H
#define FLEXRUN_KERNELS_H

#include <stdint.h>

#include "coded.h"
#include "groupwise.h"

enum dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum activation { SILU = 0, GELU_TANH = 1 };

/* KV rows of one partial result: fixed, so that a sequence's result depends on neither threads nor other sequences. */
#define CHUNK_TOKENS 256
#define BLOCK_TOKENS 64 /* KV rows of one step of the online softmax */

/* One attention call. Strides are in elements; the last dimension of every tensor is contiguous. */
struct attention {
    const void *query, *keys, *values;
    void *out;
    float *lse; /* [tokens][num_heads]: natural logarithm of each row's sum of exp(score); may be NULL */
    const float *sinks; /* [num_heads]: one more score of each row, without a value; may be NULL */
    int64_t query_stride, query_head_stride, out_stride, out_head_stride, lse_stride;
    int64_t key_stride, key_head_stride, value_stride, value_head_stride;
    int64_t num_heads, num_kv_heads, head_dim;
    int64_t window; /* 0: unlimited */
    float scale, softcap;
    int dtype;
};

/* Part of a segment: query rows against at most CHUNK_TOKENS consecutive KV rows. */
struct chunk {
    int64_t query_row, query_len;  /* rows of query */
    int64_t query_position;        /* of the first of them, from the segment's first KV row; may be negative */
    int64_t kv_row, kv_len;        /* rows of the slab */
    int64_t kv_position;           /* of the first of them, likewise */
    int64_t after_row, after_len;  /* rows to prefetch at the end: where the thread probably continues */
};

/* Query rows of one segment and KV head for the prefill kernel. */
#define PREFILL_QUERIES 64
#define PREFILL_TOKENS 64 /* KV rows of a block */
struct prefill {
    int64_t query_row, query_len; /* at most PREFILL_QUERIES */
    int64_t query_position;       /* of the first of them, from the first KV row; may be negative */
    int64_t kv_row, kv_len;       /* rows of the slab */
    int64_t kv_head;
};

/* Unnormalised softmax of num_heads * query_len rows, ordered [kv_head][query][head of the group]. */
struct partial {
    float *sum_values; /* [rows][head_dim]: sum of exp(score - maximum) * value */
    float *maximum;    /* [rows]: -inf where the row sees nothing */
    float *sum;        /* [rows] */
};

/* Tensors [outer, inner, width], strides in elements. Layouts as packed by __init__.py. */
struct norm {
    void *hidden, *out;
    const void *branch, *weight; /* may be NULL: nothing to add, nothing to multiply by */
    int64_t outer, inner, width;
    int64_t hidden_stride, hidden_inner_stride, out_stride, out_inner_stride, branch_stride;
    float epsilon, weight_offset; /* multiplies by weight + weight_offset */
    float branch_scale;           /* hidden += branch_scale * branch */
    int dtype;
};

struct gated {
    const void *gate, *up;
    void *out;
    int64_t rows, width;
    int64_t gate_stride, up_stride, out_stride;
    int activation, dtype;
};

struct rope {
    void *x;
    const float *cosine, *sine; /* [rows, half], contiguous */
    int64_t rows, heads, half;
    int64_t stride, head_stride;
    int dtype;
};

struct kernels {
    const char *name;
    /* workspace: float[num_heads * query_len * (head_dim + BLOCK_TOKENS + 1)] */
    void (*attend_chunk)(const struct attention *, const struct chunk *, const struct partial *, float *workspace);
    void (*finish_rows)(const struct attention *, const struct chunk *, const struct partial *);
    /* bfloat16 only; NULL where the instruction set has no bfloat16 products. workspace: see prefill_floats */
    void (*prefill_item)(const struct attention *, const struct prefill *, float *workspace);
    void (*rms_norm_row)(const struct norm *, void *hidden, const void *branch, const void *weight, void *out);
    void (*gated_row)(const void *gate, const void *up, void *out, int64_t width, int activation, int dtype);
    void (*rope_head)(void *head, const float *cosine, const float *sine, int64_t half, int dtype);
    const struct groupwise_kernels *groupwise;
    attend_coded_function *attend_coded;
};

extern const struct kernels kernels_portable;
#if defined(__x86_64__)
extern const struct kernels kernels_avx2, kernels_avx512, kernels_avx512_vnni, kernels_avx512_bf16;
#endif

/* Those of the instruction set in use. */
const struct kernels *flexrun_selected(void);

/* Softmax over the union of two sets of KV rows, from the softmax over each: the log-sum-exp merge. */
void flexrun_merge(const struct partial *into, const struct partial *from, int64_t rows, int64_t head_dim);

#ifdef _OPENMP
extern int omp_get_thread_num(void); /* of the team that runs: omp.h need not be installed */
static inline int thread_number(void) { return omp_get_thread_num(); }
#else
static inline int thread_number(void) { return 0; }
#endif

static inline int64_t element_bytes(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

#endif
