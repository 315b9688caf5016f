/* Attention of a few query rows against one chunk of KV rows, as many heads together as the first cache holds.
 *
 * Of those heads KV is read once and in the order of memory, all of them of a few tokens before the next tokens: scores
 * of a block of tokens, then one step of the online softmax, then the weighted sum of V. Everything is accumulated in
 * float32.
 *
 * One core computes about as fast as it reads, so neither may wait for the other. Heads are computed one after the
 * other, an order that no hardware prefetcher follows: lines are prefetched in the order of memory instead, a few for
 * every few that are computed on, and during the softmax as well, for which scoring leaves out some.
 */
#include "prefetch.inc.h"
#include "softmax.inc.h"

#define SCORE_TOKENS 4         /* tokens of one register tile of scores */
#define VALUE_TOKENS 8         /* tokens added to the sums of a row between loading and storing them */
#define SOFTMAX_BYTES 8192     /* most KV bytes that are prefetched during the softmax of one block */
#define HEADS_ROW_BYTES 4096   /* of one token's keys, those of the heads that are computed together */
#define HEADS_SUM_BYTES 16384  /* likewise of the sums of values: both stay in a first cache of 48 KiB */

#ifdef HAVE_BF16_DOT
/* bfloat16 products, two a lane. query: bfloat16 [rows][head_dim]; otherwise as scores_float. */
INLINE void scores_bf16(const uint16_t *query, const void *keys, int64_t stride, int64_t first, int64_t last,
                        int64_t head_dim, float *scores, int rows, struct ahead *ahead) {
    const uint16_t *key[4];
    for (int t = 0; t < 4; t++) key[t] = (const uint16_t *)keys + (first + t < last ? first + t : last) * stride;
    VEC sum[ROW_TILE][4];
    for (int row = 0; row < rows; row++)
        for (int t = 0; t < 4; t++) sum[row][t] = v_set1(0.0f);
    int64_t column = 0;
    for (; column + 32 <= head_dim; column += 32) {
        __m512bh k[4];
        if (ahead) prefetch_lines(ahead, 4);
        for (int t = 0; t < 4; t++) k[t] = (__m512bh)_mm512_loadu_si512(key[t] + column);
        for (int row = 0; row < rows; row++) {
            __m512bh q = (__m512bh)_mm512_loadu_si512(query + row * head_dim + column);
            for (int t = 0; t < 4; t++) sum[row][t] = _mm512_dpbf16_ps(sum[row][t], q, k[t]);
        }
    }
    if (column < head_dim) { /* head_dim is a multiple of 16 */
        __m512bh k[4];
        if (ahead) prefetch_lines(ahead, 2);
        for (int t = 0; t < 4; t++) k[t] = (__m512bh)_mm512_maskz_loadu_epi16(0xffff, key[t] + column);
        for (int row = 0; row < rows; row++) {
            __m512bh q = (__m512bh)_mm512_maskz_loadu_epi16(0xffff, query + row * head_dim + column);
            for (int t = 0; t < 4; t++) sum[row][t] = _mm512_dpbf16_ps(sum[row][t], q, k[t]);
        }
    }
    for (int row = 0; row < rows; row++)
        v_sum4(scores + row * BLOCK_TOKENS + first, sum[row][0], sum[row][1], sum[row][2], sum[row][3]);
}
#endif

/* Scores [rows][BLOCK_TOKENS] of four tokens [first, first + 4); tokens past last repeat it and are masked later. */
INLINE void scores_float(const float *query, const void *keys, int64_t stride, int64_t first, int64_t last,
                         int64_t head_dim, float *scores, int rows, int dtype, struct ahead *ahead) {
    int64_t key[4];
    for (int t = 0; t < 4; t++) key[t] = (first + t < last ? first + t : last) * stride;
    VEC sum[ROW_TILE][4];
    for (int row = 0; row < rows; row++)
        for (int t = 0; t < 4; t++) sum[row][t] = v_set1(0.0f);
    for (int64_t column = 0; column < head_dim; column += LANES) {
        VEC k[4];
        if (ahead) prefetch_lines(ahead, 4 * LANES * (int)element_bytes(dtype) / 64);
        for (int t = 0; t < 4; t++) k[t] = v_load_any(keys, key[t] + column, dtype);
        for (int row = 0; row < rows; row++) {
            VEC q = v_load(query + row * head_dim + column);
            for (int t = 0; t < 4; t++) sum[row][t] = v_fma(q, k[t], sum[row][t]);
        }
    }
    for (int row = 0; row < rows; row++)
        v_sum4(scores + row * BLOCK_TOKENS + first, sum[row][0], sum[row][1], sum[row][2], sum[row][3]);
}

/* sum_values[row] = sum_values[row] * rescale[row] + sum over `tokens` tokens of weight[row][token] * values[token],
 * for `vectors` vectors of columns; rescale NULL: 1. */
INLINE void weigh_float(const void *values, int64_t stride, int64_t tokens, float *sum_values, int64_t head_dim,
                          const float *rescale, const float *weight, int rows, int vectors, int dtype,
                        struct ahead *ahead) {
    VEC sum[ROW_TILE][4];
    for (int row = 0; row < rows; row++)
        for (int vector = 0; vector < vectors; vector++) {
            sum[row][vector] = v_load(sum_values + row * head_dim + vector * LANES);
            if (rescale) sum[row][vector] = v_mul(sum[row][vector], v_set1(rescale[row]));
        }
    for (int64_t token = 0; token < tokens; token++) {
        VEC v[4];
        int both = 2 * vectors * LANES * (int)element_bytes(dtype) / 64; /* lines of two tokens */
        if (ahead) prefetch_lines(ahead, token & 1 ? both / 2 : both - both / 2);
        for (int vector = 0; vector < vectors; vector++)
            v[vector] = v_load_any(values, token * stride + vector * LANES, dtype);
        for (int row = 0; row < rows; row++) {
            VEC w = v_set1(weight[row * BLOCK_TOKENS + token]);
            for (int vector = 0; vector < vectors; vector++) sum[row][vector] = v_fma(w, v[vector], sum[row][vector]);
        }
    }
    for (int row = 0; row < rows; row++)
        for (int vector = 0; vector < vectors; vector++)
            v_store(sum_values + row * head_dim + vector * LANES, sum[row][vector]);
}

#ifdef HAVE_BF16_DOT
/* As weigh_float, two tokens a product. Sums of 32 columns are kept as the interleaving of two rows leaves them:
 * columns 0-3, 8-11, 16-19, 24-27, then the others (see columns_in_order); a last 16 columns are in order. */
INLINE void weigh_bf16(const uint16_t *values, int64_t stride, int64_t tokens, float *sum_values, int64_t head_dim,
                       const float *rescale, const uint32_t *weight, int rows, int vectors, struct ahead *ahead) {
    VEC sum[ROW_TILE][4];
    for (int row = 0; row < rows; row++)
        for (int vector = 0; vector < vectors; vector++) {
            sum[row][vector] = v_load(sum_values + row * head_dim + vector * LANES);
            if (rescale) sum[row][vector] = v_mul(sum[row][vector], v_set1(rescale[row]));
        }
    for (int64_t token = 0; token < tokens; token += 2) {
        const uint16_t *low = values + token * stride, *high = token + 1 < tokens ? low + stride : low; /* weighs 0 */
        __m512bh v[4];
        if (ahead) prefetch_lines(ahead, vectors);
        if (vectors == 1) {
            __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)low));
            __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)high));
            v[0] = (__m512bh)_mm512_or_si512(a, _mm512_slli_epi32(b, 16));
        }
        for (int vector = 0; vector + 2 <= vectors; vector += 2) {
            __m512i a = _mm512_loadu_si512(low + vector * LANES), b = _mm512_loadu_si512(high + vector * LANES);
            v[vector] = (__m512bh)_mm512_unpacklo_epi16(a, b);
            v[vector + 1] = (__m512bh)_mm512_unpackhi_epi16(a, b);
        }
        for (int row = 0; row < rows; row++) {
            __m512bh w = (__m512bh)_mm512_set1_epi32((int)weight[row * BLOCK_TOKENS + token / 2]);
            for (int vector = 0; vector < vectors; vector++)
                sum[row][vector] = _mm512_dpbf16_ps(sum[row][vector], w, v[vector]);
        }
    }
    for (int row = 0; row < rows; row++)
        for (int vector = 0; vector < vectors; vector++)
            v_store(sum_values + row * head_dim + vector * LANES, sum[row][vector]);
}

INLINE void columns_in_order(float *sums, int64_t head_dim) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int64_t column = 0; column + 32 <= head_dim; column += 32) {
        VEC a = v_load(sums + column), b = v_load(sums + column + 16);
        v_store(sums + column, _mm512_permutex2var_ps(a, first, b));
        v_store(sums + column + 16, _mm512_permutex2var_ps(a, second, b));
    }
}
#endif

/* Repeat `call` over the rows of a KV head in register tiles: `row` is the first of the tile, `count` a constant. */
#if ROW_TILE > 3
#define BY_ROW_TILE(rows, call)                                         \
    for (int64_t row = 0; row < (rows);) {                              \
        if ((rows)-row >= ROW_TILE) { enum { count = ROW_TILE }; call; row += count; } \
        else if ((rows)-row == 3) { enum { count = 3 }; call; row += count; }          \
        else if ((rows)-row == 2) { enum { count = 2 }; call; row += count; }          \
        else { enum { count = 1 }; call; row += count; }                               \
    }
#else
#define BY_ROW_TILE(rows, call)                                         \
    for (int64_t row = 0; row < (rows);) {                              \
        if ((rows)-row >= ROW_TILE) { enum { count = ROW_TILE }; call; row += count; } \
        else { enum { count = 1 }; call; row += count; }                               \
    }
#endif

/* weights[row][token] = query[row] . keys[token], for all rows and the tokens of a block. */
INLINE void score_block(const struct attention *a, const struct block *block, const void *query, int64_t rows,
                        float *weights, int64_t head_dim, int dtype, struct ahead *cursor) {
    int64_t bytes = element_bytes(dtype), tokens = block->tokens, stride = a->key_stride;
    struct ahead ahead = *cursor; /* in registers */
    for (int64_t token = 0; token < tokens; token += SCORE_TOKENS)
        for (int64_t kv_head = 0; kv_head < block->heads; kv_head++) {
            const void *keys = (const char *)block->keys + kv_head * a->key_head_stride * bytes;
            float *scores = weights + kv_head * rows * BLOCK_TOKENS;
#ifdef HAVE_BF16_DOT
            if (dtype == BFLOAT16) {
                const uint16_t *own = (const uint16_t *)query + kv_head * rows * head_dim;
                BY_ROW_TILE(rows, scores_bf16(own + row * head_dim, keys, stride, token, tokens - 1, head_dim,
                                              scores + row * BLOCK_TOKENS, count, row ? NULL : &ahead))
                continue;
            }
#endif
            const float *own = (const float *)query + kv_head * rows * head_dim;
            BY_ROW_TILE(rows, scores_float(own + row * head_dim, keys, stride, token, tokens - 1, head_dim,
                                           scores + row * BLOCK_TOKENS, count, dtype, row ? NULL : &ahead))
        }
    *cursor = ahead;
}

/* sum_values = sum_values * rescale + weights . values, for all rows and the tokens of a block. */
INLINE void weigh_block(const struct attention *a, const struct block *block, const float *rescale,
                        const float *weights, int64_t rows, float *sum_values, int64_t head_dim, int dtype) {
    int64_t bytes = element_bytes(dtype), stride = a->value_stride;
    struct ahead ahead = ahead_of(block->values, stride, block->tokens, block->next_keys, a->key_stride,
                                  block->next_tokens, block->heads * head_dim, a->value_head_stride == head_dim, dtype);
    for (int64_t token = 0; token < block->tokens; token += VALUE_TOKENS) {
        int64_t tokens = block->tokens - token < VALUE_TOKENS ? block->tokens - token : VALUE_TOKENS;
        for (int64_t kv_head = 0; kv_head < block->heads; kv_head++) {
            int64_t state = kv_head * rows;
            const char *values = (const char *)block->values + (token * stride + kv_head * a->value_head_stride) * bytes;
            for (int64_t column = 0; column < head_dim;) {
                int64_t left = (head_dim - column) / LANES;
                const float *scale = token ? NULL : rescale + state, *own = weights + state * BLOCK_TOKENS;
                float *sums = sum_values + state * head_dim + column;
#ifdef HAVE_BF16_DOT
#define WEIGH(vectors)                                                                                               \
    if (dtype == BFLOAT16) {                                                                                         \
        BY_ROW_TILE(rows, weigh_bf16((const uint16_t *)values + column, stride, tokens, sums + row * head_dim,       \
                                     head_dim, scale ? scale + row : NULL,                                           \
                                     (const uint32_t *)(own + row * BLOCK_TOKENS) + token / 2, count, vectors,       \
                                     row ? NULL : &ahead))                                                           \
    } else {                                                                                                         \
        WEIGH_FLOAT(vectors)                                                                                         \
    }                                                                                                                \
    column += (vectors)*LANES;
#else
#define WEIGH(vectors)       \
    WEIGH_FLOAT(vectors)     \
    column += (vectors)*LANES;
#endif
#define WEIGH_FLOAT(vectors)                                                                                         \
    BY_ROW_TILE(rows, weigh_float(values + column * bytes, stride, tokens, sums + row * head_dim, head_dim,        \
                                    scale ? scale + row : NULL, own + row * BLOCK_TOKENS + token, count, vectors,    \
                                    dtype, row ? NULL : &ahead))
                if (left >= 4) { WEIGH(4) }
                else if (left >= 2) { WEIGH(2) }
                else { WEIGH(1) }
#undef WEIGH
#undef WEIGH_FLOAT
            }
        }
    }
}

/* `heads` KV heads from `first_head` on. query: their rows; weights, rescale: workspace. */
INLINE void attend_heads(const struct attention *a, const struct chunk *chunk, const struct partial *partial,
                         const void *query, float *weights, float *rescale, int64_t first_head, int64_t heads,
                         int64_t head_dim, int dtype) {
    int64_t rows = a->num_heads / a->num_kv_heads * chunk->query_len, bytes = element_bytes(dtype);
    int64_t next_heads = first_head + heads, is_last = next_heads == a->num_kv_heads;
    const char *keys = (const char *)a->keys + first_head * a->key_head_stride * bytes;
    const char *values = (const char *)a->values + first_head * a->value_head_stride * bytes;
    const char *next_keys = (const char *)a->keys + (is_last ? 0 : next_heads * a->key_head_stride * bytes);
    for (int64_t start = 0; start < chunk->kv_len; start += BLOCK_TOKENS) {
        int64_t left = chunk->kv_len - start, kv_row = chunk->kv_row + start, last = left <= BLOCK_TOKENS;
        struct block block = {
            .keys = keys + kv_row * a->key_stride * bytes,
            .values = values + kv_row * a->value_stride * bytes,
            .next_keys = !last ? keys + (kv_row + BLOCK_TOKENS) * a->key_stride * bytes
                               : next_keys + (is_last ? chunk->after_row : chunk->kv_row) * a->key_stride * bytes,
            .tokens = last ? left : BLOCK_TOKENS,
            .next_tokens = !last ? left - BLOCK_TOKENS : is_last ? chunk->after_len : chunk->kv_len,
            .heads = heads,
            .position = chunk->kv_position + start - chunk->query_position,
        };
        struct ahead ahead = ahead_of(block.keys, a->key_stride, block.tokens, block.values, a->value_stride,
                                      block.tokens, heads * head_dim, a->key_head_stride == head_dim, dtype);
        int64_t key_bytes = block.tokens * heads * head_dim * bytes;
        int64_t lines = (key_bytes / 8 < SOFTMAX_BYTES ? key_bytes / 8 : SOFTMAX_BYTES) / (64 * rows * heads);
        if (lines) ahead.calls = ahead.pause = key_bytes / (64 * lines * rows * heads);
        score_block(a, &block, query, rows, weights, head_dim, dtype, &ahead);
        ahead.calls = INT64_MAX;
        soften_block(a, &block, partial, weights, rescale, rows, dtype, &ahead, (int)lines);
        weigh_block(a, &block, rescale, weights, rows, partial->sum_values, head_dim, dtype);
    }
}

INLINE void attend_chunk_typed(const struct attention *a, const struct chunk *chunk, const struct partial *partial,
                               float *workspace, int64_t head_dim, int dtype) {
    int64_t group = a->num_heads / a->num_kv_heads, bytes = element_bytes(dtype);
    int64_t rows = group * chunk->query_len, all_rows = rows * a->num_kv_heads; /* of one KV head, of all */
    float *query = workspace, *weights = query + all_rows * head_dim, *rescale = weights + all_rows * BLOCK_TOKENS;
    for (int64_t row = 0; row < all_rows; row++) {
        partial->maximum[row] = -INFINITY;
        partial->sum[row] = 0.0f;
        int64_t head = row / rows * group + row % rows % group, token = chunk->query_row + row % rows / group;
        int64_t source = token * a->query_stride + head * a->query_head_stride;
        for (int64_t column = 0; column < head_dim; column += LANES)
            v_store(partial->sum_values + row * head_dim + column, v_set1(0.0f));
#ifdef HAVE_BF16_DOT
        if (dtype == BFLOAT16) {
            memcpy((uint16_t *)query + row * head_dim, (const uint16_t *)a->query + source, (size_t)(head_dim * bytes));
            continue;
        }
#endif
        for (int64_t column = 0; column < head_dim; column += LANES)
            v_store(query + row * head_dim + column, v_load_any(a->query, source + column, dtype));
    }
    int64_t by_row = HEADS_ROW_BYTES / (head_dim * bytes), by_sum = HEADS_SUM_BYTES / (rows * head_dim * 4);
    int64_t most = by_row < by_sum ? by_row : by_sum;
    int64_t parts = most < 1 ? a->num_kv_heads : (a->num_kv_heads + most - 1) / most;
    most = (a->num_kv_heads + parts - 1) / parts; /* an odd rest would be read in pieces too small */
    int query_bytes = 4;
#ifdef HAVE_BF16_DOT
    if (dtype == BFLOAT16) query_bytes = 2;
#endif
    for (int64_t head = 0; head < a->num_kv_heads; head += most) {
        int64_t heads = a->num_kv_heads - head < most ? a->num_kv_heads - head : most, row = head * rows;
        struct partial own = {partial->sum_values + row * head_dim, partial->maximum + row, partial->sum + row};
        attend_heads(a, chunk, &own, (const char *)query + row * head_dim * query_bytes, weights, rescale, head, heads,
                     head_dim, dtype);
    }
}

static void attend_chunk(const struct attention *a, const struct chunk *chunk, const struct partial *partial,
                         float *workspace) {
    /* head sizes that the compiler knows save a third of the time in address arithmetic */
    switch (a->head_dim) {
#ifndef __SANITIZE_ADDRESS__ /* instrumented, they would take minutes to compile */
    case 64: BY_DTYPE(a->dtype, attend_chunk_typed(a, chunk, partial, workspace, 64, TYPE)); break;
    case 128: BY_DTYPE(a->dtype, attend_chunk_typed(a, chunk, partial, workspace, 128, TYPE)); break;
#endif
    default: BY_DTYPE(a->dtype, attend_chunk_typed(a, chunk, partial, workspace, a->head_dim, TYPE));
    }
}

/* Normalise a finished partial and store it as rows of out and, where wanted, of lse. */
static void finish_rows(const struct attention *a, const struct chunk *chunk, const struct partial *partial) {
    int64_t group = a->num_heads / a->num_kv_heads, rows = group * chunk->query_len;
    for (int64_t row = 0; row < rows * a->num_kv_heads; row++) {
        int64_t head = row / rows * group + row % rows % group, token = chunk->query_row + row % rows / group;
        int64_t target = token * a->out_stride + head * a->out_head_stride;
        float logarithm;
#ifdef HAVE_BF16_DOT
        if (a->dtype == BFLOAT16) columns_in_order(partial->sum_values + row * a->head_dim, a->head_dim);
#endif
        VEC inverse = v_set1(finish_sum(a, head, partial->maximum[row], partial->sum[row], &logarithm));
        for (int64_t column = 0; column < a->head_dim; column += LANES) {
            VEC sum = v_load(partial->sum_values + row * a->head_dim + column);
            BY_DTYPE(a->dtype, v_store_any(a->out, target + column, v_mul(sum, inverse), TYPE));
        }
        if (a->lse) a->lse[token * a->lse_stride + head] = logarithm;
    }
}
