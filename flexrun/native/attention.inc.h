/* Attention of a few query rows against one chunk of KV rows, all query heads of a KV head together.
 *
 * KV is read once: for each block of tokens and KV head, scores of a tile of rows, then an online softmax, then the
 * weighted sum of V. Everything is accumulated in float32.
 */

#define BLOCK_TOKENS 32

struct block {
    const void *keys, *values;           /* at the block's first row and the KV head */
    const void *next_keys, *next_values; /* at the next block's first row */
    int64_t tokens, position;            /* position of the first token relative to the first query */
    int64_t next_slice;                  /* first (token, head) row of the next block to prefetch */
    int prefetch;
};

/* Software prefetch of four (token, head) rows of the next block, in the order of memory: computing visits the heads of
 * a token-major slab one after another, an order in which DRAM and hardware prefetchers are slow. */
INLINE void prefetch_rows(const void *base, int64_t stride, int64_t head_stride, int64_t num_kv_heads,
                          int64_t head_dim, int64_t first, int dtype) {
    int64_t bytes = element_bytes(dtype), token = first / num_kv_heads, head = first % num_kv_heads;
    for (int64_t row = first; row < first + 4; row++) {
        const char *start = (const char *)base + (token * stride + head * head_stride) * bytes;
        for (int64_t offset = 0; offset < head_dim * bytes; offset += 64) __builtin_prefetch(start + offset, 0, 3);
        if (++head == num_kv_heads) head = 0, token++;
    }
}

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

/* sum_values[row] = sum_values[row] * rescale[row] + sum over tokens of weight[row][token] * values[token], for
 * `vectors` vectors of columns from `column` on. */
INLINE void weigh_columns(const struct attention *a, const struct block *block, float *sum_values, int64_t column,
                          const float *rescale, float (*weight)[BLOCK_TOKENS], int rows, int vectors, int dtype) {
    int64_t head_dim = a->head_dim, stride = a->value_stride;
    sum_values += column;
    VEC sum[ROW_TILE][4];
    for (int row = 0; row < rows; row++)
        for (int vector = 0; vector < vectors; vector++)
            sum[row][vector] = v_mul(v_load(sum_values + row * head_dim + vector * LANES), v_set1(rescale[row]));
    for (int64_t token = 0; token < block->tokens; token++) {
        if (block->prefetch && !column && token % 4 == 0)
            prefetch_rows(block->next_values, stride, a->value_head_stride, a->num_kv_heads, head_dim,
                          block->next_slice + token, dtype);
        VEC v[4];
        for (int vector = 0; vector < vectors; vector++)
            v[vector] = v_load_any(block->values, token * stride + column + vector * LANES, dtype);
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

INLINE void attend_tile(const struct attention *a, const struct block *block, const void *const *query_raw,
                        const float *query, int64_t first_row, const struct partial *partial, int64_t state, int rows,
                        int dtype) {
    int64_t head_dim = a->head_dim, tokens = block->tokens, group = a->num_heads / a->num_kv_heads;
    float weight[ROW_TILE][BLOCK_TOKENS] __attribute__((aligned(64)));
    float rescale[ROW_TILE];
    for (int64_t token = 0; token < tokens; token += 4) {
        if (block->prefetch)
            prefetch_rows(block->next_keys, a->key_stride, a->key_head_stride, a->num_kv_heads, head_dim,
                          block->next_slice + token, dtype);
#ifdef HAVE_BF16_DOT
        if (dtype == BFLOAT16) {
            scores_bf16(query_raw, block->keys, a->key_stride, token, tokens - 1, head_dim, weight, rows);
            continue;
        }
#endif
        (void)query_raw;
        scores_float(query, block->keys, a->key_stride, token, tokens - 1, head_dim, weight, rows, dtype);
    }
    for (int row = 0; row < rows; row++) {
        int64_t position = (first_row + row) / group - block->position; /* of the query, from the block's first token */
        int64_t high = position + 1 < tokens ? position + 1 : tokens;
        int64_t low = a->window ? position - a->window + 1 : 0;
        rescale[row] = soften(weight[row], tokens, low, high, a->scale, a->softcap, partial->maximum + state + row,
                              partial->sum + state + row);
    }
    float *sum_values = partial->sum_values + state * head_dim;
    for (int64_t column = 0; column < head_dim;) {
        int64_t left = (head_dim - column) / LANES;
#define WEIGH(vectors)                                                                        \
    weigh_columns(a, block, sum_values, column, rescale, weight, rows, vectors, dtype), column += (vectors)*LANES
        if (left >= 4) WEIGH(4);
        else if (left >= 2) WEIGH(2);
        else WEIGH(1);
#undef WEIGH
    }
}

INLINE void attend_chunk_typed(const struct attention *a, const struct chunk *chunk, const struct partial *partial,
                               float *workspace, int dtype) {
    int64_t group = a->num_heads / a->num_kv_heads, head_dim = a->head_dim, bytes = element_bytes(dtype);
    int64_t rows = group * chunk->query_len; /* of one KV head */
    for (int64_t row = 0; row < rows * a->num_kv_heads; row++) {
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
        struct block block;
        block.tokens = chunk->kv_len - start < BLOCK_TOKENS ? chunk->kv_len - start : BLOCK_TOKENS;
        block.position = chunk->kv_position + start - chunk->query_position;
        int64_t next_row = chunk->kv_row + start + BLOCK_TOKENS, next_tokens = chunk->kv_len - start - BLOCK_TOKENS;
        if (next_tokens <= 0) next_row = chunk->after_row, next_tokens = chunk->after_len;
        block.next_keys = (const char *)a->keys + next_row * a->key_stride * bytes;
        block.next_values = (const char *)a->values + next_row * a->value_stride * bytes;
        for (int64_t kv_head = 0; kv_head < a->num_kv_heads; kv_head++) {
            int64_t kv_row = chunk->kv_row + start;
            block.keys = (const char *)a->keys + (kv_row * a->key_stride + kv_head * a->key_head_stride) * bytes;
            block.values =
                (const char *)a->values + (kv_row * a->value_stride + kv_head * a->value_head_stride) * bytes;
            for (int64_t row = 0; row < rows;) {
                int64_t state = kv_head * rows + row;
                const void *query_raw[ROW_TILE] = {0};
                for (int64_t tile = 0; tile < ROW_TILE && row + tile < rows; tile++) {
                    int64_t token = chunk->query_row + (row + tile) / group;
                    int64_t head = kv_head * group + (row + tile) % group;
                    query_raw[tile] =
                        (const char *)a->query + (token * a->query_stride + head * a->query_head_stride) * bytes;
                }
                block.next_slice = kv_head * BLOCK_TOKENS;
                block.prefetch = row == 0 && block.next_slice < next_tokens * a->num_kv_heads;
#define TILE(count)                                                                                             \
    attend_tile(a, &block, query_raw, workspace + state * head_dim, row, partial, state, count, dtype), row += (count)
                if (rows - row >= ROW_TILE) TILE(ROW_TILE);
#if ROW_TILE > 3
                else if (rows - row == 3) TILE(3);
#endif
                else if (rows - row == 2) TILE(2);
                else TILE(1);
#undef TILE
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
