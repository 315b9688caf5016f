/* Vectors of sixteen floats: AVX-512 F, BW, VL, DQ. */
#include <immintrin.h>

#define LANES 16
#define ROW_TILE 4
#define TILE_INPUTS 6
#define PANEL_VECTORS 4
typedef __m512 VEC;

static inline VEC v_set1(float x) { return _mm512_set1_ps(x); }
static inline VEC v_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void v_store(float *p, VEC v) { _mm512_storeu_ps(p, v); }
static inline VEC v_add(VEC a, VEC b) { return _mm512_add_ps(a, b); }
static inline VEC v_sub(VEC a, VEC b) { return _mm512_sub_ps(a, b); }
static inline VEC v_mul(VEC a, VEC b) { return _mm512_mul_ps(a, b); }
static inline VEC v_div(VEC a, VEC b) { return _mm512_div_ps(a, b); }
static inline VEC v_fma(VEC a, VEC b, VEC c) { return _mm512_fmadd_ps(a, b, c); }
static inline VEC v_select_less(VEC a, VEC b, VEC x, VEC y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
static inline VEC v_max(VEC a, VEC b) { return _mm512_max_ps(a, b); }
static inline VEC v_min(VEC a, VEC b) { return _mm512_min_ps(a, b); }
static inline VEC v_round(VEC a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline VEC v_exponent(VEC n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
static inline void v_sum4(float *p, VEC a, VEC b, VEC c, VEC d) {
    VEC ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    VEC cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    VEC abcd = _mm512_add_ps(
        _mm512_shuffle_ps(ab, cd, _MM_SHUFFLE(1, 0, 1, 0)), _mm512_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 2, 3, 2)));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
static inline float v_sum(VEC a) { return _mm512_reduce_add_ps(a); }
static inline float v_highest(VEC a) { return _mm512_reduce_max_ps(a); }
static inline VEC v_load_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static inline void v_store_bf16(uint16_t *p, VEC v) {
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(bits));
}
static inline VEC v_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline void v_store_f16(uint16_t *p, VEC v) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
static inline void v_transpose(VEC *r) {
    VEC t[16];
    for (int row = 0; row < 16; row += 2) {
        t[row] = _mm512_unpacklo_ps(r[row], r[row + 1]);
        t[row + 1] = _mm512_unpackhi_ps(r[row], r[row + 1]);
    }
    for (int four = 0; four < 16; four += 4)
        for (int odd = 0; odd < 2; odd++) {
            r[four + 2 * odd] = _mm512_shuffle_ps(t[four + odd], t[four + odd + 2], _MM_SHUFFLE(1, 0, 1, 0));
            r[four + 2 * odd + 1] = _mm512_shuffle_ps(t[four + odd], t[four + odd + 2], _MM_SHUFFLE(3, 2, 3, 2));
        }
    for (int row = 0; row < 4; row++) {
        VEC a = _mm512_shuffle_f32x4(r[row], r[row + 4], 0x88), b = _mm512_shuffle_f32x4(r[row], r[row + 4], 0xdd);
        VEC c = _mm512_shuffle_f32x4(r[row + 8], r[row + 12], 0x88), d = _mm512_shuffle_f32x4(r[row + 8], r[row + 12], 0xdd);
        r[row] = _mm512_shuffle_f32x4(a, c, 0x88);
        r[row + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
        r[row + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
        r[row + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
}
static inline VEC v_load_u8(const uint8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
typedef __m512i BITS_VEC;
static inline __m512i v_pairs(const uint8_t *p) { return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p)); }
static inline VEC v_field(__m512i v, int shift, int bits) {
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(v, shift), _mm512_set1_epi32((1 << bits) - 1)));
}
