/* Vectors of 8 floats (AVX2) and of 16 (AVX-512), and work that threads share.

   A file defines BODY as its own name and includes this one, which includes BODY for either kind, with LANES defined.
   Sums have one order, whatever the number of threads. NaN stays NaN, as in torch: MAX and MIN return their second
   operand if one is NaN. */

#ifndef LANES

#include <immintrin.h>
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

/* of the OpenMP library that torch has loaded: with one of its own, their threads would wait for each other */
extern void GOMP_parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags);

#define INLINE static inline __attribute__((always_inline, target(TARGET)))
#define KERNEL static __attribute__((target(TARGET)))
#define HEAD(VIEW, b, h) ((VIEW).data + (b) * (VIEW).batch + (h) * (VIEW).head)
#define ALL N(all)
#define LOAD N(load)
#define STORE N(store)
#define UNROLL _Pragma("GCC unroll 12")
#define PASTE(name, lanes) name##_##lanes
#define JOIN(name, lanes) PASTE(name, lanes)
#define N(name) JOIN(name, LANES)
#define Vec JOIN(Floats, LANES)
#define Int JOIN(Ints, LANES)

typedef struct {
    void (*work)(void *job, long piece);
    void *job;
    long pieces;
    atomic_long next;
} Queue;

static void drain(void *data) {
    Queue *queue = data;
    for (long i; (i = atomic_fetch_add(&queue->next, 1)) < queue->pieces;) queue->work(queue->job, i);
}

static void share(void (*work)(void *, long), void *job, long pieces, int threads) {
    Queue queue = {work, job, pieces, 0};
    if (threads > 1 && pieces > 1) GOMP_parallel(drain, &queue, threads, 0);
    else drain(&queue);
}

static inline __attribute__((always_inline, target("avx2,fma"))) float sum8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline __attribute__((always_inline, target("avx2,fma"))) float most8(__m256 v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

#define LANES 8
#define TARGET "avx2,fma"
#define TOTAL(a) sum8(a)
#define MOST(a) most8(a)
#define SIDE 4
#define TALL 6
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define MAX(a, b) _mm256_max_ps(a, b)
#define MIN(a, b) _mm256_min_ps(a, b)
#define INVERSE(a) _mm256_rcp_ps(a)
#define ROUND(a) _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#include "vectors.h"
#undef LANES
#undef TARGET
#undef SIDE
#undef TALL
#undef TOTAL
#undef MOST
#undef FMA
#undef MAX
#undef MIN
#undef INVERSE
#undef ROUND

#define LANES 16
#define TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#define SIDE 8
#define TALL 12
#define TOTAL(a) _mm512_reduce_add_ps(a)
#define MOST(a) _mm512_reduce_max_ps(a)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define MAX(a, b) _mm512_max_ps(a, b)
#define MIN(a, b) _mm512_min_ps(a, b)
#define INVERSE(a) _mm512_rcp14_ps(a)
#define ROUND(a) _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#include "vectors.h"
#undef LANES

#else

typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Int __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int16_t JOIN(Shorts, LANES) __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

INLINE Vec N(all)(float x) { return x - (Vec){0}; }
INLINE Vec N(load)(const float *p) { return *(const Vec *)p; }
INLINE void N(store)(float *p, Vec x) { *(Vec *)p = x; }
INLINE Vec N(choose)(Int where, Vec a, Vec b) { return (Vec)(((Int)a & where) | ((Int)b & ~where)); }

/* exp(x), to 2 units in the last place, 0 below -87, infinite above 88.4 (2^128). Taylor series on |r| <= ln 2 / 2 */
INLINE Vec N(exp)(Vec given) {
    Vec x = MIN(ALL(89), MAX(ALL(-87), given)), n = ROUND(x * 1.44269504f);
    Vec r = FMA(n, ALL(2.12194440e-4f), FMA(n, ALL(-0.693359375f), x));
    Vec p = ALL(1.0f / 5040);
    p = FMA(p, r, ALL(1.0f / 720));
    p = FMA(p, r, ALL(1.0f / 120));
    p = FMA(p, r, ALL(1.0f / 24));
    p = FMA(p, r, ALL(1.0f / 6));
    p = FMA(p, r, ALL(0.5f));
    p = FMA(p, r, ALL(1));
    p = FMA(p, r, ALL(1));
    p *= (Vec)((__builtin_convertvector(n, Int) + 127) << 23);
    return N(choose)((Int)(given < -87.0f), ALL(0), p);
}

/* A tile of c = a b, or c += a b: M rows, at most TALL, and V vectors. a has any strides, rows of b and c lie `br` and
   `cr` apart. */
INLINE void N(tile)(int M, int V, long K, const float *a, long ar, long ac, const float *b, long br, float *c, long cr,
                    int add) {
    Vec sums[TALL][2];
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int v = 0; v < V; v++)
        sums[m][v] = add ? LOAD(c + m * cr + v * LANES) : ALL(0);
    for (long k = 0; k < K; k++) {
        Vec x[2];
        UNROLL for (int v = 0; v < V; v++) x[v] = LOAD(b + k * br + v * LANES);
        UNROLL for (int m = 0; m < M; m++) {
            Vec y = ALL(a[m * ar + k * ac]);
            UNROLL for (int v = 0; v < V; v++) sums[m][v] = FMA(y, x[v], sums[m][v]);
        }
    }
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int v = 0; v < V; v++) STORE(c + m * cr + v * LANES, sums[m][v]);
}

#include BODY

#endif
