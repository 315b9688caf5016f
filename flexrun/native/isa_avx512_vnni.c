/* The kernels for AVX-512 with dot products of 8 bits. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
#include <stdint.h>

#define HAVE_INT8_DOT
#include "simd_avx512.h"
#include "math.inc.h"
#include "elementwise.inc.h"
#include "attention.inc.h"
#include "coded.inc.h"
#include "groupwise.inc.h"

const struct kernels kernels_avx512_vnni = {"avx512_vnni", attend_chunk, finish_rows, NULL, rms_norm_row, gated_row, rope_head, &groupwise, attend_coded};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
