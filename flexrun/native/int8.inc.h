/* Rows of x in 8 bits for products with codes: symmetric, with one scale for the columns of each group of the matrix.
 *
 * Where the CPU has dot products of 8 bits, codes and x are multiplied as they are: the sum over a group is a whole
 * number, exact in any order. Elsewhere x is only rounded to the same numbers, and multiplied in float32. */

#define LARGEST_X 127
#define SMALLEST_SCALE 1e-30f /* groups of numbers below it, whose inverse would overflow, are 0 */

/* Row ``slot`` of the inputs, as load_input. */
static void load_rounded(const struct product *p, const struct inputs *inputs, int64_t slot) {
    const struct groupwise *m = &p->matrix;
    int inner = inner_dtype(p);
    int64_t block = block_columns(inner), padded = padded_columns(m), width = (int64_t)1 << m->group_shift;
    const char *x = (const char *)p->x + (inputs->first + slot) * p->x_stride * element_bytes(m->dtype);
    for (int64_t group = 0; group < m->groups; group++) {
        int64_t first = group * width, stop = smaller(first + width, padded);
        float row[128];
        VEC largest = v_set1(0.0f), spoilt = v_set1(0.0f), sum = v_set1(0.0f);
        for (int64_t column = first; column < stop; column += LANES) {
            int64_t count = m->columns - column;
            VEC values = count > 0 ? v_load_part(x, column, count, m->dtype) : v_set1(0.0f);
            v_store(row + column - first, values);
            largest = v_max(largest, v_max(values, v_sub(v_set1(0.0f), values)));
            spoilt = v_fma(values, v_set1(0.0f), spoilt); /* NaN where one is NaN or infinite */
        }
        float scale = v_highest(largest) / LARGEST_X;
        if (!(scale > SMALLEST_SCALE)) scale = 0.0f;
        VEC inverse = v_set1(scale > 0.0f ? 1.0f / scale : 0.0f);
        int64_t place = (first / block * inputs->capacity + slot) * block + first % block;
        for (int64_t column = 0; column < stop - first; column += LANES) {
            VEC rounded = v_round(v_mul(v_load(row + column), inverse));
            sum = v_add(sum, rounded);
#ifdef HAVE_INT8_DOT
            if (inner == INT8) {
                __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(rounded));
                _mm_storeu_si128((__m128i *)((char *)inputs->x + place + column), bytes);
                continue;
            }
#endif
            v_store((float *)inputs->x + place + column, v_mul(rounded, v_set1(scale)));
        }
        inputs->scales[slot * m->groups + group] = scale;
        inputs->sums[slot * m->groups + group] = scale * v_sum(sum) + v_sum(spoilt);
    }
}

#ifdef HAVE_INT8_DOT
/* Four columns of a tile: byte 4 r + e is row r of column 4 q + e. code_step: bytes between runs of codes. */
INLINE __m512i quads(const uint8_t *codes, int64_t code_step, const int bits) {
    __m256i low = _mm256_loadu_si256((const __m256i *)codes), high;
    if (bits == 8) {
        high = _mm256_loadu_si256((const __m256i *)(codes + code_step));
    } else {
        __m256i half = _mm256_set1_epi8(15);
        high = _mm256_and_si256(_mm256_srli_epi16(low, 4), half);
        low = _mm256_and_si256(low, half);
    }
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
}

/* Columns of a tile as quads, weights[column / 4][stride][4]. */
INLINE void decode_quads(const struct groupwise *m, int64_t tile, int64_t column, int64_t columns, uint8_t *weights,
                         int64_t stride, const int bits) {
    struct place place = place_of(m, tile);
    const uint8_t *codes = codes_at(m, place, column);
    int64_t code_step = 32 * place.tiles;
    for (int64_t index = 0; index < columns; index += 4, codes += code_step * bits / 4, weights += 4 * stride)
        _mm512_storeu_si512(weights, quads(codes, code_step, bits));
}

/* Not __m512i, of which GCC keeps a copy on the stack as well. */
typedef int32_t WHOLE __attribute__((vector_size(64)));

INLINE void add_quad(WHOLE (*sums)[PANEL_VECTORS], const __m512i *weights, const int8_t *x, int64_t x_stride,
                     const int inputs) {
#pragma GCC unroll 8
    for (int input = 0; input < inputs; input++) {
        int four;
        memcpy(&four, x + input * x_stride, sizeof four);
        __m512i value = _mm512_set1_epi32(four);
#pragma GCC unroll 4
        for (int vector = 0; vector < PANEL_VECTORS; vector++)
            sums[input][vector] = (WHOLE)_mm512_dpbusd_epi32((__m512i)sums[input][vector], weights[vector], value);
    }
}

/* totals += x * weights of one group of a panel: ``weights`` as of decode_quads or, where ``stored``, the codes of a
 * panel of four tiles, which are then read at the pace of the memory. */
INLINE void add_quads(const uint8_t *weights, const int8_t *x, int64_t x_stride, int64_t columns, const float *factors,
                      const float *x_scales, const float *x_sums, int64_t sums_stride, float *totals, const int inputs,
                      const int bits, const int stored) {
    WHOLE sums[TILE_INPUTS][PANEL_VECTORS];
    __m512i weight[PANEL_VECTORS];
#pragma GCC unroll 8
    for (int input = 0; input < inputs; input++)
#pragma GCC unroll 4
        for (int vector = 0; vector < PANEL_VECTORS; vector++) sums[input][vector] = (WHOLE){0};
    int64_t step = stored ? 8 * bits * PANEL_TILES : 4 * PANEL_ROWS;
    for (int64_t column = 0; column < columns; column += 4, weights += step) {
        if (stored)
#pragma GCC unroll 4
            for (int line = 0; line < bits / 2; line++) __builtin_prefetch(weights + PREFETCH_BYTES + 64 * line);
#pragma GCC unroll 4
        for (int vector = 0; vector < PANEL_VECTORS; vector++)
            weight[vector] = stored ? quads(weights + 32 * vector, 32 * PANEL_TILES, bits)
                                    : _mm512_loadu_si512(weights + 64 * vector);
        add_quad(sums, weight, x + column, x_stride, inputs);
    }
    __asm__ volatile("" ::: "memory"); /* as in add_group */
#pragma GCC unroll 4
    for (int vector = 0; vector < PANEL_VECTORS; vector++) {
        VEC scale = v_load(factors + vector * LANES), minimum = v_load(factors + PANEL_ROWS + vector * LANES);
#pragma GCC unroll 8
        for (int input = 0; input < inputs; input++) {
            float *total = totals + input * PANEL_ROWS + vector * LANES;
            VEC product = v_mul(_mm512_cvtepi32_ps((__m512i)sums[input][vector]), v_set1(x_scales[input * sums_stride]));
            VEC sum = v_fma(minimum, v_set1(x_sums[input * sums_stride]), v_load(total));
            v_store(total, v_fma(product, scale, sum));
        }
    }
}
#endif
