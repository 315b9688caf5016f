/* Attention of one decoding query against records of compressed KV, which are read once and as they are.
 *
 * Scales and minima of keys go to the query, those of values to the weights, so that products are with bare codes: of a
 * group q . (s k + m) = (q s) . k + q . m. Lanes are tokens for scores and channels for sums, and no product is summed
 * across them. Of 4-bit codes and bfloat16 products, a code c enters as 16 + c, which a bit pattern makes of it; what
 * that adds is known from the sums of the factors, and taken off again. Those are rounded to bfloat16, which errs as if
 * c - 8 had been multiplied.
 */
#define CODED_AHEAD_BYTES 6144 /* how far ahead of computing records are prefetched */

INLINE BITS_VEC load_words(const uint8_t *words) {
    BITS_VEC loaded;
    memcpy(&loaded, words, sizeof loaded);
    return loaded;
}

INLINE void prefetch_record(const uint8_t *codes) { __builtin_prefetch(codes + CODED_AHEAD_BYTES, 0, 3); }

/* scores[row][64] = factors[row] . codes + bias[row]; factors [rows][width]. Token 16 i + lane is lane of sum i. */
INLINE void score_codes(const uint8_t *codes, int bits, const float *factors, const float *bias, int64_t width,
                        float *scores, int rows) {
    for (int64_t lane = 0; lane < 16; lane += LANES) {
        VEC sum[ROW_TILE][4];
        for (int row = 0; row < rows; row++)
            for (int i = 0; i < 4; i++) sum[row][i] = v_set1(bias[row]);
        for (int64_t channel = 0; channel < width; channel += 2) {
            VEC code[2][4];
            const uint8_t *pair = codes + channel * 8 * bits;
            prefetch_record(pair);
            if (bits == 4) {
                BITS_VEC words = load_words(pair + 4 * lane);
                for (int odd = 0; odd < 2; odd++)
                    for (int i = 0; i < 4; i++) code[odd][i] = v_field(words, 16 * odd + 4 * i, 4);
            } else {
                prefetch_record(pair + 64);
                for (int odd = 0; odd < 2; odd++)
                    for (int i = 0; i < 4; i++) code[odd][i] = v_load_u8(pair + 64 * odd + 16 * i + lane);
            }
            for (int odd = 0; odd < 2; odd++)
                for (int row = 0; row < rows; row++) {
                    VEC factor = v_set1(factors[row * width + channel + odd]);
                    for (int i = 0; i < 4; i++) sum[row][i] = v_fma(factor, code[odd][i], sum[row][i]);
                }
        }
        for (int row = 0; row < rows; row++)
            for (int i = 0; i < 4; i++) v_store(scores + row * BLOCK_TOKENS + 16 * i + lane, sum[row][i]);
    }
}

/* sums[row][16] = sums[row][16] * rescale[row] + bias[row] + weights[row][64] . codes, for 16 channels. */
INLINE void weigh_codes(const uint8_t *codes, int bits, const float *weights, const float *rescale, const float *bias,
                        int64_t width, float *sums, int rows) {
    for (int64_t lane = 0; lane < 16; lane += LANES) {
        VEC sum[ROW_TILE][2];
        for (int row = 0; row < rows; row++) {
            sum[row][0] = v_fma(v_load(sums + row * width + lane), v_set1(rescale[row]), v_set1(bias[row]));
            sum[row][1] = v_set1(0.0f);
        }
        for (int64_t token = 0; token < BLOCK_TOKENS; token += 8) {
            VEC code[8];
            prefetch_record(codes + token * 2 * bits);
            if (bits == 4) {
                BITS_VEC words = load_words(codes + token * 8 + 4 * lane);
                for (int i = 0; i < 8; i++) code[i] = v_field(words, 16 * (i & 1) + 4 * (i >> 1), 4);
            } else {
                prefetch_record(codes + token * 2 * bits + 64);
                for (int i = 0; i < 8; i++) code[i] = v_load_u8(codes + (token + i) * 16 + lane);
            }
            for (int row = 0; row < rows; row++)
                for (int i = 0; i < 8; i++)
                    sum[row][i & 1] = v_fma(v_set1(weights[row * BLOCK_TOKENS + token + i]), code[i], sum[row][i & 1]);
        }
        for (int row = 0; row < rows; row++) v_store(sums + row * width + lane, v_add(sum[row][0], sum[row][1]));
    }
}

#ifdef HAVE_BF16_DOT
/* 16 + code of one nibble of every half of a word, in bfloat16. */
INLINE __m512bh sixteen_and(__m512i words, int nibble) {
    __m512i placed = nibble == 0   ? _mm512_slli_epi16(words, 3)
                     : nibble == 1 ? _mm512_srli_epi16(words, 1)
                     : nibble == 2 ? _mm512_srli_epi16(words, 5)
                                   : _mm512_srli_epi16(words, 9);
    return (__m512bh)_mm512_ternarylogic_epi32(placed, _mm512_set1_epi16(0x0078), _mm512_set1_epi16(0x4180), 0xea);
}

/* As score_codes, of 4 bits; factors: bfloat16 pairs [rows][width / 2]. */
INLINE void score_codes_bf16(const uint8_t *codes, const uint32_t *factors, const float *bias, int64_t width,
                             float *scores, int rows) {
    VEC sum[ROW_TILE][4];
    for (int row = 0; row < rows; row++)
        for (int i = 0; i < 4; i++) sum[row][i] = v_set1(bias[row]);
    for (int64_t pair = 0; pair < width / 2; pair++) {
        __m512i words = _mm512_loadu_si512(codes + pair * 64);
        prefetch_record(codes + pair * 64);
        __m512bh code[4];
        for (int i = 0; i < 4; i++) code[i] = sixteen_and(words, i);
        for (int row = 0; row < rows; row++) {
            __m512bh factor = (__m512bh)_mm512_set1_epi32((int)factors[row * (width / 2) + pair]);
            for (int i = 0; i < 4; i++) sum[row][i] = _mm512_dpbf16_ps(sum[row][i], factor, code[i]);
        }
    }
    for (int row = 0; row < rows; row++)
        for (int i = 0; i < 4; i++) v_store(scores + row * BLOCK_TOKENS + 16 * i, sum[row][i]);
}

/* As weigh_codes, of 4 bits; weights: bfloat16 pairs [rows][32], with `stride` pairs from row to row. */
INLINE void weigh_codes_bf16(const uint8_t *codes, const uint32_t *weights, int64_t stride, const float *rescale,
                             const float *bias, int64_t width, float *sums, int rows) {
    VEC sum[ROW_TILE][2];
    for (int row = 0; row < rows; row++) {
        sum[row][0] = v_fma(v_load(sums + row * width), v_set1(rescale[row]), v_set1(bias[row]));
        sum[row][1] = v_set1(0.0f);
    }
    for (int64_t eight = 0; eight < BLOCK_TOKENS / 8; eight++) {
        __m512i words = _mm512_loadu_si512(codes + eight * 64);
        prefetch_record(codes + eight * 64);
        __m512bh code[4];
        for (int i = 0; i < 4; i++) code[i] = sixteen_and(words, i);
        for (int row = 0; row < rows; row++)
            for (int i = 0; i < 4; i++) {
                __m512bh weight = (__m512bh)_mm512_set1_epi32((int)weights[row * stride + 4 * eight + i]);
                sum[row][i & 1] = _mm512_dpbf16_ps(sum[row][i & 1], weight, code[i]);
            }
    }
    for (int row = 0; row < rows; row++) v_store(sums + row * width, v_add(sum[row][0], sum[row][1]));
}

/* `count` floats become bfloat16 in place. Returns what a sum over 16 + code is to be corrected by, for each of them:
 * 8 times the float less 24 times what it became. */
INLINE float round_factors(float *factors, int64_t count) {
    VEC correction = v_set1(0.0f);
    for (int64_t entry = 0; entry < count; entry += 16) {
        VEC exact = v_load(factors + entry);
        __m256i rounded = (__m256i)_mm512_cvtneps_pbh(exact);
        VEC became = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
        correction = v_fma(exact, v_set1(8.0f), v_fma(became, v_set1(-24.0f), correction));
        _mm256_storeu_si256((__m256i *)((uint16_t *)factors + entry), rounded);
    }
    return v_sum(correction);
}
#endif

/* Scores of all heads of a record. query: float [rows of all heads][width]; factors: [rows of a head][width], bias:
 * [rows of a head], both workspace. */
INLINE void score_record(const struct attention *a, const struct coded *c, const uint8_t *record, const float *query,
                         float *factors, float *bias, float *scores, int64_t rows, int64_t width) {
    for (int64_t head = 0; head < a->num_kv_heads; head++) {
        const uint8_t *codes = record + head * c->key_bytes;
        const uint16_t *scales = (const uint16_t *)(codes + width * 8 * c->key_bits), *minima = scales + width;
        const float *own = query + head * rows * width;
        float *target = scores + head * rows * BLOCK_TOKENS;
        for (int64_t row = 0; row < rows; row++) {
            VEC added = v_set1(0.0f);
            for (int64_t channel = 0; channel < width; channel += LANES) {
                VEC q = v_load(own + row * width + channel);
                v_store(factors + row * width + channel, v_mul(q, v_load_f16(scales + channel)));
                added = v_fma(q, v_load_f16(minima + channel), added);
            }
            bias[row] = v_sum(added);
        }
#ifdef HAVE_BF16_DOT
        if (c->key_bits == 4) {
            uint32_t *pairs = (uint32_t *)factors;
            for (int64_t row = 0; row < rows; row++) { /* rows of pairs move to the front: never past what is read */
                bias[row] += round_factors(factors + row * width, width);
                memmove(pairs + row * (width / 2), factors + row * width, (size_t)width * 2);
            }
            BY_ROW_TILE(rows, score_codes_bf16(codes, pairs + row * (width / 2), bias + row, width,
                                               target + row * BLOCK_TOKENS, count))
            continue;
        }
#endif
        if (c->key_bits == 4) {
            BY_ROW_TILE(rows, score_codes(codes, 4, factors + row * width, bias + row, width,
                                          target + row * BLOCK_TOKENS, count))
        } else {
            BY_ROW_TILE(rows, score_codes(codes, 8, factors + row * width, bias + row, width,
                                          target + row * BLOCK_TOKENS, count))
        }
    }
}

/* sum_values = sum_values * rescale + weights . values, for all heads of a record. bias: [rows of a head]. */
INLINE void weigh_record(const struct attention *a, const struct coded *c, const uint8_t *record, float *weights,
                         const float *rescale, float *bias, float *sum_values, int64_t rows, int64_t width) {
    const uint8_t *first = record + a->num_kv_heads * c->key_bytes;
    for (int64_t head = 0; head < a->num_kv_heads; head++) {
        const uint8_t *codes = first + head * c->value_bytes;
        const uint16_t *scales = (const uint16_t *)(codes + width * 8 * c->value_bits), *minima = scales + BLOCK_TOKENS;
        float *own = weights + head * rows * BLOCK_TOKENS, *sums = sum_values + head * rows * width;
        const float *keep = rescale + head * rows;
        for (int64_t row = 0; row < rows; row++) {
            VEC added = v_set1(0.0f);
            for (int64_t token = 0; token < BLOCK_TOKENS; token += LANES) {
                VEC weight = v_load(own + row * BLOCK_TOKENS + token);
                added = v_fma(weight, v_load_f16(minima + token), added);
                v_store(own + row * BLOCK_TOKENS + token, v_mul(weight, v_load_f16(scales + token)));
            }
            bias[row] = v_sum(added);
#ifdef HAVE_BF16_DOT
            if (c->value_bits == 4) bias[row] += round_factors(own + row * BLOCK_TOKENS, BLOCK_TOKENS);
#endif
        }
        for (int64_t block = 0; block < width / 16; block++) {
            const uint8_t *values = codes + block * BLOCK_TOKENS * 2 * c->value_bits;
            float *target = sums + block * 16;
#ifdef HAVE_BF16_DOT
            if (c->value_bits == 4) {
                BY_ROW_TILE(rows, weigh_codes_bf16(values, (const uint32_t *)(own + row * BLOCK_TOKENS), BLOCK_TOKENS,
                                                   keep + row, bias + row, width, target + row * width, count))
                continue;
            }
#endif
            if (c->value_bits == 4) {
                BY_ROW_TILE(rows, weigh_codes(values, 4, own + row * BLOCK_TOKENS, keep + row, bias + row, width,
                                              target + row * width, count))
            } else {
                BY_ROW_TILE(rows, weigh_codes(values, 8, own + row * BLOCK_TOKENS, keep + row, bias + row, width,
                                              target + row * width, count))
            }
        }
    }
}

#ifdef HAVE_BF16_DOT
/* Columns as finish_rows and weigh_bf16 keep them: the inverse of columns_in_order. */
INLINE void columns_interleaved(float *sums, int64_t head_dim) {
    for (int64_t column = 0; column + 32 <= head_dim; column += 32) {
        float ordered[32];
        memcpy(ordered, sums + column, sizeof ordered);
        for (int64_t four = 0; four < 8; four++)
            memcpy(sums + column + (four & 1) * 16 + (four >> 1) * 4, ordered + four * 4, 16);
    }
}
#endif

INLINE void attend_coded_typed(const struct attention *a, const struct coded *c, const struct coded_chunk *chunk,
                               const struct partial *partial, float *workspace, int64_t width) {
    int64_t rows = a->num_heads / a->num_kv_heads, all_rows = a->num_heads;
    float *query = workspace, *weights = query + all_rows * width, *rescale = weights + all_rows * BLOCK_TOKENS;
    float *factors = rescale + all_rows, *bias = factors + rows * width;
    for (int64_t row = 0; row < all_rows; row++) {
        int64_t source = chunk->query_row * a->query_stride + row * a->query_head_stride;
        partial->maximum[row] = -INFINITY;
        partial->sum[row] = 0.0f;
        for (int64_t column = 0; column < width; column += LANES) {
            v_store(partial->sum_values + row * width + column, v_set1(0.0f));
            BY_DTYPE(a->dtype, v_store(query + row * width + column, v_load_any(a->query, source + column, TYPE)));
        }
    }
    struct ahead nothing = {0};
    for (int64_t number = 0; number < chunk->count; number++) {
        const uint8_t *record = c->records + (chunk->record + number) * c->record_bytes;
        int64_t position = chunk->position + number * BLOCK_TOKENS;
        if (a->window && position + BLOCK_TOKENS <= chunk->query_position - a->window + 1) continue;
        struct block block = {
            .tokens = BLOCK_TOKENS,
            .heads = a->num_kv_heads,
            .position = position - chunk->query_position,
        };
        score_record(a, c, record, query, factors, bias, weights, rows, width);
        soften_block(a, &block, partial, weights, rescale, rows, FLOAT32, &nothing, 0);
        weigh_record(a, c, record, weights, rescale, bias, partial->sum_values, rows, width);
    }
#ifdef HAVE_BF16_DOT
    if (a->dtype == BFLOAT16)
        for (int64_t row = 0; row < all_rows; row++) columns_interleaved(partial->sum_values + row * width, width);
#endif
}

static void attend_coded(const struct attention *a, const struct coded *c, const struct coded_chunk *chunk,
                         const struct partial *partial, float *workspace) {
    switch (a->head_dim) {
#ifndef __SANITIZE_ADDRESS__ /* instrumented, they would take minutes to compile */
    case 64: attend_coded_typed(a, c, chunk, partial, workspace, 64); break;
    case 128: attend_coded_typed(a, c, chunk, partial, workspace, 128); break;
#endif
    default: attend_coded_typed(a, c, chunk, partial, workspace, a->head_dim);
    }
}
