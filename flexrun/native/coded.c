/* Decoding queries over compressed KV, spread over threads: records first, then the newest tokens, which are whole. */
#include <math.h>
#include <stdlib.h>

#include "kernels.h"

#define EXPORT __attribute__((visibility("default")))
#define CHUNK_RECORDS 16   /* of one partial result: fixed, so that results depend neither on threads nor on others */
#define WHOLE_SEQUENCES 8  /* a thread: with more of them, none is split */

static int64_t coded_floats(const struct attention *a) {
    int64_t rows = a->num_heads / a->num_kv_heads;
    return a->num_heads * (a->head_dim + BLOCK_TOKENS + 1) + rows * (a->head_dim + 1);
}

static int64_t chunks_of(int64_t records) { return (records + CHUNK_RECORDS - 1) / CHUNK_RECORDS; }

static struct partial partial_at(float *memory, const struct attention *a) {
    int64_t values = a->num_heads * a->head_dim;
    return (struct partial){memory, memory + values, memory + values + a->num_heads};
}

/* One sequence: query row, first record, records, first row among the newest tokens, how many these are. */
struct sequence {
    int64_t query_row, record, records, recent_row, recent;
};

static struct sequence sequence_at(const int64_t *table, int64_t count, int64_t index) {
    return (struct sequence){table[index], table[count + index], table[2 * count + index], table[3 * count + index],
                             table[4 * count + index]};
}

static void attend_records(const struct attention *a, const struct coded *c, const struct sequence *s, int64_t chunk,
                           const struct partial *into, float *workspace) {
    int64_t first = chunk * CHUNK_RECORDS, left = s->records - first;
    struct coded_chunk records = {s->query_row, s->records * BLOCK_TOKENS + s->recent - 1, s->record + first,
                                  left < CHUNK_RECORDS ? left : CHUNK_RECORDS, first * BLOCK_TOKENS};
    flexrun_selected()->attend_coded(a, c, &records, into, workspace);
}

/* The newest tokens, the parts of the others, and the result. parts: as many as there are chunks, or NULL where they are
 * found here, one after the other, in `part`. */
static void finish(const struct attention *a, const struct coded *c, const struct sequence *s, float *parts, float *own,
                   float *workspace) {
    int64_t floats = a->num_heads * (a->head_dim + 2);
    struct partial result = partial_at(own, a), part = partial_at(own + floats, a);
    struct chunk newest = {s->query_row, 1, s->recent - 1, s->recent_row, s->recent, 0, 0, 0};
    flexrun_selected()->attend_chunk(a, &newest, &result, workspace);
    for (int64_t chunk = 0; chunk < chunks_of(s->records); chunk++) {
        if (parts) part = partial_at(parts + chunk * floats, a);
        else attend_records(a, c, s, chunk, &part, workspace);
        flexrun_merge(&result, &part, a->num_heads, a->head_dim);
    }
    flexrun_selected()->finish_rows(a, &newest, &result);
}

/* a: keys and values are the newest tokens of all sequences. table: int64[5][count], see struct sequence. Returns 0, or
 * -1 where memory is short. */
EXPORT int flexrun_attend_coded(const struct attention *a, const struct coded *c, const int64_t *table, int64_t count,
                                int threads) {
    int64_t floats = a->num_heads * (a->head_dim + 2), chunks = 0;
    int64_t rows = a->num_heads, own_floats = 2 * floats + rows * (a->head_dim + BLOCK_TOKENS + 1) + coded_floats(a);
    int split = threads > 1 && count < WHOLE_SEQUENCES * threads;
    for (int64_t index = 0; split && index < count; index++) chunks += chunks_of(table[2 * count + index]);
    float *memory = malloc((size_t)(threads * own_floats + chunks * floats) * sizeof *memory);
    int64_t *first = malloc((size_t)(count + 1) * sizeof *first); /* chunk of each sequence */
    if (!memory || !first) {
        free(memory);
        free(first);
        return -1;
    }
    first[0] = 0;
    for (int64_t index = 0; index < count; index++)
        first[index + 1] = first[index] + (split ? chunks_of(table[2 * count + index]) : 0);
    float *parts = memory + threads * own_floats;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *own = memory + thread_number() * own_floats, *workspace = own + 2 * floats;
#pragma omp for schedule(dynamic, 1)
        for (int64_t number = 0; number < chunks; number++) {
            int64_t index = 0; /* few sequences: they are split only then */
            while (first[index + 1] <= number) index++;
            struct sequence s = sequence_at(table, count, index);
            struct partial part = partial_at(parts + number * floats, a);
            attend_records(a, c, &s, number - first[index], &part, workspace);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t index = 0; index < count; index++) {
            struct sequence s = sequence_at(table, count, index);
            finish(a, c, &s, split ? parts + first[index] * floats : NULL, own, workspace);
        }
    }
    free(memory);
    free(first);
    return 0;
}
