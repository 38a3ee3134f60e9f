/* A few rows times a matrix: y = x W' + bias. Decoding reads every weight once per token, so the memory is the limit.

   W: (outputs, inputs), inputs a multiple of 64: float32, float16, bfloat16, or int8 with a scale per output.
   x: (rows, inputs), y: (rows, outputs), float32. Every number of y is summed in one order, whatever the other rows. */

#include <immintrin.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

/* of the OpenMP library that torch has loaded: with one of its own, their threads would wait for each other */
extern void GOMP_parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags);

#define WITH_AVX2 __attribute__((target("avx2,fma,f16c")))
#define WITH_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

enum { MOST = 8, BLOCK = 64, SHARES = 8, LEAST = 16, SMALL = 1 << 15, AHEAD = 512 };
enum { FLOAT32, FLOAT16, BFLOAT16, INT8, UNROUNDED };  /* the last: int8 weights, float32 rows */

typedef struct {
    int kind, has_avx512;
    long outputs, inputs;
    const void *weights;
    const float *scales;   /* of int8 and UNROUNDED */
    const int32_t *sums;   /* of int8: of each output's weights */
    const float *bias;     /* or NULL */
} Matrix;

typedef struct {
    const Matrix *matrix;
    const void *x;         /* float32, or int8 */
    const float *scales;   /* of the rows of int8 */
    float *y;
    long rows, share;
    atomic_long next;      /* output that no thread has taken yet */
} Job;

/* The dot products of O outputs, `apart` from each other, and R rows. Constant O and R keep the sums in registers. */
#define TILE(NAME, TARGET, WEIGHT, NUMBER, VECTOR, SUM, ZERO, STEP, READ_WEIGHT, READ_X, ADD, TOTAL)                   \
    TARGET INLINE void NAME##_tile(const WEIGHT *w, long apart, const NUMBER *x, long n, int O, int R,                 \
                                   SUM total[MOST][MOST]) {                                                            \
        VECTOR sums[MOST][MOST];                                                                                       \
        UNROLL for (int o = 0; o < O; o++) UNROLL for (int r = 0; r < R; r++) sums[o][r] = ZERO();                     \
        for (long i = 0; i < n; i += STEP) {                                                                           \
            VECTOR b[MOST];                                                                                            \
            UNROLL for (int r = 0; r < R; r++) b[r] = READ_X(x + r * n + i);                                           \
            UNROLL for (int o = 0; o < O; o++) {                                                                       \
                const WEIGHT *at = w + o * apart * n + i;                                                              \
                if (R == 1) _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);                                       \
                VECTOR a = READ_WEIGHT(at);                                                                            \
                UNROLL for (int r = 0; r < R; r++) sums[o][r] = ADD(sums[o][r], a, b[r]);                              \
            }                                                                                                          \
        }                                                                                                              \
        UNROLL for (int o = 0; o < O; o++) UNROLL for (int r = 0; r < R; r++) total[o][r] = TOTAL(sums[o][r]);         \
    }

/* Tiles of O outputs, from o on, while there are enough. The outputs of a tile lie far apart, so that each is a stream of
   its own for the processor's prefetcher, which loses neighbouring rows if they are short. */
#define TILES(O, ...)                                                                                                  \
    do {                                                                                                               \
        long apart = (to - from) / (O);                                                                                \
        for (long o = from; o < from + apart; o++) __VA_ARGS__                                                         \
        from += apart * (O);                                                                                           \
    } while (0)

/* The outputs `from` to `to` of all rows, in tiles of 4 x SIDE; of one or two rows, in larger ones. */
#define PRODUCT(NAME, TARGET, WEIGHT, NUMBER, SUM, SIDE, STORE)                                                        \
    TARGET INLINE void NAME##_rows(const Job *job, long o, long apart, int O, long r, int R) {                         \
        const Matrix *m = job->matrix;                                                                                 \
        SUM total[MOST][MOST];                                                                                         \
        const NUMBER *x = (const NUMBER *)job->x + r * m->inputs;                                                      \
        NAME##_tile((const WEIGHT *)m->weights + o * m->inputs, apart, x, m->inputs, O, R, total);                     \
        UNROLL for (int i = 0; i < O; i++) UNROLL for (int k = 0; k < R; k++)                                          \
            job->y[(r + k) * m->outputs + o + i * apart] = STORE(total[i][k], o + i * apart, r + k);                   \
    }                                                                                                                  \
    TARGET static void NAME(const Job *job, long from, long to) {                                                      \
        if (job->rows == 1) TILES(8, NAME##_rows(job, o, apart, 8, 0, 1););                                            \
        if (job->rows == 2) TILES(SIDE * 2, NAME##_rows(job, o, apart, SIDE * 2, 0, 2););                              \
        TILES(4, {                                                                                                     \
            long r = 0;                                                                                                \
            for (; r + SIDE <= job->rows; r += SIDE) NAME##_rows(job, o, apart, 4, r, SIDE);                           \
            for (; r + 2 <= job->rows; r += 2) NAME##_rows(job, o, apart, 4, r, 2);                                    \
            for (; r < job->rows; r++) NAME##_rows(job, o, apart, 4, r, 1);                                            \
        });                                                                                                            \
        TILES(1, for (long r = 0; r < job->rows; r++) NAME##_rows(job, o, apart, 1, r, 1););                           \
    }

/* --- floats --- */

WITH_AVX2 INLINE float total8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
WITH_AVX2 INLINE __m256 half8(const uint16_t *w) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)w)); }
WITH_AVX2 INLINE __m256 brain8(const uint16_t *w) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)w));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
WITH_AVX512 INLINE __m512 half16(const uint16_t *w) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)w)); }
WITH_AVX512 INLINE __m512 brain16(const uint16_t *w) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)w));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
WITH_AVX512 INLINE __m512 load16(const float *x) { return _mm512_loadu_ps(x); }
WITH_AVX2 INLINE __m256 load8(const float *x) { return _mm256_loadu_ps(x); }
WITH_AVX2 INLINE __m256 bytes8(const int8_t *w) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)w)));
}
WITH_AVX512 INLINE __m512 bytes16(const int8_t *w) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)w)));
}
#define ADD16(s, a, b) _mm512_fmadd_ps(a, b, s)
#define ADD8(s, a, b) _mm256_fmadd_ps(a, b, s)
#define WITH_BIAS(total, o, r) (m->bias ? (total) + m->bias[o] : (total))
#define WITH_SCALE(total, o, r) WITH_BIAS((total)*m->scales[o], o, r)

#define FLOATS(NAME, WEIGHT, READ8, READ16, STORE)                                                                     \
    TILE(NAME##_avx2, WITH_AVX2, WEIGHT, float, __m256, float, _mm256_setzero_ps, 8, READ8, load8, ADD8, total8)       \
    PRODUCT(NAME##_avx2, WITH_AVX2, WEIGHT, float, float, 2, STORE)                                                    \
    TILE(NAME##_avx512, WITH_AVX512, WEIGHT, float, __m512, float, _mm512_setzero_ps, 16, READ16, load16, ADD16,       \
         _mm512_reduce_add_ps)                                                                                         \
    PRODUCT(NAME##_avx512, WITH_AVX512, WEIGHT, float, float, 4, STORE)

FLOATS(float32, float, load8, load16, WITH_BIAS)
FLOATS(float16, uint16_t, half8, half16, WITH_BIAS)
FLOATS(bfloat16, uint16_t, brain8, brain16, WITH_BIAS)
FLOATS(unrounded, int8_t, bytes8, bytes16, WITH_SCALE)

/* --- int8: rows are rounded to 127 steps of their largest number --- */

WITH_AVX2 INLINE int32_t total_int8(__m256i v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}
/* pairs are added in 16 bits: 2 x 127 x 127 fits */
WITH_AVX2 INLINE __m256i add_int8(__m256i sum, __m256i w, __m256i x) {
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w, x));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
WITH_AVX2 INLINE __m256i bytes32(const int8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
WITH_AVX512 INLINE __m512i bytes64(const int8_t *p) { return _mm512_loadu_si512(p); }
/* one factor has no sign: x + 128, taken off again by SIGNED */
WITH_AVX512 INLINE __m512i shifted64(const int8_t *p) { return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128)); }
#define ADD64(s, a, b) _mm512_dpbusd_epi32(s, b, a)
#define SCALED(total, o, r) WITH_BIAS((float)(total)*m->scales[o] * job->scales[r], o, r)
#define SIGNED(total, o, r) SCALED((total)-128 * m->sums[o], o, r)

TILE(int8_avx2, WITH_AVX2, int8_t, int8_t, __m256i, int32_t, _mm256_setzero_si256, 32, bytes32, bytes32, add_int8, total_int8)
PRODUCT(int8_avx2, WITH_AVX2, int8_t, int8_t, int32_t, 2, SCALED)
TILE(int8_avx512, WITH_AVX512, int8_t, int8_t, __m512i, int32_t, _mm512_setzero_si512, 64, bytes64, shifted64, ADD64,
     _mm512_reduce_add_epi32)
PRODUCT(int8_avx512, WITH_AVX512, int8_t, int8_t, int32_t, 4, SIGNED)

typedef union { float number; int32_t bits; } Float;

/* Rounds a row to int8 and returns its scale, which is not finite if one of its numbers is not. */
WITH_AVX2 static float rounded(const float *x, int8_t *to, long n) {
    int32_t most = 0;
    for (long i = 0; i < n; i++) {
        Float v = {.number = x[i]};
        int32_t size = v.bits & 0x7FFFFFFF;  /* in the order of the absolute numbers, then infinity, then NaN */
        most = size > most ? size : most;
    }
    Float largest = {.bits = most};
    float per = largest.number > 1e-30f ? 127 / largest.number : 0;
    for (long i = 0; i < n; i++) {
        Float v = {.number = x[i] * per + 0x1.8p23f};  /* whose last bits are the rounded number */
        to[i] = (int8_t)v.bits;
    }
    return largest.number / 127;
}

/* --- threads --- */

static void work(void *data) {
    static void (*const products[5][2])(const Job *, long, long) = {
        {float32_avx2, float32_avx512},
        {float16_avx2, float16_avx512},
        {bfloat16_avx2, bfloat16_avx512},
        {int8_avx2, int8_avx512},
        {unrounded_avx2, unrounded_avx512},
    };
    Job *job = data;
    const Matrix *m = job->matrix;
    long from;
    while ((from = atomic_fetch_add(&job->next, job->share)) < m->outputs) {
        long to = from + job->share < m->outputs ? from + job->share : m->outputs;
        products[m->kind][m->has_avx512](job, from, to);
    }
}

/* Whether this processor has AVX2 (1), and AVX-512 with VNNI (2). */
int instructions(void) {
    /* with F16C, as every processor that has both; older compilers cannot ask for it */
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                 __builtin_cpu_supports("avx512vnni");
    return avx2 ? 1 + avx512 : 0;
}

/* Returns 0, or 1 if memory is short. */
int multiply(const Matrix *m, const float *x, float *y, long rows, int threads) {
    long n = m->inputs, most = rows < BLOCK ? rows : BLOCK;  /* rows that stay in the cache */
    int8_t *bytes = NULL;
    float scales[BLOCK];
    if (m->kind == INT8 && !(bytes = aligned_alloc(64, most * n))) return 1;
    if (rows * n * m->outputs < SMALL) threads = 1;
    long share = (m->outputs / (threads * SHARES) + MOST - 1) / MOST * MOST;
    for (long at = 0; at < rows; at += most) {
        long count = rows - at < most ? rows - at : most;
        Job job = {m, x + at * n, scales, y + at * m->outputs, count, share < LEAST ? LEAST : share, 0};
        if (bytes) {
            for (long r = 0; r < count; r++) scales[r] = rounded(x + (at + r) * n, bytes + r * n, n);
            job.x = bytes;
        }
        if (threads > 1) GOMP_parallel(work, &job, threads, 0);
        else work(&job);
    }
    free(bytes);
    return 0;
}
