/* Loads, stores and elementary functions on VEC, shared by all instruction sets. Included after a simd_*.h. */
#include <math.h>
#include <string.h>

#include "kernels.h"

#define INLINE static inline __attribute__((always_inline))

INLINE VEC v_load_any(const void *base, int64_t index, int dtype) {
    if (dtype == FLOAT32) return v_load((const float *)base + index);
    if (dtype == BFLOAT16) return v_load_bf16((const uint16_t *)base + index);
    return v_load_f16((const uint16_t *)base + index);
}

INLINE void v_store_any(void *base, int64_t index, VEC v, int dtype) {
    if (dtype == FLOAT32) v_store((float *)base + index, v);
    else if (dtype == BFLOAT16) v_store_bf16((uint16_t *)base + index, v);
    else v_store_f16((uint16_t *)base + index, v);
}

/* The last, incomplete vector of a row: elements past count are 0 when loaded and left alone when stored. */
INLINE VEC v_load_part(const void *base, int64_t index, int64_t count, int dtype) {
    if (count >= LANES) return v_load_any(base, index, dtype);
    float buffer[LANES] = {0};
    memcpy(buffer, (const char *)base + index * element_bytes(dtype), (size_t)(count * element_bytes(dtype)));
    return v_load_any(buffer, 0, dtype);
}

INLINE void v_store_part(void *base, int64_t index, VEC v, int64_t count, int dtype) {
    if (count >= LANES) {
        v_store_any(base, index, v, dtype);
        return;
    }
    float buffer[LANES];
    v_store_any(buffer, 0, v, dtype);
    memcpy((char *)base + index * element_bytes(dtype), buffer, (size_t)(count * element_bytes(dtype)));
}

/* Round to the precision of dtype and back. */
INLINE VEC v_rounded(VEC v, int dtype) {
    if (dtype == FLOAT32) return v;
    float buffer[LANES];
    v_store_any(buffer, 0, v, dtype);
    return v_load_any(buffer, 0, dtype);
}

/* exp: reduction to |r| <= ln2/2 and the minimax polynomial of Cephes' expf; relative error about 1e-7.
 * Below -87.3 the result is exactly 0 (float32's smallest normal), above 88.3 it saturates. */
INLINE VEC v_exp(VEC x) {
    VEC lowest = v_set1(-87.3f);
    VEC clamped = v_min(v_max(x, lowest), v_set1(88.3f));
    VEC n = v_round(v_mul(clamped, v_set1(1.44269504088896341f)));
    VEC r = v_fma(n, v_set1(-0.693359375f), clamped);
    r = v_fma(n, v_set1(2.12194440e-4f), r);
    VEC p = v_set1(1.9875691500e-4f);
    p = v_fma(p, r, v_set1(1.3981999507e-3f));
    p = v_fma(p, r, v_set1(8.3334519073e-3f));
    p = v_fma(p, r, v_set1(4.1665795894e-2f));
    p = v_fma(p, r, v_set1(1.6666665459e-1f));
    p = v_fma(p, r, v_set1(5.0000001201e-1f));
    p = v_fma(v_mul(p, r), r, v_add(r, v_set1(1.0f)));
    return v_select_less(x, lowest, v_set1(0.0f), v_mul(p, v_exponent(n)));
}

INLINE VEC v_sigmoid(VEC x) {
    VEC one = v_set1(1.0f);
    return v_div(one, v_add(one, v_exp(v_sub(v_set1(0.0f), x))));
}

/* tanh: its series below 0.3 (where 1 - 2 / (exp(2x) + 1) would cancel), that formula above. */
INLINE VEC v_tanh(VEC x) {
    VEC square = v_mul(x, x);
    VEC series = v_set1(-1382.0f / 155925.0f);
    series = v_fma(series, square, v_set1(62.0f / 2835.0f));
    series = v_fma(series, square, v_set1(-17.0f / 315.0f));
    series = v_fma(series, square, v_set1(2.0f / 15.0f));
    series = v_fma(series, square, v_set1(-1.0f / 3.0f));
    series = v_fma(v_mul(series, square), x, x);
    VEC one = v_set1(1.0f);
    VEC direct = v_sub(one, v_div(v_set1(2.0f), v_add(v_exp(v_add(x, x)), one)));
    return v_select_less(square, v_set1(0.09f), series, direct);
}

/* What a row's sums of values are multiplied by at the end, and the logarithm of its sum of exp(score).
 *
 * sum is relative to maximum. A sink joins the sum here, once a row, however its KV was split. A row that sees nothing
 * becomes 0, and its logarithm that of the sink, or -inf. */
INLINE float finish_sum(const struct attention *a, int64_t head, float maximum, float sum, float *logarithm) {
    float sink = a->sinks ? a->sinks[head] : -INFINITY, top = maximum > sink ? maximum : sink, factor = 0.0f;
    *logarithm = -INFINITY;
    if (top == -INFINITY) return factor;
    float total = sink > -INFINITY ? expf(sink - top) : 0.0f;
    if (sum > 0.0f) {
        factor = maximum < top ? expf(maximum - top) : 1.0f;
        total += sum * factor;
    }
    *logarithm = top + logf(total);
    return factor / total;
}
