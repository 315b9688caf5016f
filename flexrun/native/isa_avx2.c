/* The kernels for AVX2. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <stdint.h>

#include "simd_avx2.h"
#include "math.inc.h"
#include "elementwise.inc.h"
#include "attention.inc.h"
#include "coded.inc.h"
#include "groupwise.inc.h"

const struct kernels kernels_avx2 = {"avx2", attend_chunk, finish_rows, NULL, rms_norm_row, gated_row, rope_head, &groupwise, attend_coded};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
