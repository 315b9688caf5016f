/* One step of the online softmax: scores of a block of KV rows become weights, beside the rows' maxima and sums. */
#include <float.h>

struct block {
    const void *keys, *values, *next_keys; /* at the first row of the block, and of the one after it */
    int64_t tokens, next_tokens, heads;
    int64_t position; /* position of the first token relative to the first query */
};

#define SOFTEN_ROWS 16 /* rows whose maxima and sums are updated together; a multiple of LANES */

/* One row of scores is scaled, and -inf outside [low, high). Returns its maximum. */
INLINE float scale_scores(float *scores, int64_t padded, int64_t low, int64_t high, float scale, float softcap) {
    VEC highest = v_set1(-INFINITY);
    if (softcap != 0.0f) {
        for (int64_t token = 0; token < padded; token += LANES) {
            VEC s = v_mul(v_load(scores + token), v_set1(scale / softcap));
            v_store(scores + token, v_mul(v_tanh(s), v_set1(softcap)));
        }
        scale = 1.0f;
    }
    for (int64_t token = 0; token < low && token < padded; token++) scores[token] = -INFINITY;
    for (int64_t token = high > 0 ? high : 0; token < padded; token++) scores[token] = -INFINITY;
    for (int64_t token = 0; token < padded; token += LANES) {
        VEC s = v_mul(v_load(scores + token), v_set1(scale));
        v_store(scores + token, s);
        highest = v_max(highest, s);
    }
    return v_highest(highest);
}

/* Scores become weights exp(score - maximum), those of bfloat16 in its precision, two tokens an element of 32 bits, in
 * the same memory. Returns their sum before rounding. */
INLINE float exponentiate(float *scores, int64_t padded, float maximum, int dtype) {
    VEC total = v_set1(0.0f);
    for (int64_t token = 0; token < padded; token += LANES) {
        VEC weight = v_exp(v_sub(v_load(scores + token), v_set1(maximum)));
        total = v_add(total, weight);
#ifdef HAVE_BF16_DOT
        if (dtype == BFLOAT16) {
            _mm256_storeu_si256((__m256i *)((uint16_t *)scores + token), (__m256i)_mm512_cvtneps_pbh(weight));
            continue;
        }
#endif
        v_store(scores + token, weight);
    }
    return v_sum(total);
}

/* Scores of a block become weights, maxima and sums of the rows those with this block. rescale: what the sums of
 * values up to now are to be multiplied by; lines: prefetched beside each row. */
INLINE void soften_block(const struct attention *a, const struct block *block, const struct partial *partial,
                         float *weights, float *rescale, int64_t rows, int dtype, struct ahead *ahead, int lines) {
    int64_t group = a->num_heads / a->num_kv_heads, all_rows = rows * block->heads;
    int64_t padded = (block->tokens + LANES - 1) / LANES * LANES;
    for (int64_t first = 0; first < all_rows; first += SOFTEN_ROWS) {
        int64_t count = all_rows - first < SOFTEN_ROWS ? all_rows - first : SOFTEN_ROWS;
        float maximum[SOFTEN_ROWS] = {0}, sum[SOFTEN_ROWS] = {0}, shift[SOFTEN_ROWS], keep[SOFTEN_ROWS] = {0};
        float highest[SOFTEN_ROWS] = {0};
        memcpy(maximum, partial->maximum + first, (size_t)count * sizeof *maximum);
        memcpy(sum, partial->sum + first, (size_t)count * sizeof *sum);
        for (int64_t row = 0; row < count; row++) {
            prefetch_lines(ahead, lines);
            int64_t query = rows == group ? 0 : (first + row) % rows / group;
            int64_t position = query - block->position; /* of the query, from the block's first token */
            int64_t high = position + 1 < block->tokens ? position + 1 : block->tokens;
            int64_t low = a->window ? position - a->window + 1 : 0;
            highest[row] =
                scale_scores(weights + (first + row) * BLOCK_TOKENS, padded, low, high, a->scale, a->softcap);
        }
        for (int64_t row = 0; row < SOFTEN_ROWS; row += LANES) {
            VEC old = v_load(maximum + row), new = v_max(old, v_load(highest + row));
            /* a row that has seen nothing yet: all its weights are exp(-inf - 0) */
            VEC finite = v_select_less(new, v_set1(-FLT_MAX), v_set1(0.0f), new);
            v_store(maximum + row, new);
            v_store(shift + row, finite);
            v_store(keep + row, v_exp(v_sub(old, finite)));
        }
        for (int64_t row = 0; row < count; row++)
            sum[row] = sum[row] * keep[row] +
                       exponentiate(weights + (first + row) * BLOCK_TOKENS, padded, shift[row], dtype);
        memcpy(partial->maximum + first, maximum, (size_t)count * sizeof *maximum);
        memcpy(partial->sum + first, sum, (size_t)count * sizeof *sum);
        memcpy(rescale + first, keep, (size_t)count * sizeof *keep);
    }
}
