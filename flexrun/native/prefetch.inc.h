/* KV asked for in the order of memory, while heads are computed on in an order no hardware prefetcher follows. */
#define AHEAD_BYTES 16384 /* how far ahead of computing KV is prefetched */

/* What is prefetched next. `after`: where to go on at the end. Every `pause`-th call is left out. */
struct ahead {
    const char *line, *row_end, *after;
    int64_t row_bytes, stride_bytes, rows; /* bytes read of a row, from one row to the next; rows left with this one */
    int64_t after_rows, after_stride_bytes;
    int64_t calls, pause;
};

/* From AHEAD_BYTES behind `base` on; nothing where heads do not lie together. row_elements: of the heads computed. */
INLINE struct ahead ahead_of(const void *base, int64_t stride, int64_t rows, const void *after, int64_t after_stride,
                             int64_t after_rows, int64_t row_elements, int together, int dtype) {
    int64_t bytes = element_bytes(dtype), row_bytes = row_elements * bytes, stride_bytes = stride * bytes;
    int64_t skipped = AHEAD_BYTES / row_bytes, within = AHEAD_BYTES % row_bytes;
    after_stride *= bytes;
    if (skipped >= rows) base = after, skipped -= rows, rows = after_rows, stride_bytes = after_stride, after_rows = 0;
    if (skipped >= rows || !together) skipped = rows = 0;
    const char *row = (const char *)base + skipped * stride_bytes;
    return (struct ahead){row + within,       row + row_bytes, (const char *)after, row_bytes, stride_bytes,
                          rows - skipped, after_rows,      after_stride,        INT64_MAX, INT64_MAX};
}

INLINE void prefetch_lines(struct ahead *ahead, int lines) {
    if (ahead->rows <= 0) return;
    if (--ahead->calls <= 0) {
        ahead->calls = ahead->pause;
        return;
    }
    for (int line = 0; line < lines; line++) __builtin_prefetch(ahead->line + 64 * line, 0, 3);
    ahead->line += 64 * lines;
    if (ahead->line < ahead->row_end) return;
    int64_t over = ahead->line - ahead->row_end;
    if (--ahead->rows > 0) {
        ahead->row_end += ahead->stride_bytes;
    } else {
        ahead->rows = ahead->after_rows, ahead->after_rows = 0, ahead->stride_bytes = ahead->after_stride_bytes;
        ahead->row_end = ahead->after + ahead->row_bytes;
    }
    ahead->line = ahead->row_end - ahead->row_bytes + over;
}
