/* pages.c: encode and decode whole pages, one task per page and head. */
#if defined(__linux__)
#define _DEFAULT_SOURCE
#include <sys/mman.h>
#endif
#include <string.h>

#include "isa.h"
#include "layout.h"
#include "scales.h"
#include "spread.h"

typedef struct {
    const tqai_page_format *format;
    const tqai_kernels *kernels;
    const tqai_source *keys, *values;
    uint8_t *pages;
    const uint8_t *raw;
    void *out_keys, *out_values;
    int64_t heads, total, chunk;
    int32_t dtype;
} job;

static const void *row_at(const tqai_source *s, int64_t page, int64_t head) {
    return (const char *)s->data + (page * s->strides[0] + head * s->strides[1]) * (s->dtype == TQAI_FLOAT32 ? 4 : 2);
}

static int served(const tqai_page_format *f) { return tqai_serves(&f->key) && tqai_serves(&f->value); }

/* What encodes and decodes a side: the codec's own steps, or those of scalar codes. */
static void encode_side(const tqai_kernels *kernels, const tqai_codec *codec, int is_value, const void *rows,
                        int64_t row_stride, int dtype, uint8_t *codes, uint16_t *scales) {
    const tqai_codec_steps *steps = kernels->steps[codec->kind];
    (steps ? steps->encode_side : kernels->encode_side)(codec, is_value, rows, row_stride, dtype, codes, scales);
}

static void decode_side(const tqai_kernels *kernels, const tqai_codec *codec, int is_value, const uint8_t *codes,
                        const float *scales, int dtype, void *out) {
    const tqai_codec_steps *steps = kernels->steps[codec->kind];
    (steps ? steps->decode_side : kernels->decode_side)(codec, is_value, codes, scales, dtype, out);
}

static void encode_task(void *context, int task) {
    const job *j = context;
    const tqai_page_format *f = j->format;
    for (int64_t i = task * j->chunk; i < (task + 1) * j->chunk && i < j->total; i++)
        for (int is_value = 0; is_value < 2; is_value++) {
            uint8_t *page = j->pages + i * f->page_bytes;
            const tqai_source *from = is_value ? j->values : j->keys;
            uint16_t scales[TQAI_PAGE_TOKENS];
            encode_side(j->kernels, is_value ? &f->value : &f->key, is_value, row_at(from, i / j->heads, i % j->heads),
                        from->strides[2], from->dtype, page + (is_value ? f->value_codes_at : 0), scales);
            tqai_write_scales(f, page, is_value, scales);
        }
}

static void decode_task(void *context, int task) {
    const job *j = context;
    const tqai_page_format *f = j->format;
    const int64_t size = TQAI_PAGE_TOKENS * (j->dtype == TQAI_FLOAT32 ? 4 : 2);
    for (int64_t i = task * j->chunk; i < (task + 1) * j->chunk && i < j->total; i++)
        for (int is_value = 0; is_value < 2; is_value++) {
            const uint8_t *page = j->raw + i * f->page_bytes;
            const tqai_codec *codec = is_value ? &f->value : &f->key;
            void *out = is_value ? j->out_values : j->out_keys;
            float scales[TQAI_PAGE_TOKENS];
            if (!out) continue;
            j->kernels->scales(f, page, is_value, 1.0f, scales);
            decode_side(j->kernels, codec, is_value, page + (is_value ? f->value_codes_at : 0), scales, j->dtype,
                        (char *)out + i * size * codec->head_dim);
        }
}

/* Where much is written at once, such as the pages of a prompt, ask for large memory pages: every later step
 * reads them all, and a tenth of that time goes into finding small ones. Up to the ends of the large pages that it
 * begins and ends in, as the next call may go on there. Advice; nothing depends on it. */
static void advise_large_pages(uint8_t *out, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t large = 2 << 20, begin = (uintptr_t)out & ~(large - 1);
    const uintptr_t end = ((uintptr_t)out + (uintptr_t)bytes + large - 1) & ~(large - 1);
    if (bytes >= (int64_t)large) (void)madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#else
    (void)out, (void)bytes;
#endif
}

static void spread(job *j, int threads, tqai_task task) {
    const int64_t wanted = threads > 1 ? 8 * (int64_t)threads : 1;
    j->chunk = (j->total + wanted - 1) / wanted;
    tqai_spread(threads, (int)((j->total + j->chunk - 1) / j->chunk), 0, task, j);
}

int32_t tqai_encode(const tqai_page_format *format, const tqai_source *keys, const tqai_source *values,
                    uint8_t *out, int64_t pages, int64_t heads, int32_t threads) {
    if (!format || !keys || !values || !keys->data || !values->data || !out) return TQAI_NULL;
    if ((uintptr_t)out % 2) return TQAI_UNALIGNED;
    if (!served(format) || pages < 0 || heads < 1 || keys->dtype < 0 || keys->dtype > 2 || values->dtype < 0 ||
        values->dtype > 2)
        return TQAI_BAD_SIZE;
    if (pages == 0) return TQAI_OK;
    job j = {.format = format, .kernels = tqai_chosen(), .keys = keys, .values = values, .pages = out,
             .heads = heads, .total = pages * heads};
    advise_large_pages(out, j.total * format->page_bytes);
    spread(&j, threads, encode_task);
    return TQAI_OK;
}

int32_t tqai_decode(const tqai_page_format *format, const uint8_t *raw, void *keys, void *values, int32_t dtype,
                    int64_t pages, int32_t threads) {
    if (!format || !raw) return TQAI_NULL;
    if ((uintptr_t)raw % 2) return TQAI_UNALIGNED;
    if (!served(format) || pages < 0 || dtype < 0 || dtype > 2) return TQAI_BAD_SIZE;
    if (pages == 0) return TQAI_OK;
    job j = {.format = format, .kernels = tqai_chosen(), .raw = raw, .out_keys = keys, .out_values = values,
             .total = pages, .dtype = dtype};
    spread(&j, threads, decode_task);
    return TQAI_OK;
}
