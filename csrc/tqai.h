/* tqai.h: the C interface of the native CPU backend.
 *
 * Plain C11, no allocation that outlives a call, no global state but the thread pool and the chosen
 * instruction set. Every pointer belongs to the caller. Sizes are in elements unless the name says
 * _bytes. Functions return TQAI_OK or a TQAI_* reason; the Python side checks shapes, dtypes,
 * strides and lengths before it calls; page addresses are checked here, before any is followed.
 */
#ifndef TQAI_H
#define TQAI_H

#include <stdint.h>

#define TQAI_ABI 6
#define TQAI_PAGE_TOKENS 64
#define TQAI_MAX_HEAD_DIM 256

#if defined(__GNUC__)
#define TQAI_API __attribute__((visibility("default")))
#else
#define TQAI_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { TQAI_FLOAT32 = 0, TQAI_BFLOAT16 = 1, TQAI_FLOAT16 = 2 };

enum {
    TQAI_OK = 0,
    TQAI_NULL = 1,      /* a pointer is null */
    TQAI_UNALIGNED = 2, /* a page address is not a multiple of 16 */
    TQAI_BAD_SIZE = 3,  /* a size, a dtype or a number of bits that is not served */
    TQAI_NO_MEMORY = 4
};

/* How codes become levels (codecs in isa.h). */
enum { TQAI_SCALAR = 0, TQAI_TRELLIS = 1, TQAI_KINDS = 2 };

/* One side (keys or values) of a page: what core.scalar.ScalarCodec knows, as plain arrays. */
typedef struct {
    int32_t head_dim;         /* a multiple of 16 up to 256, with (head_dim / 16) % 4 != 3 */
    int32_t bits;             /* 2, 3, 4 or 8 */
    int32_t rounds;           /* rounds of the Hadamard rotation; 0: a matrix */
    int32_t scale_norm;       /* 0: scale = <y,c>/<c,c>; 1: scale = |y| */
    const float *signs;       /* [rounds][head_dim], of -1 and 1 */
    const float *matrix;      /* [head_dim][head_dim]: R, y = R x */
    const float *transposed;  /* [head_dim][head_dim]: R transposed */
    const float *centroids;   /* [2^bits], ascending */
    const float *boundaries;  /* [2^bits - 1], ascending */
    const int16_t *levels;    /* [2^bits]: centroid / level_step, rounded, within +-8191 */
    float level_step;
    float largest_sum;        /* of the absolute factors of levels: an int32 holds (2^31 - 1) / max level */
    float normaliser;         /* of the Hadamard rotation: 1/sqrt(d)^rounds */
    const int8_t *byte_levels; /* [2^bits]: levels, where they are bytes; else null */
    int32_t kind;             /* TQAI_SCALAR, or a kind whose steps this build has (isa.h) */
    const void *tables;       /* of that kind; null for TQAI_SCALAR */
} tqai_codec;

typedef struct {
    tqai_codec key, value;
    int64_t key_scales_at, value_codes_at, value_scales_at, page_bytes;
    int64_t bases_at;            /* 0: scales are bfloat16; else bytes, and the bases of keys and values lie there */
    const float *scale_levels;   /* [256]: scale over base of every byte, or null: core/log_scale.py */
    const float *scale_thresholds; /* [254], descending */
} tqai_page_format;

/* Keys and values of tokens in the model's dtype. Strides in elements: batch, head, token; the last
 * axis is dense. */
typedef struct {
    const void *keys, *values;
    int64_t key_strides[3], value_strides[3];
    int32_t tokens, key_dtype, value_dtype;
    int32_t first_column; /* of the mask, of the first of these tokens */
} tqai_exact;

typedef struct {
    const tqai_page_format *format;
    const int64_t *addresses;  /* [batch][>= pages]: address of KV head 0 of each page */
    int64_t address_stride;
    const int32_t *counts;     /* null, or [batch]: pages of each sequence, 0 to pages; further addresses are not read */
    const void *query;         /* [batch][kv_heads * group][new_tokens][key.head_dim] */
    int64_t query_strides[3];
    void *out;                 /* [batch][kv_heads * group][new_tokens][value.head_dim], dense */
    float *lse;                /* [batch][kv_heads * group][new_tokens], dense */
    const uint8_t *mask;       /* null, or bytes that are 0 where a token is not seen */
    int64_t mask_strides[4];   /* batch, head, new token, column; 0 where broadcast */
    tqai_exact exact[2];       /* sinks, recent; tokens = 0 where there are none */
    int32_t batch, kv_heads, group, new_tokens;
    int32_t pages, first_token; /* first_token: so many tokens of the first page are out of sight */
    int32_t query_dtype, threads;
    int32_t causal;            /* 1 with mask null: own tokens (last of exact[1]) are seen causally */
    float scaling, softcap;    /* softcap 0: none */
} tqai_attend_args;

/* Strided source of whole pages for tqai_encode: strides in elements over page, head, token. */
typedef struct {
    const void *data;
    int64_t strides[3];
    int32_t dtype;
} tqai_source;

TQAI_API int32_t tqai_abi(void);
/* "scalar", "avx2", "avx512" or "neon": what this process computes with. */
TQAI_API const char *tqai_isa(void);
/* Use that instruction set from now on. TQAI_BAD_SIZE if this machine or build has not got it. */
TQAI_API int32_t tqai_set_isa(const char *name);
/* Run on the threads of the host's OpenMP runtime from now on: the address of its GOMP_parallel (libgomp's, or
 * that of a runtime that offers the same), or null for threads of our own. A forked child has its own again. */
TQAI_API void tqai_use_team(void *gomp_parallel);
TQAI_API int32_t tqai_attend(const tqai_attend_args *args);
/* Encode [pages][heads][64][head_dim] into out [pages][heads][page_bytes]. */
TQAI_API int32_t tqai_encode(const tqai_page_format *format, const tqai_source *keys,
                             const tqai_source *values, uint8_t *out, int64_t pages, int64_t heads,
                             int32_t threads);
/* Decode dense pages raw [pages][page_bytes] into keys / values [pages][64][head_dim], dense, of dtype;
 * what exceeds the dtype is clamped to its largest finite number. Either output may be null. */
TQAI_API int32_t tqai_decode(const tqai_page_format *format, const uint8_t *raw, void *keys, void *values,
                             int32_t dtype, int64_t pages, int32_t threads);

#ifdef __cplusplus
}
#endif
#endif
