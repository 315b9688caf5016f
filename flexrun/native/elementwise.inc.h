/* Row kernels between the matmuls: norms, gated activations, rotary positions. Any width. */

INLINE void rms_norm_row_typed(const struct norm *norm, void *hidden, const void *branch, const void *weight, void *out,
                               int dtype) {
    int64_t width = norm->width;
    VEC squares = v_set1(0.0f), scale = v_set1(norm->branch_scale);
    for (int64_t column = 0; column < width; column += LANES) {
        int64_t count = width - column;
        VEC x = v_load_part(hidden, column, count, dtype);
        if (branch) {
            x = v_rounded(v_fma(v_load_part(branch, column, count, dtype), scale, x), dtype);
            v_store_part(hidden, column, x, count, dtype);
        }
        squares = v_fma(x, x, squares);
    }
    VEC inverse = v_set1(1.0f / sqrtf(v_sum(squares) / (float)width + norm->epsilon));
    VEC offset = v_set1(norm->weight_offset);
    for (int64_t column = 0; column < width; column += LANES) {
        int64_t count = width - column;
        VEC x = v_mul(v_load_part(hidden, column, count, dtype), inverse);
        if (weight) x = v_mul(x, v_add(v_load_part(weight, column, count, dtype), offset));
        v_store_part(out, column, x, count, dtype);
    }
}

/* gelu with tanh: 0.5 x (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3). */
INLINE VEC activate(VEC x, int activation) {
    if (activation == SILU) return v_mul(x, v_sigmoid(x));
    VEC inner = v_fma(v_mul(v_mul(x, x), x), v_set1(0.044715f), x);
    return v_mul(x, v_sigmoid(v_mul(inner, v_set1(1.5957691216057308f))));
}

/* The activation is rounded to dtype before the product, as when the two are separate operators. */
INLINE void gated_row_typed(const void *gate, const void *up, void *out, int64_t width, int activation, int dtype) {
    for (int64_t column = 0; column < width; column += LANES) {
        int64_t count = width - column;
        VEC activated = v_rounded(activate(v_load_part(gate, column, count, dtype), activation), dtype);
        v_store_part(out, column, v_mul(activated, v_load_part(up, column, count, dtype)), count, dtype);
    }
}

INLINE void rope_head_typed(void *head, const float *cosine, const float *sine, int64_t half, int dtype) {
    for (int64_t column = 0; column < half; column += LANES) {
        int64_t count = half - column;
        VEC low = v_load_part(head, column, count, dtype), high = v_load_part(head, half + column, count, dtype);
        VEC c = v_load_part(cosine, column, count, FLOAT32), s = v_load_part(sine, column, count, FLOAT32);
        v_store_part(head, column, v_sub(v_mul(low, c), v_mul(high, s)), count, dtype);
        v_store_part(head, half + column, v_fma(high, c, v_mul(low, s)), count, dtype);
    }
}

#define BY_DTYPE(dtype, call)                       \
    do {                                            \
        if ((dtype) == FLOAT32) { enum { TYPE = FLOAT32 }; call; }        \
        else if ((dtype) == BFLOAT16) { enum { TYPE = BFLOAT16 }; call; } \
        else { enum { TYPE = FLOAT16 }; call; }                           \
    } while (0)

static void rms_norm_row(const struct norm *norm, void *hidden, const void *branch, const void *weight, void *out) {
    BY_DTYPE(norm->dtype, rms_norm_row_typed(norm, hidden, branch, weight, out, TYPE));
}

static void gated_row(const void *gate, const void *up, void *out, int64_t width, int activation, int dtype) {
    if (activation == SILU) BY_DTYPE(dtype, gated_row_typed(gate, up, out, width, SILU, TYPE));
    else BY_DTYPE(dtype, gated_row_typed(gate, up, out, width, GELU_TANH, TYPE));
}

static void rope_head(void *head, const float *cosine, const float *sine, int64_t half, int dtype) {
    BY_DTYPE(dtype, rope_head_typed(head, cosine, sine, half, TYPE));
}
