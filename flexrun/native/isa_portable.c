/* The kernels for any architecture. */
#include <stdint.h>

#include "simd_portable.h"
#include "math.inc.h"
#include "elementwise.inc.h"
#include "attention.inc.h"
#include "coded.inc.h"
#include "groupwise.inc.h"

const struct kernels kernels_portable = {"portable", attend_chunk, finish_rows, NULL, rms_norm_row, gated_row, rope_head, &groupwise, attend_coded};
