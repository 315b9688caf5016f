/* Vectors of four floats in the compiler's own vector types: any architecture. */
#include <math.h>
#include <string.h>

#define LANES 4
#define ROW_TILE 2
#define TILE_INPUTS 2
#define PANEL_VECTORS 4
typedef float VEC __attribute__((vector_size(16)));
typedef int32_t IVEC __attribute__((vector_size(16)));
typedef uint16_t HALVES __attribute__((vector_size(8)));

static inline VEC v_set1(float x) { return (VEC){x, x, x, x}; }
static inline VEC v_load(const float *p) { VEC v; memcpy(&v, p, sizeof v); return v; }
static inline void v_store(float *p, VEC v) { memcpy(p, &v, sizeof v); }
static inline VEC v_add(VEC a, VEC b) { return a + b; }
static inline VEC v_sub(VEC a, VEC b) { return a - b; }
static inline VEC v_mul(VEC a, VEC b) { return a * b; }
static inline VEC v_div(VEC a, VEC b) { return a / b; }
static inline VEC v_fma(VEC a, VEC b, VEC c) { return a * b + c; }
/* a < b ? x : y, lane by lane */
static inline VEC v_select_less(VEC a, VEC b, VEC x, VEC y) {
    IVEC mask = a < b;
    return (VEC)((mask & (IVEC)x) | (~mask & (IVEC)y));
}
static inline VEC v_max(VEC a, VEC b) { return v_select_less(a, b, b, a); }
static inline VEC v_min(VEC a, VEC b) { return v_select_less(b, a, b, a); }
static inline VEC v_round(VEC a) {
    return (VEC){nearbyintf(a[0]), nearbyintf(a[1]), nearbyintf(a[2]), nearbyintf(a[3])};
}
static inline VEC v_exponent(VEC n) { return (VEC)((__builtin_convertvector(n, IVEC) + 127) << 23); }
static inline float v_sum(VEC a) { return (a[0] + a[2]) + (a[1] + a[3]); }
static inline float v_highest(VEC a) { return fmaxf(fmaxf(a[0], a[1]), fmaxf(a[2], a[3])); }
static inline void v_sum4(float *p, VEC a, VEC b, VEC c, VEC d) {
    p[0] = v_sum(a), p[1] = v_sum(b), p[2] = v_sum(c), p[3] = v_sum(d);
}

static inline VEC v_load_bf16(const uint16_t *p) {
    HALVES h;
    memcpy(&h, p, sizeof h);
    return (VEC)(__builtin_convertvector(h, IVEC) << 16);
}
static inline void v_store_bf16(uint16_t *p, VEC v) {
    IVEC bits = (IVEC)v;
    bits += 0x7fff + ((bits >> 16) & 1);
    HALVES h = __builtin_convertvector(bits >> 16, HALVES);
    memcpy(p, &h, sizeof h);
}

static inline float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 0x3ff;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * (float)fraction * 0x1p-24f;
    uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
static inline uint16_t float_to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;
    if (bits < 0x38800000) return sign | (uint16_t)nearbyintf(fabsf(value) * 0x1p24f); /* subnormal half */
    bits += 0xfff + (bits >> 13 & 1);
    return sign | (uint16_t)((bits - 0x38000000) >> 13);
}
static inline VEC v_load_f16(const uint16_t *p) {
    HALVES h;
    memcpy(&h, p, sizeof h);
    return (VEC){half_to_float(h[0]), half_to_float(h[1]), half_to_float(h[2]), half_to_float(h[3])};
}
static inline void v_store_f16(uint16_t *p, VEC v) {
    HALVES h = {float_to_half(v[0]), float_to_half(v[1]), float_to_half(v[2]), float_to_half(v[3])};
    memcpy(p, &h, sizeof h);
}

/* The square of vectors with its rows and columns exchanged. */
static inline void v_transpose(VEC *rows) {
    for (int row = 0; row < LANES; row++)
        for (int column = 0; column < row; column++) {
            float value = rows[row][column];
            rows[row][column] = rows[column][row];
            rows[column][row] = value;
        }
}
/* Pairs of bytes, each byte in half of a lane; and ``bits`` of every lane from ``shift`` on, as numbers. */
static inline VEC v_load_u8(const uint8_t *p) { return (VEC){p[0], p[1], p[2], p[3]}; }
typedef IVEC BITS_VEC;
static inline IVEC v_pairs(const uint8_t *p) {
    return (IVEC){p[0] | p[1] << 16, p[2] | p[3] << 16, p[4] | p[5] << 16, p[6] | p[7] << 16};
}
static inline VEC v_field(IVEC v, int shift, int bits) {
    return __builtin_convertvector((v >> shift) & ((1 << bits) - 1), VEC);
}
