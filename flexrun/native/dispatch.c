/* The exported functions: choose the instruction set once, then spread rows and sequences over threads.
 *
 * Built without any header of torch or Python and called through ctypes, which releases the interpreter lock.
 * OpenMP regions always ask for the same number of threads as torch's own, whose pool they share.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#define EXPORT __attribute__((visibility("default")))
#define SERIAL_ELEMENTS 16384 /* below this a parallel region costs more than it saves */

static const struct kernels *kernels = &kernels_portable;

const struct kernels *flexrun_selected(void) { return kernels; }

/* Use the named instruction set, or the best one for NULL. Returns its name, or NULL where this CPU lacks it. */
EXPORT const char *flexrun_select(const char *name) {
    const struct kernels *found[5];
    int count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    int vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    if (vnni && __builtin_cpu_supports("avx512bf16")) found[count++] = &kernels_avx512_bf16;
    if (vnni) found[count++] = &kernels_avx512_vnni;
    if (avx512) found[count++] = &kernels_avx512;
    if (avx2) found[count++] = &kernels_avx2;
#endif
    found[count++] = &kernels_portable;
    for (int entry = 0; entry < count; entry++) {
        if (!name || !strcmp(name, found[entry]->name)) {
            kernels = found[entry];
            return kernels->name;
        }
    }
    return NULL;
}

/* Changes whenever a struct or the meaning of an argument does: __init__.py refuses a library of another number. */
EXPORT int flexrun_layout(void) { return 5; }

EXPORT void flexrun_rms_norm(const struct norm *n, int threads) {
    int64_t bytes = element_bytes(n->dtype), rows = n->outer * n->inner;
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * n->width > SERIAL_ELEMENTS)
    for (int64_t row = 0; row < rows; row++) {
        int64_t outer = row / n->inner, inner = row % n->inner;
        char *hidden = (char *)n->hidden + (outer * n->hidden_stride + inner * n->hidden_inner_stride) * bytes;
        char *out = (char *)n->out + (outer * n->out_stride + inner * n->out_inner_stride) * bytes;
        const char *branch = n->branch ? (const char *)n->branch + outer * n->branch_stride * bytes : NULL;
        kernels->rms_norm_row(n, hidden, branch, n->weight, out);
    }
}

EXPORT void flexrun_gated(const struct gated *g, int threads) {
    int64_t bytes = element_bytes(g->dtype);
#pragma omp parallel for num_threads(threads) if (threads > 1 && g->rows * g->width > SERIAL_ELEMENTS)
    for (int64_t row = 0; row < g->rows; row++)
        kernels->gated_row((const char *)g->gate + row * g->gate_stride * bytes,
                           (const char *)g->up + row * g->up_stride * bytes,
                           (char *)g->out + row * g->out_stride * bytes, g->width, g->activation, g->dtype);
}

EXPORT void flexrun_rope(const struct rope *r, int threads) {
    int64_t bytes = element_bytes(r->dtype);
#pragma omp parallel for num_threads(threads) if (threads > 1 && r->rows * r->heads * r->half > SERIAL_ELEMENTS)
    for (int64_t row = 0; row < r->rows; row++)
        for (int64_t head = 0; head < r->heads; head++)
            kernels->rope_head((char *)r->x + (row * r->stride + head * r->head_stride) * bytes,
                               r->cosine + row * r->half, r->sine + row * r->half, r->half, r->dtype);
}

/* A segment as the caller numbers it: five int64 arrays of length count behind one another. */
struct segment {
    int64_t query_row, query_len, kv_row, kv_len; /* KV rows seen by any query: what none sees is already cut */
    int64_t query_position, position;             /* of the first query and KV row, from the segment's first KV row */
};

static struct segment segment_at(const struct attention *a, const int64_t *segments, int64_t count, int64_t index) {
    struct segment s = {segments[index],             segments[count + index],     segments[2 * count + index],
                        segments[3 * count + index], segments[4 * count + index], 0};
    if (s.kv_len > s.query_position + s.query_len) s.kv_len = s.query_position + s.query_len;
    int64_t first = s.query_position - a->window + 1;
    if (a->window && first > 0) {
        s.position = first;
        s.kv_row += first;
        s.kv_len -= first;
    }
    if (s.kv_len < 0) s.kv_len = 0;
    return s;
}

/* At least one, so that a segment that sees nothing is finished too. */
static int64_t chunk_count(const struct segment *s) {
    return s->kv_len > CHUNK_TOKENS ? (s->kv_len + CHUNK_TOKENS - 1) / CHUNK_TOKENS : 1;
}

static struct chunk chunk_at(const struct segment *s, int64_t index) {
    int64_t first = index * CHUNK_TOKENS, left = s->kv_len - first;
    struct chunk chunk = {s->query_row,     s->query_len, s->query_position,
                          s->kv_row + first, left < CHUNK_TOKENS ? left : CHUNK_TOKENS,
                          s->position + first,
                          s->kv_row + first + CHUNK_TOKENS, left - CHUNK_TOKENS};
    return chunk;
}

static struct partial partial_at(float *memory, int64_t rows, int64_t head_dim) {
    struct partial partial = {memory, memory + rows * head_dim, memory + rows * (head_dim + 1)};
    return partial;
}

void flexrun_merge(const struct partial *into, const struct partial *from, int64_t rows, int64_t head_dim) {
    for (int64_t row = 0; row < rows; row++) {
        float old = into->maximum[row], new = from->maximum[row];
        if (new == -INFINITY) continue;
        float highest = old > new ? old : new;
        float keep = expf(old - highest), add = expf(new - highest);
        float *target = into->sum_values + row * head_dim;
        const float *source = from->sum_values + row * head_dim;
        for (int64_t column = 0; column < head_dim; column++)
            target[column] = target[column] * keep + source[column] * add;
        into->maximum[row] = highest;
        into->sum[row] = into->sum[row] * keep + from->sum[row] * add;
    }
}

/* What one thread takes: a whole segment, or one chunk of a segment that is split over threads. */
struct item {
    int64_t segment, chunk; /* chunk -1: whole */
    float *partial;         /* of the chunk */
};

static struct chunk item_chunk(const struct attention *a, const int64_t *segments, int64_t count,
                               const struct item *item) {
    struct segment s = segment_at(a, segments, count, item->segment);
    return chunk_at(&s, item->chunk < 0 ? 0 : item->chunk);
}

/* segments: int64[5][count], the table of flexrun.attention.Segments. Returns 0, or -1 where memory is short. */
EXPORT int flexrun_attend(const struct attention *a, const int64_t *segments, int64_t count, int threads) {
    int64_t total_tokens = 0, longest_query = 0, head_dim = a->head_dim;
    for (int64_t index = 0; index < count; index++) {
        struct segment s = segment_at(a, segments, count, index);
        total_tokens += s.kv_len;
        if (s.query_len > longest_query) longest_query = s.query_len;
    }
    if (total_tokens * a->num_kv_heads * head_dim < SERIAL_ELEMENTS) threads = 1;
    /* splitting what is below a sixteenth of a thread's share would gain nothing */
    int64_t whole_tokens = threads == 1 ? INT64_MAX : total_tokens / threads / 16;
    int64_t item_count = 0, split_rows = 0, whole = 0, chunked = 0;
    for (int64_t index = 0; index < count; index++) {
        struct segment s = segment_at(a, segments, count, index);
        int64_t chunks = s.kv_len > whole_tokens ? chunk_count(&s) : 1;
        item_count += chunks;
        if (chunks > 1) split_rows += chunks * s.query_len * a->num_heads;
        else chunked++;
    }
    int64_t thread_rows = longest_query * a->num_heads;
    int64_t thread_floats = thread_rows * (2 * (head_dim + 2) + head_dim + BLOCK_TOKENS + 1);
    struct item *items = malloc((size_t)item_count * sizeof *items);
    float *memory = malloc((size_t)(split_rows * (head_dim + 2) + threads * thread_floats) * sizeof *memory);
    if (!items || !memory) {
        free(items);
        free(memory);
        return -1;
    }
    /* whole segments first, so that the small chunks even out the end */
    float *next = memory + threads * thread_floats;
    for (int64_t index = 0; index < count; index++) {
        struct segment s = segment_at(a, segments, count, index);
        int64_t chunks = s.kv_len > whole_tokens ? chunk_count(&s) : 1;
        if (chunks == 1) items[whole++] = (struct item){index, -1, NULL};
        for (int64_t chunk = 0; chunks > 1 && chunk < chunks; chunk++) {
            items[chunked++] = (struct item){index, chunk, next};
            next += s.query_len * a->num_heads * (head_dim + 2);
        }
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int thread = thread_number();
        float *own = memory + thread * thread_floats;
        float *workspace = own + 2 * thread_rows * (head_dim + 2);
#pragma omp for schedule(dynamic, 1)
        for (int64_t number = 0; number < item_count; number++) {
            struct item item = items[number];
            struct segment s = segment_at(a, segments, count, item.segment);
            struct chunk after = {0};
            if (number + threads < item_count) after = item_chunk(a, segments, count, &items[number + threads]);
            int64_t rows = s.query_len * a->num_heads;
            if (item.chunk >= 0) {
                struct chunk chunk = chunk_at(&s, item.chunk);
                chunk.after_row = after.kv_row, chunk.after_len = after.kv_len;
                struct partial partial = partial_at(item.partial, rows, head_dim);
                kernels->attend_chunk(a, &chunk, &partial, workspace);
                continue;
            }
            struct partial result = partial_at(own, rows, head_dim);
            struct partial part = partial_at(own + rows * (head_dim + 2), rows, head_dim);
            struct chunk chunk;
            for (int64_t index = 0; index < chunk_count(&s); index++) {
                chunk = chunk_at(&s, index);
                if (chunk.after_len <= 0) chunk.after_row = after.kv_row, chunk.after_len = after.kv_len;
                kernels->attend_chunk(a, &chunk, index ? &part : &result, workspace);
                if (index) flexrun_merge(&result, &part, rows, head_dim);
            }
            kernels->finish_rows(a, &chunk, &result);
        }
        /* the chunks of a segment are consecutive items */
#pragma omp for schedule(dynamic, 1)
        for (int64_t number = whole; number < item_count; number++) {
            struct item item = items[number];
            if (item.chunk != 0) continue;
            struct segment s = segment_at(a, segments, count, item.segment);
            int64_t rows = s.query_len * a->num_heads;
            struct partial result = partial_at(item.partial, rows, head_dim);
            for (int64_t index = 1; index < chunk_count(&s); index++) {
                struct partial part = partial_at(items[number + index].partial, rows, head_dim);
                flexrun_merge(&result, &part, rows, head_dim);
            }
            struct chunk chunk = chunk_at(&s, 0);
            kernels->finish_rows(a, &chunk, &result);
        }
    }
    free(items);
    free(memory);
    return 0;
}

/* Floats that prefill_item works in: outputs, maxima and sums of its rows, and one packed block of keys and values. */
static int64_t prefill_floats(const struct attention *a) {
    int64_t rows = PREFILL_QUERIES * (a->num_heads / a->num_kv_heads);
    return rows * (a->head_dim + 2) + PREFILL_TOKENS * a->head_dim;
}

/* As flexrun_attend, for long segments of bfloat16. Returns 1 where this CPU has no kernel for it. */
EXPORT int flexrun_prefill(const struct attention *a, const int64_t *segments, int64_t count, int threads) {
    if (!kernels->prefill_item || a->dtype != BFLOAT16) return 1;
    int64_t items = 0, done = 0, floats = prefill_floats(a);
    for (int64_t index = 0; index < count; index++)
        items += (segments[count + index] + PREFILL_QUERIES - 1) / PREFILL_QUERIES * a->num_kv_heads;
    struct prefill *work = malloc((size_t)items * sizeof *work);
    float *memory = malloc((size_t)(threads * floats) * sizeof *memory);
    if (!work || !memory) {
        free(work);
        free(memory);
        return -1;
    }
    for (int64_t index = 0; index < count; index++) {
        int64_t query_len = segments[count + index], position = segments[4 * count + index];
        /* the last queries see most and take longest: first */
        for (int64_t block = (query_len - 1) / PREFILL_QUERIES; block >= 0; block--) {
            int64_t start = block * PREFILL_QUERIES, left = query_len - start;
            for (int64_t kv_head = 0; kv_head < a->num_kv_heads; kv_head++)
                work[done++] = (struct prefill){segments[index] + start,
                                                left < PREFILL_QUERIES ? left : PREFILL_QUERIES, position + start,
                                                segments[2 * count + index], segments[3 * count + index], kv_head};
        }
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int thread = thread_number();
#pragma omp for schedule(dynamic, 1)
        for (int64_t number = 0; number < items; number++)
            kernels->prefill_item(a, &work[number], memory + thread * floats);
    }
    free(work);
    free(memory);
    return 0;
}
