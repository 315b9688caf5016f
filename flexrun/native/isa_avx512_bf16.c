/* The kernels for AVX-512 with dot products of bfloat16 and of 8 bits. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
#include <stdint.h>

#define HAVE_BF16_DOT
#define HAVE_INT8_DOT
#include "simd_avx512.h"
#include "math.inc.h"
#include "elementwise.inc.h"
#include "attention.inc.h"
#include "coded.inc.h"
#include "groupwise.inc.h"
#include "prefill.inc.h"

const struct kernels kernels_avx512_bf16 = {"avx512_bf16", attend_chunk, finish_rows, prefill_item, rms_norm_row, gated_row, rope_head, &groupwise, attend_coded};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
