/* Weights brought back from their groups, a panel of rows and a block of columns at a time, and multiplied while they
 * are in the first cache.
 *
 * With dot products of bfloat16, what is multiplied are the codes, which bfloat16 holds exactly: scale and minimum join
 * the sum of each group in float32. Else the weights themselves in float32. Each sum runs over the columns in one order
 * whatever rows x has: a row's product depends on no other row. */

#define PANEL_ROWS (PANEL_VECTORS * LANES)
#define TILES_AT_ONCE (PANEL_ROWS / TILE_ROWS)

#define PREFETCH_BYTES 1024 /* of codes ahead of those at work */

#define BY_BITS(bits, call)                           \
    do {                                              \
        if ((bits) == 4) { enum { BITS = 4 }; call; } \
        else { enum { BITS = 8 }; call; }             \
    } while (0)

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Where a tile is: in a panel of so many, as the one of this number. */
struct place {
    int64_t first, tiles, number; /* first: of the panel */
};

INLINE struct place place_of(const struct groupwise *m, int64_t tile) {
    int64_t first = tile / PANEL_TILES * PANEL_TILES, all = (m->rows + TILE_ROWS - 1) / TILE_ROWS;
    return (struct place){first, smaller(all - first, PANEL_TILES), tile - first};
}

/* Scales and minima of the groups of a tile from ``column`` on, to factors[group][2][stride]. */
INLINE void load_factors(const struct groupwise *m, int64_t tile, int64_t column, int64_t columns, float *factors,
                         int64_t stride) {
    struct place place = place_of(m, tile);
    int64_t first = column >> m->group_shift, last = (column + columns - 1) >> m->group_shift;
    for (int64_t group = first; group <= last && group < m->groups; group++, factors += 2 * stride) {
        const uint16_t *stored = m->factors + (place.first * m->groups + group * place.tiles + place.number) * TILE_ROWS *
                                                  (m->symmetric ? 1 : 2);
        for (int lane = 0; lane < TILE_ROWS; lane += LANES) {
            VEC scale = v_load_f16(stored + lane);
            v_store(factors + lane, scale);
            v_store(factors + stride + lane, m->symmetric ? v_mul(scale, v_set1(-(float)(1 << (m->bits - 1))))
                                                          : v_load_f16(stored + TILE_ROWS + lane));
        }
    }
}

/* The 32 bytes that hold ``column``; those of the next columns lie 32 * place.tiles further. */
INLINE const uint8_t *codes_at(const struct groupwise *m, struct place place, int64_t column) {
    return m->codes + place.first * m->tile_bytes + (column * m->bits / 16 * place.tiles + place.number) * 32;
}

/* Columns of a tile as float32 weights[column][stride]; ``columns`` is a multiple of 32. */
INLINE void decode_floats(const struct groupwise *m, int64_t tile, int64_t column, int64_t columns,
                          const float *factors, int64_t factor_stride, float *weights, int64_t stride, const int bits) {
    struct place place = place_of(m, tile);
    int64_t group = (int64_t)1 << m->group_shift, code_step = 32 * place.tiles;
    for (int64_t start = 0; start < columns; start += group, factors += 2 * factor_stride) {
        int64_t stop = smaller(start + group, columns);
        for (int lane = 0; lane < TILE_ROWS; lane += LANES) {
            VEC scale = v_load(factors + lane), minimum = v_load(factors + factor_stride + lane);
            const uint8_t *codes = codes_at(m, place, column + start) + 2 * lane;
            float *out = weights + start * stride + lane;
            for (int64_t index = start; index < stop; index += 16 / bits, codes += code_step) {
                BITS_VEC pairs = v_pairs(codes);
                v_store(out, v_fma(v_field(pairs, 0, bits), scale, minimum)), out += stride;
                v_store(out, v_fma(v_field(pairs, 16, bits), scale, minimum)), out += stride;
                if (bits == 8) continue;
                v_store(out, v_fma(v_field(pairs, 4, bits), scale, minimum)), out += stride;
                v_store(out, v_fma(v_field(pairs, 20, bits), scale, minimum)), out += stride;
            }
        }
    }
}

/* A tile to rows, a square of LANES by LANES after the other. */
INLINE void decode_tile_typed(const struct groupwise *m, int64_t tile, void *out, int dtype, const int bits) {
    int64_t rows = smaller(m->rows - tile * TILE_ROWS, TILE_ROWS), padded = padded_columns(m);
    float factors[4 * 2 * TILE_ROWS], weights[128 * TILE_ROWS];
    for (int64_t column = 0; column < padded; column += 128) {
        int64_t columns = smaller(padded - column, 128);
        load_factors(m, tile, column, columns, factors, TILE_ROWS);
        decode_floats(m, tile, column, columns, factors, TILE_ROWS, weights, TILE_ROWS, bits);
        for (int64_t index = 0; index < smaller(m->columns - column, 128); index += LANES)
            for (int64_t lane = 0; lane < rows; lane += LANES) {
                VEC square[LANES];
                for (int number = 0; number < LANES; number++)
                    square[number] = v_load(weights + (index + number) * TILE_ROWS + lane);
                v_transpose(square);
                for (int number = 0; number < LANES && lane + number < rows; number++)
                    v_store_part(out, (lane + number) * m->columns + column + index, square[number],
                                 m->columns - column - index, dtype);
            }
    }
}

static void decode_tile(const struct groupwise *m, int64_t tile, void *out) {
    BY_DTYPE(m->dtype, BY_BITS(m->bits, decode_tile_typed(m, tile, out, TYPE, BITS)));
}

static int inner_dtype(const struct product *p) {
#ifdef HAVE_INT8_DOT
    if (p->x_bits == 8) return INT8;
#endif
#ifdef HAVE_BF16_DOT
    if (p->matrix.dtype == BFLOAT16 && p->x_bits == 16) return BFLOAT16;
#endif
    (void)p;
    return FLOAT32;
}

#include "int8.inc.h"

static void load_input(const struct product *p, const struct inputs *inputs, int64_t slot) {
    if (p->x_bits == 8) {
        load_rounded(p, inputs, slot);
        return;
    }
    const struct groupwise *m = &p->matrix;
    int inner = inner_dtype(p);
    int64_t block = block_columns(inner), bytes = inner_bytes(inner), padded = padded_columns(m);
    const char *x = (const char *)p->x + (inputs->first + slot) * p->x_stride * element_bytes(m->dtype);
    float *sums = inputs->sums + slot * m->groups;
    for (int64_t group = 0; group < m->groups; group++) sums[group] = 0.0f;
    for (int64_t column = 0; column < padded; column += LANES) {
        int64_t count = m->columns - column;
        VEC values = count > 0 ? v_load_part(x, column, count, m->dtype) : v_set1(0.0f);
        char *out = (char *)inputs->x + (column / block * inputs->capacity + slot) * block * bytes;
        v_store_any(out, column % block, values, inner);
        if (column < m->columns) sums[column >> m->group_shift] += v_sum(values);
    }
}

/* totals[input][vector] += x[input] * weights, of float32. */
INLINE void add_floats(const float *weights, const float *x, int64_t x_stride, int64_t columns, float *totals,
                       const int inputs) {
    VEC sums[TILE_INPUTS][PANEL_VECTORS];
#pragma GCC unroll 8
    for (int input = 0; input < inputs; input++)
#pragma GCC unroll 4
        for (int vector = 0; vector < PANEL_VECTORS; vector++)
            sums[input][vector] = v_load(totals + input * PANEL_ROWS + vector * LANES);
    for (int64_t column = 0; column < columns; column++, weights += PANEL_ROWS) {
#pragma GCC unroll 8
        for (int input = 0; input < inputs; input++) {
            VEC value = v_set1(x[input * x_stride + column]);
#pragma GCC unroll 4
            for (int vector = 0; vector < PANEL_VECTORS; vector++)
                sums[input][vector] = v_fma(v_load(weights + vector * LANES), value, sums[input][vector]);
        }
    }
#pragma GCC unroll 8
    for (int input = 0; input < inputs; input++)
#pragma GCC unroll 4
        for (int vector = 0; vector < PANEL_VECTORS; vector++)
            v_store(totals + input * PANEL_ROWS + vector * LANES, sums[input][vector]);
}

#ifdef HAVE_BF16_DOT
/* 0 to 15 as bfloat16, twice: a lookup reads five bits of a lane, of which the halves of a byte have four. */
INLINE __m512i code_numbers(void) {
    return _mm512_set_epi16(0x4170, 0x4160, 0x4150, 0x4140, 0x4130, 0x4120, 0x4110, 0x4100, 0x40e0, 0x40c0, 0x40a0,
                            0x4080, 0x4040, 0x4000, 0x3f80, 0, 0x4170, 0x4160, 0x4150, 0x4140, 0x4130, 0x4120, 0x4110,
                            0x4100, 0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0);
}

/* Columns of a tile as codes in bfloat16, weights[column / 2][stride][2]. */
INLINE void decode_codes(const struct groupwise *m, int64_t tile, int64_t column, int64_t columns, uint16_t *weights,
                         int64_t stride, const int bits) {
    struct place place = place_of(m, tile);
    const uint8_t *codes = codes_at(m, place, column);
    int64_t step = 2 * stride, code_step = 32 * place.tiles;
    if (bits == 8) {
        for (int64_t index = 0; index < columns; index += 2, codes += code_step, weights += step) {
            __m512 low = v_load_u8(codes), high = v_load_u8(codes + 16);
            _mm512_storeu_si512(weights, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
        return;
    }
    __m512i numbers = code_numbers();
    for (int64_t index = 0; index < columns; index += 4, codes += code_step, weights += 2 * step) {
        __m512i halves = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)codes));
        _mm512_storeu_si512(weights, _mm512_permutexvar_epi16(halves, numbers));
        _mm512_storeu_si512(weights + step, _mm512_permutexvar_epi16(_mm512_srli_epi16(halves, 4), numbers));
    }
}

/* A run of 32 bytes of codes as bfloat16, as decode_codes makes it: the lower halves, or the higher ones. */
INLINE __m512i low_codes(const uint8_t *codes, __m512i numbers) {
    return _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)codes)), numbers);
}
INLINE __m512i high_codes(const uint8_t *codes, __m512i numbers) {
    __m512i halves = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)codes));
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(halves, 4), numbers);
}
INLINE __m512i byte_codes(const uint8_t *codes) {
    return (__m512i)_mm512_cvtne2ps_pbh(v_load_u8(codes + 16), v_load_u8(codes));
}

INLINE void add_products(VEC (*sums)[PANEL_VECTORS], const __m512i *weights, const uint16_t *x, int64_t x_stride,
                         const int inputs) {
#pragma GCC unroll 8
    for (int input = 0; input < inputs; input++) {
        int pair;
        memcpy(&pair, x + input * x_stride, sizeof pair);
        __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int vector = 0; vector < PANEL_VECTORS; vector++)
            sums[input][vector] = _mm512_dpbf16_ps(sums[input][vector], (__m512bh)weights[vector], value);
    }
}

INLINE void clear_sums(VEC (*sums)[PANEL_VECTORS], const int inputs) {
#pragma GCC unroll 8
    for (int input = 0; input < inputs; input++)
#pragma GCC unroll 4
        for (int vector = 0; vector < PANEL_VECTORS; vector++) sums[input][vector] = v_set1(0.0f);
}

/* totals += scale * (x * codes) + minimum * sum of x, of one group. */
INLINE void add_group(VEC (*sums)[PANEL_VECTORS], const float *factors, const float *x_sums, int64_t sums_stride,
                      float *totals, const int inputs) {
    __asm__ volatile("" ::: "memory"); /* else totals are kept on the stack too, which doubles the stores */
#pragma GCC unroll 4
    for (int vector = 0; vector < PANEL_VECTORS; vector++) {
        VEC scale = v_load(factors + vector * LANES), minimum = v_load(factors + PANEL_ROWS + vector * LANES);
#pragma GCC unroll 8
        for (int input = 0; input < inputs; input++) {
            float *total = totals + input * PANEL_ROWS + vector * LANES;
            VEC sum = v_fma(minimum, v_set1(x_sums[input * sums_stride]), v_load(total));
            v_store(total, v_fma(sums[input][vector], scale, sum));
        }
    }
}

/* The columns of one group of a panel brought back by decode_codes. */
INLINE void add_codes(const uint16_t *weights, const uint16_t *x, int64_t x_stride, int64_t columns,
                      const float *factors, const float *x_sums, int64_t sums_stride, float *totals, const int inputs) {
    VEC sums[TILE_INPUTS][PANEL_VECTORS];
    clear_sums(sums, inputs);
    for (int64_t column = 0; column < columns; column += 2, weights += 2 * PANEL_ROWS) {
        __m512i weight[PANEL_VECTORS];
#pragma GCC unroll 4
        for (int vector = 0; vector < PANEL_VECTORS; vector++)
            weight[vector] = _mm512_loadu_si512(weights + vector * 2 * LANES);
        add_products(sums, weight, x + column, x_stride, inputs);
    }
    add_group(sums, factors, x_sums, sums_stride, totals, inputs);
}

/* The same of a whole panel of four tiles right out of its codes, which are then read at the pace of the memory. */
INLINE void add_stored_codes(const uint8_t *codes, const uint16_t *x, int64_t x_stride, int64_t columns,
                             const float *factors, const float *x_sums, int64_t sums_stride, float *totals,
                             const int inputs, const int bits) {
    VEC sums[TILE_INPUTS][PANEL_VECTORS];
    __m512i numbers = code_numbers(), weight[PANEL_VECTORS];
    clear_sums(sums, inputs);
    for (int64_t column = 0; column < columns; column += 16 / bits, codes += 32 * PANEL_TILES) {
        __builtin_prefetch(codes + PREFETCH_BYTES);
        __builtin_prefetch(codes + PREFETCH_BYTES + 64);
#pragma GCC unroll 4
        for (int vector = 0; vector < PANEL_VECTORS; vector++)
            weight[vector] = bits == 8 ? byte_codes(codes + 32 * vector) : low_codes(codes + 32 * vector, numbers);
        add_products(sums, weight, x + column, x_stride, inputs);
        if (bits == 8) continue;
#pragma GCC unroll 4
        for (int vector = 0; vector < PANEL_VECTORS; vector++)
            weight[vector] = high_codes(codes + 32 * vector, numbers);
        add_products(sums, weight, x + column + 2, x_stride, inputs);
    }
    add_group(sums, factors, x_sums, sums_stride, totals, inputs);
}
#endif

/* A block of columns for ``count`` inputs from ``slot`` on; codes: see add_stored_codes, or NULL: by the panel. */
INLINE void multiply_block(const struct groupwise *m, const struct inputs *inputs, const struct panel *panel,
                           const uint8_t *codes, int64_t column, int64_t columns, int64_t slot, const int count,
                           int inner, const int bits) {
    int64_t block = block_columns(inner), place = (column / block * inputs->capacity + slot) * block;
    float *totals = panel->totals + slot * PANEL_ROWS;
#ifdef HAVE_INT8_DOT
    if (inner == INT8) {
        int64_t group = (int64_t)1 << m->group_shift, first = slot * m->groups + (column >> m->group_shift);
        const int8_t *x = (const int8_t *)inputs->x + place;
        const float *factors = panel->factors, *scales = inputs->scales + first, *sums = inputs->sums + first;
        for (int64_t start = 0; start < columns; start += group, factors += 2 * PANEL_ROWS, scales++, sums++) {
            int64_t width = smaller(columns - start, group);
            const uint8_t *weights = (const uint8_t *)panel->weights + start * PANEL_ROWS;
            if (codes)
                add_quads(codes + start * bits / 16 * 32 * PANEL_TILES, x + start, block, width, factors, scales, sums,
                          m->groups, totals, count, bits, 1);
            else
                add_quads(weights, x + start, block, width, factors, scales, sums, m->groups, totals, count, bits, 0);
        }
        return;
    }
#endif
#ifdef HAVE_BF16_DOT
    if (inner == BFLOAT16) {
        int64_t group = (int64_t)1 << m->group_shift, groups = m->groups;
        const uint16_t *x = (const uint16_t *)inputs->x + place;
        const float *factors = panel->factors, *sums = inputs->sums + slot * groups + (column >> m->group_shift);
        for (int64_t start = 0; start < columns; start += group, factors += 2 * PANEL_ROWS, sums++) {
            int64_t width = smaller(columns - start, group);
            if (codes)
                add_stored_codes(codes + start * bits / 16 * 32 * PANEL_TILES, x + start, block, width, factors, sums,
                                 groups, totals, count, bits);
            else
                add_codes((const uint16_t *)panel->weights + start * PANEL_ROWS, x + start, block, width, factors, sums,
                          groups, totals, count);
        }
        return;
    }
#endif
    (void)m, (void)codes, (void)bits;
    add_floats(panel->weights, (const float *)inputs->x + place, block, columns, totals, count);
}

INLINE void multiply_panel_typed(const struct product *p, int64_t row, const struct inputs *inputs,
                                 const struct panel *panel, int inner, int dtype, const int bits) {
    const struct groupwise *m = &p->matrix;
    int64_t rows = smaller(m->rows - row, PANEL_ROWS), padded = padded_columns(m), block = block_columns(inner);
    int64_t first = row / TILE_ROWS, tiles = smaller((m->rows + TILE_ROWS - 1) / TILE_ROWS - first, TILES_AT_ONCE);
    int stored = inner != FLOAT32 && tiles == PANEL_TILES && inputs->count <= TILE_INPUTS;
    if (tiles < TILES_AT_ONCE) {
        memset(panel->weights, 0, PANEL_BYTES);
        memset(panel->factors, 0, sizeof(float) * MOST_PANEL_GROUPS * 2 * MOST_PANEL_ROWS);
    }
    memset(panel->totals, 0, sizeof(float) * (size_t)(inputs->count * PANEL_ROWS));
    for (int64_t column = 0; column < padded; column += block) {
        int64_t columns = smaller(padded - column, block), slot = 0;
        const uint8_t *codes = stored ? codes_at(m, place_of(m, first), column) : NULL;
        for (int64_t tile = 0; tile < tiles; tile++) {
            float *factors = panel->factors + tile * TILE_ROWS;
            load_factors(m, first + tile, column, columns, factors, PANEL_ROWS);
            if (stored) continue;
#ifdef HAVE_INT8_DOT
            if (inner == INT8) {
                uint8_t *weights = (uint8_t *)panel->weights + tile * 4 * TILE_ROWS;
                decode_quads(m, first + tile, column, columns, weights, PANEL_ROWS, bits);
                continue;
            }
#endif
#ifdef HAVE_BF16_DOT
            if (inner == BFLOAT16) {
                uint16_t *weights = (uint16_t *)panel->weights + tile * 2 * TILE_ROWS;
                decode_codes(m, first + tile, column, columns, weights, PANEL_ROWS, bits);
                continue;
            }
#endif
            decode_floats(m, first + tile, column, columns, factors, PANEL_ROWS,
                          (float *)panel->weights + tile * TILE_ROWS, PANEL_ROWS, bits);
        }
        /* the next block, or the first one of the next panel */
        const char *next = (const char *)codes_at(m, place_of(m, first), column + columns);
        int64_t turns = inputs->count / TILE_INPUTS, lines = turns ? columns * TILES_AT_ONCE * bits / 32 / turns + 1 : 0;
        for (; slot + TILE_INPUTS <= inputs->count; slot += TILE_INPUTS) {
            if (!stored)
                for (int64_t line = 0; line < lines; line++, next += 64) __builtin_prefetch(next);
            multiply_block(m, inputs, panel, codes, column, columns, slot, TILE_INPUTS, inner, bits);
        }
        switch (inputs->count - slot) {
#define REST(count) \
    case count: multiply_block(m, inputs, panel, codes, column, columns, slot, count, inner, bits); break;
            REST(1)
#if TILE_INPUTS > 2
            REST(2)
            REST(3)
            REST(4)
            REST(5)
#endif
        default: break;
        }
    }
    for (int64_t slot = 0; slot < inputs->count; slot++)
        for (int64_t lane = 0; lane < rows; lane += LANES) {
            VEC total = v_load(panel->totals + slot * PANEL_ROWS + lane);
            if (p->bias) total = v_add(total, v_load_part(p->bias, row + lane, rows - lane, dtype));
            v_store_part(p->out, (inputs->first + slot) * p->out_stride + row + lane, total, rows - lane, dtype);
        }
}

static void multiply_panel(const struct product *p, int64_t row, const struct inputs *inputs,
                           const struct panel *panel) {
#ifdef HAVE_INT8_DOT
    if (inner_dtype(p) == INT8) {
        BY_DTYPE(p->matrix.dtype, BY_BITS(p->matrix.bits, multiply_panel_typed(p, row, inputs, panel, INT8, TYPE, BITS)));
        return;
    }
#endif
#ifdef HAVE_BF16_DOT
    if (inner_dtype(p) == BFLOAT16) {
        BY_BITS(p->matrix.bits, multiply_panel_typed(p, row, inputs, panel, BFLOAT16, BFLOAT16, BITS));
        return;
    }
#endif
    BY_DTYPE(p->matrix.dtype, BY_BITS(p->matrix.bits, multiply_panel_typed(p, row, inputs, panel, FLOAT32, TYPE, BITS)));
}

static const struct groupwise_kernels groupwise = {PANEL_ROWS, decode_tile, inner_dtype, load_input, multiply_panel};
