/* Vectors of eight floats: AVX2, FMA, F16C. */
#include <immintrin.h>

#define LANES 8
#define ROW_TILE 2
#define TILE_INPUTS 6
#define PANEL_VECTORS 2
typedef __m256 VEC;

static inline VEC v_set1(float x) { return _mm256_set1_ps(x); }
static inline VEC v_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void v_store(float *p, VEC v) { _mm256_storeu_ps(p, v); }
static inline VEC v_add(VEC a, VEC b) { return _mm256_add_ps(a, b); }
static inline VEC v_sub(VEC a, VEC b) { return _mm256_sub_ps(a, b); }
static inline VEC v_mul(VEC a, VEC b) { return _mm256_mul_ps(a, b); }
static inline VEC v_div(VEC a, VEC b) { return _mm256_div_ps(a, b); }
static inline VEC v_fma(VEC a, VEC b, VEC c) { return _mm256_fmadd_ps(a, b, c); }
static inline VEC v_select_less(VEC a, VEC b, VEC x, VEC y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
static inline VEC v_max(VEC a, VEC b) { return _mm256_max_ps(a, b); }
static inline VEC v_min(VEC a, VEC b) { return _mm256_min_ps(a, b); }
static inline VEC v_round(VEC a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline VEC v_exponent(VEC n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
static inline __m128 fold(VEC a) { return _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)); }
static inline void v_sum4(float *p, VEC a, VEC b, VEC c, VEC d) {
    _mm_storeu_ps(p, fold(_mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d))));
}
static inline float v_sum(VEC a) {
    __m128 x = fold(a);
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
static inline float v_highest(VEC a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
static inline VEC v_load_bf16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
static inline void v_store_bf16(uint16_t *p, VEC v) {
    __m256i bits = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    _mm_storeu_si128((__m128i *)p, packed);
}
static inline VEC v_load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
static inline void v_store_f16(uint16_t *p, VEC v) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
static inline void v_transpose(VEC *r) {
    VEC t[8];
    for (int row = 0; row < 8; row += 2) {
        t[row] = _mm256_unpacklo_ps(r[row], r[row + 1]);
        t[row + 1] = _mm256_unpackhi_ps(r[row], r[row + 1]);
    }
    for (int half = 0; half < 8; half += 4)
        for (int odd = 0; odd < 2; odd++) {
            r[half + 2 * odd] = _mm256_shuffle_ps(t[half + odd], t[half + odd + 2], _MM_SHUFFLE(1, 0, 1, 0));
            r[half + 2 * odd + 1] = _mm256_shuffle_ps(t[half + odd], t[half + odd + 2], _MM_SHUFFLE(3, 2, 3, 2));
        }
    for (int row = 0; row < 4; row++) {
        VEC low = r[row], high = r[row + 4];
        r[row] = _mm256_permute2f128_ps(low, high, 0x20);
        r[row + 4] = _mm256_permute2f128_ps(low, high, 0x31);
    }
}
static inline VEC v_load_u8(const uint8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
typedef __m256i BITS_VEC;
static inline __m256i v_pairs(const uint8_t *p) { return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p)); }
static inline VEC v_field(__m256i v, int shift, int bits) {
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(v, shift), _mm256_set1_epi32((1 << bits) - 1)));
}
