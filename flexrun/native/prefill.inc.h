/* Attention of many query rows of one KV head: blocked matrix products on bfloat16 pairs with an online softmax.
 *
 * A block of keys is transposed to [head_dim / 2][token] pairs and a block of values to [token / 2][head_dim] pairs,
 * so that both products broadcast a pair of the row and accumulate sixteen columns a vector. The weights of a row are
 * rounded to bfloat16 before they multiply the values; maxima, sums and outputs are float32.
 */

#define PREFILL_ROWS 6 /* rows of a tile: six rows of four accumulators fill the registers */

/* [64][head_dim] keys -> uint32 [head_dim / 2][64]; missing tokens become zeros. */
INLINE void pack_keys(const uint16_t *keys, int64_t stride, int64_t tokens, int64_t head_dim, uint32_t *packed) {
    const __m512i step = _mm512_mullo_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32((int)(stride * 2)));
    for (int64_t first = 0; first < PREFILL_TOKENS; first += 16) {
        int64_t count = tokens - first;
        __mmask16 mask = count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
        const char *base = (const char *)(keys + first * stride);
        for (int64_t pair = 0; pair < head_dim / 2; pair++)
            _mm512_storeu_si512(packed + pair * PREFILL_TOKENS + first,
                                _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, step, base + pair * 4, 1));
    }
}

/* [64][head_dim] values -> uint32 [32][head_dim]: tokens 2t (low half) and 2t + 1. */
INLINE void pack_values(const uint16_t *values, int64_t stride, int64_t tokens, int64_t head_dim, uint32_t *packed) {
    for (int64_t token = 0; token < PREFILL_TOKENS; token += 2) {
        const uint16_t *low = values + token * stride, *high = low + stride;
        for (int64_t column = 0; column < head_dim; column += 16) {
            __m512i a = _mm512_setzero_si512(), b = a;
            if (token < tokens) a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(low + column)));
            if (token + 1 < tokens) b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(high + column)));
            _mm512_storeu_si512(packed + token / 2 * head_dim + column, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
        }
    }
}

/* out[row][16 * vectors] += sum over pairs of broadcast(left[row][pair]) * right[pair][column .. ]; left in pairs. */
INLINE void multiply(const uint32_t *const *left, int64_t pairs, const uint32_t *right, int64_t right_stride, VEC *sums,
                     int rows, int vectors) {
    for (int64_t pair = 0; pair < pairs; pair++) {
        __m512bh columns[4];
        for (int vector = 0; vector < vectors; vector++)
            columns[vector] = (__m512bh)_mm512_loadu_si512(right + pair * right_stride + 16 * vector);
        for (int row = 0; row < rows; row++) {
            __m512bh both = (__m512bh)_mm512_set1_epi32((int)left[row][pair]);
            for (int vector = 0; vector < vectors; vector++)
                sums[row * 4 + vector] = _mm512_dpbf16_ps(sums[row * 4 + vector], both, columns[vector]);
        }
    }
}

/* One tile of rows against one packed block. position: of the block's first token; row_position: of each row. */
INLINE void prefill_tile(const struct attention *a, const uint32_t *const *query, const int64_t *row_position,
                         float *const *output, float *maximum, float *sum, const uint32_t *packed_keys,
                         const uint32_t *packed_values, int64_t position, int64_t tokens, int rows) {
    uint32_t weights[PREFILL_ROWS][PREFILL_TOKENS / 2];
    const uint32_t *weight_rows[PREFILL_ROWS];
    VEC scores[PREFILL_ROWS * 4], lanes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    float rescale[PREFILL_ROWS];
    for (int entry = 0; entry < rows * 4; entry++) scores[entry] = v_set1(0.0f);
    multiply(query, a->head_dim / 2, packed_keys, PREFILL_TOKENS, scores, rows, 4);
    for (int row = 0; row < rows; row++) {
        VEC *score = scores + row * 4;
        /* visible: tokens [low, high) of the block */
        int64_t high = row_position[row] - position + 1, low = a->window ? high - a->window : 0;
        if (high > tokens) high = tokens;
        VEC highest = v_set1(-INFINITY);
        for (int vector = 0; vector < 4; vector++) {
            VEC s = v_mul(score[vector], v_set1(a->scale));
            if (a->softcap > 0.0f) s = v_mul(v_tanh(v_mul(s, v_set1(1.0f / a->softcap))), v_set1(a->softcap));
            if (low > 0 || high < PREFILL_TOKENS) {
                VEC token = v_add(lanes, v_set1((float)(16 * vector)));
                __mmask16 seen = _mm512_cmp_ps_mask(token, v_set1((float)high), _CMP_LT_OQ) &
                                 _mm512_cmp_ps_mask(token, v_set1((float)low), _CMP_GE_OQ);
                s = _mm512_mask_blend_ps(seen, v_set1(-INFINITY), s);
            }
            score[vector] = s;
            highest = v_max(highest, s);
        }
        float old = maximum[row], top = v_highest(highest), new = old > top ? old : top;
        weight_rows[row] = weights[row];
        if (new == -INFINITY) { /* nothing seen so far */
            rescale[row] = 1.0f;
            memset(weights[row], 0, sizeof weights[row]);
            continue;
        }
        VEC total = v_set1(0.0f), weight[4];
        for (int vector = 0; vector < 4; vector++) {
            weight[vector] = v_exp(v_sub(score[vector], v_set1(new)));
            total = v_add(total, weight[vector]);
        }
        for (int half = 0; half < 2; half++)
            _mm512_storeu_si512(weights[row] + 16 * half,
                                (__m512i)_mm512_cvtne2ps_pbh(weight[2 * half + 1], weight[2 * half]));
        rescale[row] = old == -INFINITY ? 0.0f : expf(old - new);
        maximum[row] = new;
        sum[row] = sum[row] * rescale[row] + v_sum(total);
    }
    for (int64_t column = 0; column < a->head_dim; column += 64) {
        int vectors = (int)((a->head_dim - column < 64 ? a->head_dim - column : 64) / 16);
        VEC sums[PREFILL_ROWS * 4];
        for (int row = 0; row < rows; row++)
            for (int vector = 0; vector < vectors; vector++)
                sums[row * 4 + vector] = v_mul(v_load(output[row] + column + 16 * vector), v_set1(rescale[row]));
        switch (vectors) { /* constants let the compiler keep the accumulators in registers */
        case 4: multiply(weight_rows, PREFILL_TOKENS / 2, packed_values + column, a->head_dim, sums, rows, 4); break;
        case 3: multiply(weight_rows, PREFILL_TOKENS / 2, packed_values + column, a->head_dim, sums, rows, 3); break;
        case 2: multiply(weight_rows, PREFILL_TOKENS / 2, packed_values + column, a->head_dim, sums, rows, 2); break;
        default: multiply(weight_rows, PREFILL_TOKENS / 2, packed_values + column, a->head_dim, sums, rows, 1);
        }
        for (int row = 0; row < rows; row++)
            for (int vector = 0; vector < vectors; vector++)
                v_store(output[row] + column + 16 * vector, sums[row * 4 + vector]);
    }
}

/* All query heads of one KV head, for up to PREFILL_QUERIES query rows of a segment. See struct prefill. */
static void prefill_item(const struct attention *a, const struct prefill *p, float *workspace) {
    int64_t group = a->num_heads / a->num_kv_heads, head_dim = a->head_dim, rows = p->query_len * group;
    float *outputs = workspace, *maximum = outputs + rows * head_dim, *sum = maximum + rows;
    uint32_t *packed_keys = (uint32_t *)(sum + rows), *packed_values = packed_keys + head_dim / 2 * PREFILL_TOKENS;
    const uint16_t *keys = (const uint16_t *)a->keys + p->kv_head * a->key_head_stride;
    const uint16_t *values = (const uint16_t *)a->values + p->kv_head * a->value_head_stride;
    memset(outputs, 0, (size_t)(rows * head_dim) * sizeof *outputs);
    for (int64_t row = 0; row < rows; row++) maximum[row] = -INFINITY, sum[row] = 0.0f;
    int64_t last = p->query_position + p->query_len; /* tokens behind the last query are never seen */
    if (last > p->kv_len) last = p->kv_len;
    int64_t first = a->window && p->query_position - a->window + 1 > 0 ? p->query_position - a->window + 1 : 0;
    for (int64_t position = first; position < last; position += PREFILL_TOKENS) {
        int64_t tokens = last - position < PREFILL_TOKENS ? last - position : PREFILL_TOKENS;
        pack_keys(keys + (p->kv_row + position) * a->key_stride, a->key_stride, tokens, head_dim, packed_keys);
        pack_values(values + (p->kv_row + position) * a->value_stride, a->value_stride, tokens, head_dim, packed_values);
        int64_t behind = position - p->query_position; /* queries before this one see nothing of the block */
        for (int64_t row = behind > 0 ? behind * group : 0; row < rows; row += PREFILL_ROWS) {
            const uint32_t *query[PREFILL_ROWS];
            float *output[PREFILL_ROWS];
            int64_t row_position[PREFILL_ROWS];
            int count = (int)(rows - row < PREFILL_ROWS ? rows - row : PREFILL_ROWS);
            for (int entry = 0; entry < count; entry++) {
                int64_t token = (row + entry) / group, head = p->kv_head * group + (row + entry) % group;
                query[entry] = (const uint32_t *)((const uint16_t *)a->query +
                                                  (p->query_row + token) * a->query_stride + head * a->query_head_stride);
                output[entry] = outputs + (row + entry) * head_dim;
                row_position[entry] = p->query_position + token;
            }
            if (count == PREFILL_ROWS)
                prefill_tile(a, query, row_position, output, maximum + row, sum + row, packed_keys, packed_values, position,
                             tokens, PREFILL_ROWS);
            else
                for (int entry = 0; entry < count; entry++)
                    prefill_tile(a, query + entry, row_position + entry, output + entry, maximum + row + entry,
                                 sum + row + entry, packed_keys, packed_values, position, tokens, 1);
        }
    }
    for (int64_t row = 0; row < rows; row++) {
        int64_t token = row / group, head = p->kv_head * group + row % group;
        uint16_t *out = (uint16_t *)a->out + (p->query_row + token) * a->out_stride + head * a->out_head_stride;
        float logarithm;
        VEC factor = v_set1(finish_sum(a, head, maximum[row], sum[row], &logarithm));
        for (int64_t column = 0; column < head_dim; column += 16)
            v_store_bf16(out + column, v_mul(v_load(outputs + row * head_dim + column), factor));
        if (a->lse) a->lse[(p->query_row + token) * a->lse_stride + head] = logarithm;
    }
}
