/* Attention of a few query rows against one chunk of KV rows, all query heads of a KV head together.
 *
 * KV is read once: for each block of tokens and KV head, scores of a tile of rows, then an online softmax, then the
 * weighted sum of V. Everything is accumulated in float32.
 */

#ifndef BLOCK_TOKENS
#define BLOCK_TOKENS 64
#endif
#ifndef VT
#define VT 8
#endif
#ifndef KA
#define KA 0
#endif
#ifndef VA
#define VA 0
#endif
#ifndef PF
#define PF 2
#endif

#ifdef HAVE_BF16_DOT
/* bfloat16 products, two a lane, of q as it lies in memory. */
INLINE void scores_bf16(const void *const *query, const void *keys, int64_t stride, int64_t first, int64_t last,
                        int64_t head_dim, float (*scores)[BLOCK_TOKENS], int rows) {
    const uint16_t *key[4];
    for (int t = 0; t < 4; t++) key[t] = (const uint16_t *)keys + (first + t < last ? first + t : last) * stride;
    VEC sum[ROW_TILE][4];
    for (int row = 0; row < rows; row++)
        for (int t = 0; t < 4; t++) sum[row][t] = v_set1(0.0f);
    int64_t column = 0;
    for (; column + 32 <= head_dim; column += 32) {
        __m512bh k[4];
        for (int t = 0; t < 4; t++) k[t] = (__m512bh)_mm512_loadu_si512(key[t] + column);
        for (int row = 0; row < rows; row++) {
            __m512bh q = (__m512bh)_mm512_loadu_si512((const uint16_t *)query[row] + column);
            for (int t = 0; t < 4; t++) sum[row][t] = _mm512_dpbf16_ps(sum[row][t], q, k[t]);
        }
    }
    if (column < head_dim) { /* head_dim is a multiple of 16 */
        __m512bh k[4];
        for (int t = 0; t < 4; t++) k[t] = (__m512bh)_mm512_maskz_loadu_epi16(0xffff, key[t] + column);
        for (int row = 0; row < rows; row++) {
            __m512bh q = (__m512bh)_mm512_maskz_loadu_epi16(0xffff, (const uint16_t *)query[row] + column);
            for (int t = 0; t < 4; t++) sum[row][t] = _mm512_dpbf16_ps(sum[row][t], q, k[t]);
        }
    }
    for (int row = 0; row < rows; row++)
        v_sum4(&scores[row][first], sum[row][0], sum[row][1], sum[row][2], sum[row][3]);
}
#endif

/* Scores of four tokens [first, first + 4); tokens past last repeat it and are masked by the caller. */
INLINE void scores_float(const float *query, const void *keys, int64_t stride, int64_t first, int64_t last,
                         int64_t head_dim, float (*scores)[BLOCK_TOKENS], int rows, int dtype) {
    int64_t key[4];
    for (int t = 0; t < 4; t++) key[t] = (first + t < last ? first + t : last) * stride;
    VEC sum[ROW_TILE][4];
    for (int row = 0; row < rows; row++)
        for (int t = 0; t < 4; t++) sum[row][t] = v_set1(0.0f);
    for (int64_t column = 0; column < head_dim; column += LANES) {
        VEC k[4];
        for (int t = 0; t < 4; t++) k[t] = v_load_any(keys, key[t] + column, dtype);
        for (int row = 0; row < rows; row++) {
            VEC q = v_load(query + row * head_dim + column);
            for (int t = 0; t < 4; t++) sum[row][t] = v_fma(q, k[t], sum[row][t]);
        }
    }
    for (int row = 0; row < rows; row++)
        v_sum4(&scores[row][first], sum[row][0], sum[row][1], sum[row][2], sum[row][3]);
}

/* sum_values[row] = sum_values[row] * rescale[row] + sum over tokens of weight[row][token] * values[token]. */
INLINE void weigh_columns(float *sum_values, const float *rescale, const void *values, int64_t stride, int64_t tokens,
                          int64_t head_dim, float (*weight)[BLOCK_TOKENS], int rows, int vectors, int dtype) {
    VEC sum[ROW_TILE][4];
    for (int row = 0; row < rows; row++)
        for (int vector = 0; vector < vectors; vector++)
            sum[row][vector] = v_mul(v_load(sum_values + row * head_dim + vector * LANES), v_set1(rescale[row]));
    for (int64_t token = 0; token < tokens; token++) {
        VEC v[4];
        for (int vector = 0; vector < vectors; vector++)
            v[vector] = v_load_any(values, token * stride + vector * LANES, dtype);
        for (int row = 0; row < rows; row++) {
            VEC w = v_set1(weight[row][token]);
            for (int vector = 0; vector < vectors; vector++) sum[row][vector] = v_fma(w, v[vector], sum[row][vector]);
        }
    }
    for (int row = 0; row < rows; row++)
        for (int vector = 0; vector < vectors; vector++)
            v_store(sum_values + row * head_dim + vector * LANES, sum[row][vector]);
}

/* Scores become weights exp(score - maximum); tokens outside [low, high) weigh 0. Returns the rescale of old sums. */
INLINE float soften(float *scores, int64_t tokens, int64_t low, int64_t high, float scale, float softcap,
                    float *maximum, float *sum) {
    int64_t padded = (tokens + LANES - 1) / LANES * LANES;
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
    float block_maximum = v_highest(highest), old_maximum = *maximum;
    float new_maximum = block_maximum > old_maximum ? block_maximum : old_maximum;
    if (new_maximum == -INFINITY) {
        for (int64_t token = 0; token < padded; token++) scores[token] = 0.0f;
        return 1.0f;
    }
    VEC total = v_set1(0.0f);
    for (int64_t token = 0; token < padded; token += LANES) {
        VEC weight = v_exp(v_sub(v_load(scores + token), v_set1(new_maximum)));
        v_store(scores + token, weight);
        total = v_add(total, weight);
    }
    float rescale = old_maximum == new_maximum ? 1.0f : expf(old_maximum - new_maximum);
    *maximum = new_maximum;
    *sum = *sum * rescale + v_sum(total);
    return rescale;
}

/* The tile of query rows of one KV head against tokens [first, last] of the block. */
struct tile {
    const void *query_raw[ROW_TILE]; /* as in memory */
    const float *query;              /* the same in float32, [rows][head_dim] */
    int64_t state;                   /* index of its first row in the partial */
};

INLINE void prefetch_rows(const void *base, int64_t token, int tokens, int64_t stride, int64_t head_stride, int64_t kv_head, int64_t head_dim, int dtype) {
    int64_t bytes = element_bytes(dtype), row_bytes = head_dim * bytes;
    for (int64_t ahead = token; ahead < token + tokens; ahead++) {
        const char *start = (const char *)base + (ahead * stride + kv_head * head_stride) * bytes;
        for (int64_t offset = 0; offset < row_bytes; offset += 64) __builtin_prefetch(start + offset, 0, PF);
    }
}

INLINE void score_tile(const struct attention *a, const struct tile *tile, const void *keys, int64_t token,
                       int64_t last, float (*scores)[BLOCK_TOKENS], int rows, int dtype) {
#ifdef HAVE_BF16_DOT
    if (dtype == BFLOAT16) {
        scores_bf16(tile->query_raw, keys, a->key_stride, token, last, a->head_dim, scores + tile->state, rows);
        return;
    }
#endif
    scores_float(tile->query, keys, a->key_stride, token, last, a->head_dim, scores + tile->state, rows, dtype);
}

INLINE void weigh_tile(const struct attention *a, int64_t state, const void *values, int64_t token, int64_t tokens,
                       const struct partial *partial, float (*weight)[BLOCK_TOKENS], const float *rescale, int rows, int dtype) {
    int64_t head_dim = a->head_dim;
    float *sum_values = partial->sum_values + state * head_dim;
    const char *start = (const char *)values + token * a->value_stride * element_bytes(dtype);
    for (int64_t column = 0; column < head_dim;) {
        const void *at = start + column * element_bytes(dtype);
        int64_t left = (head_dim - column) / LANES;
#define WEIGH(vectors)                                                                                       \
    weigh_columns(sum_values + column, rescale, at, a->value_stride, tokens, head_dim,                      \
                  (float(*)[BLOCK_TOKENS])(weight[state] + token), rows, vectors, dtype),                   \
        column += (vectors)*LANES
        if (left >= 4) WEIGH(4);
        else if (left >= 2) WEIGH(2);
        else WEIGH(1);
    }
}

INLINE void attend_chunk_typed(const struct attention *a, const struct chunk *chunk, const struct partial *partial,
                               float *workspace, int dtype) {
    int64_t group = a->num_heads / a->num_kv_heads, head_dim = a->head_dim, bytes = element_bytes(dtype);
    int64_t rows = group * chunk->query_len; /* of one KV head */
    int64_t all_rows = rows * a->num_kv_heads;
    float(*weight)[BLOCK_TOKENS] = (float(*)[BLOCK_TOKENS])(workspace + all_rows * head_dim);
    float *rescale = workspace + all_rows * (head_dim + BLOCK_TOKENS);
    float ones[ROW_TILE];
    for (int t = 0; t < ROW_TILE; t++) ones[t] = 1.0f;
    for (int64_t row = 0; row < all_rows; row++) {
        partial->maximum[row] = -INFINITY;
        partial->sum[row] = 0.0f;
        int64_t head = row / rows * group + row % rows % group, token = chunk->query_row + row % rows / group;
        int64_t source = token * a->query_stride + head * a->query_head_stride;
        for (int64_t column = 0; column < head_dim; column += LANES) {
            v_store(partial->sum_values + row * head_dim + column, v_set1(0.0f));
            v_store(workspace + row * head_dim + column, v_load_any(a->query, source + column, dtype));
        }
    }
    for (int64_t start = 0; start < chunk->kv_len; start += BLOCK_TOKENS) {
        int64_t tokens = chunk->kv_len - start < BLOCK_TOKENS ? chunk->kv_len - start : BLOCK_TOKENS;
        const char *block_keys = (const char *)a->keys + (chunk->kv_row + start) * a->key_stride * bytes;
        const char *block_values = (const char *)a->values + (chunk->kv_row + start) * a->value_stride * bytes;
        for (int64_t token = 0; token < tokens; token += 4)
            for (int64_t kv_head = 0; kv_head < a->num_kv_heads; kv_head++) {
                const void *keys = block_keys + kv_head * a->key_head_stride * bytes;
                if (KA) prefetch_rows(block_keys, token + KA, 4, a->key_stride, a->key_head_stride, kv_head, head_dim, dtype);
                for (int64_t row = 0; row < rows;) {
                    struct tile tile;
                    tile.state = kv_head * rows + row;
                    tile.query = workspace + tile.state * head_dim;
                    for (int64_t t = 0; t < ROW_TILE && row + t < rows; t++) {
                        int64_t qtoken = chunk->query_row + (row + t) / group;
                        int64_t head = kv_head * group + (row + t) % group;
                        tile.query_raw[t] =
                            (const char *)a->query + (qtoken * a->query_stride + head * a->query_head_stride) * bytes;
                    }
#define SCORE(count) score_tile(a, &tile, keys, token, tokens - 1, weight, count, dtype), row += (count)
                    if (rows - row >= ROW_TILE) SCORE(ROW_TILE);
                    else if (rows - row >= 2) SCORE(2);
                    else SCORE(1);
                }
            }
        for (int64_t row = 0; row < all_rows; row++) {
            int64_t position = chunk->query_position + row % rows / group - chunk->kv_position - start;
            int64_t high = position + 1 < tokens ? position + 1 : tokens;
            int64_t low = a->window ? position - a->window + 1 : 0;
            rescale[row] = soften(weight[row], tokens, low, high, a->scale, a->softcap, partial->maximum + row,
                                  partial->sum + row);
        }
        for (int64_t token = 0; token < tokens; token += VT)
            for (int64_t kv_head = 0; kv_head < a->num_kv_heads; kv_head++) {
                const void *values = block_values + kv_head * a->value_head_stride * bytes;
                int64_t count = tokens - token < VT ? tokens - token : VT;
                if (VA) prefetch_rows(block_values, token + VA, VT, a->value_stride, a->value_head_stride, kv_head, head_dim, dtype);
                for (int64_t row = 0; row < rows;) {
                    int64_t state = kv_head * rows + row;
                    const float *factor = token ? ones : rescale + state;
#define SUM(n) weigh_tile(a, state, values, token, count, partial, weight, factor, n, dtype), row += (n)
                    if (rows - row >= ROW_TILE) SUM(ROW_TILE);
                    else if (rows - row >= 2) SUM(2);
                    else SUM(1);
                }
            }
    }
}

static void attend_chunk(const struct attention *a, const struct chunk *chunk, const struct partial *partial,
                         float *workspace) {
    BY_DTYPE(a->dtype, attend_chunk_typed(a, chunk, partial, workspace, TYPE));
}

/* Normalise a finished partial and store it as rows of out. */
static void finish_rows(const struct attention *a, const struct chunk *chunk, const struct partial *partial) {
    int64_t group = a->num_heads / a->num_kv_heads, rows = group * chunk->query_len;
    for (int64_t row = 0; row < rows * a->num_kv_heads; row++) {
        int64_t head = row / rows * group + row % rows % group, token = chunk->query_row + row % rows / group;
        int64_t target = token * a->out_stride + head * a->out_head_stride;
        VEC inverse = v_set1(1.0f / partial->sum[row]);
        for (int64_t column = 0; column < a->head_dim; column += LANES) {
            VEC sum = v_load(partial->sum_values + row * a->head_dim + column);
            BY_DTYPE(a->dtype, v_store_any(a->out, target + column, v_mul(sum, inverse), TYPE));
        }
    }
}
