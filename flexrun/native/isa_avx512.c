/* The kernels for AVX-512. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
#include <stdint.h>

#include "simd_avx512.h"
#include "math.inc.h"
#include "elementwise.inc.h"
#include "attention.inc.h"
#include "coded.inc.h"
#include "groupwise.inc.h"

const struct kernels kernels_avx512 = {"avx512", attend_chunk, finish_rows, NULL, rms_norm_row, gated_row, rope_head, &groupwise, attend_coded};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
