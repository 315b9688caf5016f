/* KV in 8 and 4 bits, in records of 64 tokens: see flexrun/compress/kv_groups.py for what their bytes are. */
#ifndef FLEXRUN_CODED_H
#define FLEXRUN_CODED_H

#include <stdint.h>

struct attention;
struct partial;

struct coded {
    const uint8_t *records;
    int64_t record_bytes, key_bytes, value_bytes; /* of a record, and of the keys and of the values of one head in it */
    int key_bits, value_bits;
};

/* Some records of one sequence and the position of their first token, as its decoding query at `query_position` sees
 * them. */
struct coded_chunk {
    int64_t query_row, query_position, record, count, position;
};

/* workspace: see coded_floats */
typedef void attend_coded_function(const struct attention *, const struct coded *, const struct coded_chunk *,
                                   const struct partial *, float *workspace);

#endif
