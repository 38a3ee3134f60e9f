/* Layers of training in float32, forward and backward: activations, RMSNorm, rotations, causal attention, loss.

   This file includes itself, for AVX2 and for AVX-512. Sums have one order, whatever the number of threads. NaN stays
   NaN, as in torch: MAX and MIN return their second operand if one is NaN. */

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
#define UNROLL _Pragma("GCC unroll 8")
#define PASTE(name, lanes) name##_##lanes
#define JOIN(name, lanes) PASTE(name, lanes)
#define N(name) JOIN(name, LANES)
#define Vec JOIN(Floats, LANES)
#define Int JOIN(Ints, LANES)

enum { PIECE = 1 << 13, ROWS = 32, PIECES = 64, QUERIES = 64, PAIR = 32 };

/* a tensor (batch, heads, tokens, D): its strides, in numbers */
typedef struct { float *data; long batch, head, token; } View;
typedef struct {
    View q, k, v, y, dq, dk, dv;   /* y: the result, or its gradient */
    float *norms;                  /* (batch, heads, tokens): log of the sum of exp of the scores */
    long batch, heads, groups, tokens, width;
    float *room;                   /* of all threads */
    long size;                     /* of one thread's */
    atomic_long next, entered;     /* head, thread */
} Attention;
typedef struct { const float *a, *b, *c; float *y, *z; long n; } Numbers;
typedef struct {
    const float *x, *weight, *dy;
    float *y, *scale, *sums;   /* y: the result, or the gradient of x; sums: of each piece, the weight's gradient */
    long rows, width, few;     /* few: rows of a piece */
    float eps;
} Norm;

static const int32_t places[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* x, rotated to y by the angles of each token; sign: -1 rotates back */
typedef struct { View x, y; const float *cos, *sin; long batch, heads, tokens, width; float sign; } Rotation;
typedef struct { float *logits, *losses; const int64_t *ids; long rows, width; int back; } Entropy;

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

#define ACTIVATION(NAME, ...)                                                                                          \
    KERNEL void N(NAME)(void *data, long piece) {                                                                      \
        const Numbers *m = data;                                                                                       \
        long end = (piece + 1) * PIECE < m->n ? (piece + 1) * PIECE : m->n;                                            \
        for (long i = piece * PIECE; i < end; i += LANES) __VA_ARGS__                                                  \
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
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define MAX(a, b) _mm256_max_ps(a, b)
#define MIN(a, b) _mm256_min_ps(a, b)
#define ROUND(a) _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#include "layers.c"
#undef LANES
#undef TARGET
#undef SIDE
#undef TOTAL
#undef MOST
#undef FMA
#undef MAX
#undef MIN
#undef ROUND

#define LANES 16
#define TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#define SIDE 8
#define TOTAL(a) _mm512_reduce_add_ps(a)
#define MOST(a) _mm512_reduce_max_ps(a)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define MAX(a, b) _mm512_max_ps(a, b)
#define MIN(a, b) _mm512_min_ps(a, b)
#define ROUND(a) _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#include "layers.c"

/* Half the width is a multiple of 16. */
void rotate(const Rotation *job, int has_avx512, int threads) {
    share(has_avx512 ? rotate_16 : rotate_8, (void *)job, job->batch * job->tokens, threads);
}

/* The losses of rows of logits, which `back` overwrites by their gradients. The width is a multiple of 16. */
void entropy(float *logits, const int64_t *ids, float *losses, long rows, long width, int back, int has_avx512,
             int threads) {
    Entropy job = {logits, losses, ids, rows, width, back};
    share(has_avx512 ? entropy_16 : entropy_8, &job, rows, threads);
}

/* n is a multiple of 16. */
void activation(int which, const float *a, const float *b, const float *c, float *y, float *z, long n, int has_avx512,
                int threads) {
    static void (*const functions[][2])(void *, long) = {
        {gelu_tanh_8, gelu_tanh_16}, {gelu_tanh_back_8, gelu_tanh_back_16}, {swiglu_8, swiglu_16},
        {swiglu_back_8, swiglu_back_16}, {relu2_8, relu2_16}, {relu2_back_8, relu2_back_16},
    };
    Numbers job = {a, b, c, y, z, n};
    share(functions[which][has_avx512], &job, (n + PIECE - 1) / PIECE, threads);
}

/* RMSNorm. The width is a multiple of 16. */
void normalize(const float *x, const float *weight, float *y, float *scale, long rows, long width, float eps,
               int has_avx512, int threads) {
    Norm job = {x, weight, NULL, y, scale, NULL, rows, width, ROWS, eps};
    share(has_avx512 ? normalize_16 : normalize_8, &job, (rows + ROWS - 1) / ROWS, threads);
}

/* Returns 0, or 1 if memory is short. */
int normalize_back(const float *x, const float *weight, const float *dy, float *scale, float *dx, float *dweight,
                   long rows, long width, int has_avx512, int threads) {
    long few = rows > ROWS * PIECES ? (rows + PIECES - 1) / PIECES : ROWS, pieces = (rows + few - 1) / few;
    float *sums = calloc(pieces * width, sizeof *sums);
    if (!sums) return 1;
    Norm job = {x, weight, dy, dx, scale, sums, rows, width, few, 0};
    share(has_avx512 ? normalize_back_16 : normalize_back_8, &job, pieces, threads);
    for (long i = 0; i < width; i++) dweight[i] = 0;
    for (long p = 0; p < pieces; p++)
        for (long i = 0; i < width; i++) dweight[i] += sums[p * width + i];
    free(sums);
    return 0;
}

/* Causal attention, or its gradients if there is a place for them. Returns 0, or 1 if memory is short. The width of a
   head is a multiple of 16. */
int attention(const Attention *given, int has_avx512, int threads) {
    Attention job = *given;
    long keys = (job.tokens + PAIR - 1) / PAIR * PAIR, back = job.dq.data != NULL;
    job.size = keys * (back ? 2 * job.width + 2 * QUERIES : job.width + SIDE);
    job.room = aligned_alloc(64, threads * job.size * sizeof *job.room);
    if (!job.room) return 1;
    job.next = job.entered = 0;
    void (*work)(void *) = has_avx512 ? (back ? attend_back_16 : attend_16) : back ? attend_back_8 : attend_8;
    if (threads > 1) GOMP_parallel(work, &job, threads, 0);
    else work(&job);
    free(job.room);
    return 0;
}

#else

typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Int __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

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

/* --- activations --- */

INLINE Vec N(logistic)(Vec x) { return 1.0f / (1.0f + N(exp)(-x)); }

ACTIVATION(gelu_tanh, {
    Vec x = LOAD(m->a + i);
    STORE(m->y + i, x * N(logistic)(x * FMA(x * x, ALL(0.0713548163f), ALL(1.59576912f))));
})
ACTIVATION(gelu_tanh_back, {
    Vec x = LOAD(m->a + i), square = x * x;
    Vec s = N(logistic)(x * FMA(square, ALL(0.0713548163f), ALL(1.59576912f)));
    STORE(m->y + i, LOAD(m->b + i) * FMA(s * (1.0f - s) * x, FMA(square, ALL(0.2140644489f), ALL(1.59576912f)), s));
})
ACTIVATION(swiglu, {
    Vec gate = LOAD(m->a + i);
    STORE(m->y + i, gate * N(logistic)(gate) * LOAD(m->b + i));
})
ACTIVATION(swiglu_back, {
    Vec gate = LOAD(m->a + i), x = LOAD(m->b + i), dy = LOAD(m->c + i), s = N(logistic)(gate);
    STORE(m->y + i, dy * x * s * FMA(gate, 1.0f - s, ALL(1)));
    STORE(m->z + i, dy * gate * s);
})
ACTIVATION(relu2, { STORE(m->y + i, MAX(ALL(0), LOAD(m->a + i)) * MAX(ALL(0), LOAD(m->a + i))); })
ACTIVATION(relu2_back, { STORE(m->y + i, MAX(ALL(0), LOAD(m->a + i)) * 2.0f * LOAD(m->b + i)); })

/* --- RMSNorm --- */

KERNEL void N(normalize)(void *data, long piece) {
    const Norm *m = data;
    long n = m->width, end = (piece + 1) * m->few < m->rows ? (piece + 1) * m->few : m->rows;
    for (long r = piece * m->few; r < end; r++) {
        const float *x = m->x + r * n;
        Vec square = ALL(0);
        for (long i = 0; i < n; i += LANES) square = FMA(LOAD(x + i), LOAD(x + i), square);
        float scale = 1 / sqrtf(TOTAL(square) / n + m->eps);
        for (long i = 0; i < n; i += LANES) STORE(m->y + r * n + i, LOAD(x + i) * scale * LOAD(m->weight + i));
        m->scale[r] = scale;
    }
}

KERNEL void N(normalize_back)(void *data, long piece) {
    const Norm *m = data;
    long n = m->width, end = (piece + 1) * m->few < m->rows ? (piece + 1) * m->few : m->rows;
    float *sums = m->sums + piece * n;
    for (long r = piece * m->few; r < end; r++) {
        const float *x = m->x + r * n, *dy = m->dy + r * n;
        float scale = m->scale[r];
        Vec along = ALL(0);
        for (long i = 0; i < n; i += LANES) {
            Vec d = LOAD(dy + i) * LOAD(x + i) * scale;
            along = FMA(d, LOAD(m->weight + i), along);
            STORE(sums + i, LOAD(sums + i) + d);
        }
        float slope = TOTAL(along) / n * scale;
        for (long i = 0; i < n; i += LANES)
            STORE(m->y + r * n + i, (LOAD(dy + i) * LOAD(m->weight + i) - LOAD(x + i) * slope) * scale);
    }
}

/* --- positions --- */

KERNEL void N(rotate)(void *data, long piece) {
    const Rotation *m = data;
    long half = m->width / 2, b = piece / m->tokens, t = piece % m->tokens;
    for (long h = 0; h < m->heads; h++) {
        const float *x = HEAD(m->x, b, h) + t * m->x.token, *cos = m->cos + t * half, *sin = m->sin + t * half;
        float *y = HEAD(m->y, b, h) + t * m->y.token;
        for (long i = 0; i < half; i += LANES) {
            Vec first = LOAD(x + i), second = LOAD(x + half + i), s = LOAD(sin + i) * m->sign;
            STORE(y + i, first * LOAD(cos + i) - second * s);
            STORE(y + half + i, second * LOAD(cos + i) + first * s);
        }
    }
}

/* --- attention --- */

/* A tile of c = a b: M rows, V vectors. a has any strides, rows of b and c lie `br` and `cr` apart. */
INLINE void N(tile)(int M, int V, long K, const float *a, long ar, long ac, const float *b, long br, float *c, long cr,
                    int add) {
    Vec sums[SIDE][2];
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

/* c = a b, or c += a b: (M, K) times (K, n), M at most SIDE, n a multiple of LANES */
KERNEL void N(product)(long M, long n, long K, const float *a, long ar, long ac, const float *b, long br, float *c,
                       long cr, int add) {
    long i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        if (M == SIDE) N(tile)(SIDE, 2, K, a, ar, ac, b + i, br, c + i, cr, add);
        else for (long m = 0; m < M; m++) N(tile)(1, 2, K, a + m * ar, ar, ac, b + i, br, c + m * cr + i, cr, add);
    }
    if (i < n) {
        if (M == SIDE) N(tile)(SIDE, 1, K, a, ar, ac, b + i, br, c + i, cr, add);
        else for (long m = 0; m < M; m++) N(tile)(1, 1, K, a + m * ar, ar, ac, b + i, br, c + m * cr + i, cr, add);
    }
}

/* Rows of numbers to columns that lie `keys` apart; the rest up to `keys` is zero. */
KERNEL void N(transpose)(const float *from, long step, long tokens, long width, float *to, long keys) {
    for (long d = 0; d < width; d++) {
        for (long t = 0; t < tokens; t++) to[d * keys + t] = from[t * step + d];
        for (long t = tokens; t < keys; t++) to[d * keys + t] = 0;
    }
}

INLINE long N(padded)(long n) { return (n + LANES - 1) / LANES * LANES; }

/* x, with `other` from place n on */
INLINE Vec N(first)(Vec x, long n, float other) {
    return n >= LANES ? x : N(choose)((Int)(*(const Int *)places < (int32_t)n), x, ALL(other));
}

INLINE float N(largest)(const float *s, long n) {
    Vec top = ALL(-INFINITY);  /* a NaN may be skipped: its exp is NaN */
    for (long j = 0; j < n; j += LANES) top = MAX(top, N(first)(LOAD(s + j), n - j, -INFINITY));
    return MOST(top);
}

/* Scores of a query to weights: exp(scale * s - norm) of the keys before `shown`, and zeros up to n. Returns their sum.
   No FMA: scale * s is rounded as in the norm, so that it does not exceed the largest one. */
INLINE float N(weights)(float *s, long shown, long n, float scale, float norm) {
    Vec sum = ALL(0);
    for (long j = 0; j < n; j += LANES) {
        Vec p = N(first)(N(exp)(LOAD(s + j) * scale - norm), shown - j, 0);
        STORE(s + j, p);
        sum += p;
    }
    return TOTAL(sum);
}

/* One thread's share of the heads. */
KERNEL void N(attend)(void *data) {
    Attention *m = data;
    long T = m->tokens, D = m->width, keys = (T + PAIR - 1) / PAIR * PAIR, G = m->groups, per = m->heads / G;
    float scale = 1 / sqrtf(D), sums[SIDE], *kt = m->room + atomic_fetch_add(&m->entered, 1) * m->size, *s = kt + keys * D;
    for (long at; (at = atomic_fetch_add(&m->next, 1)) < m->batch * G;) {
        long b = at / G, g = at % G;
        const float *v = HEAD(m->v, b, g);
        N(transpose)(HEAD(m->k, b, g), m->k.token, T, D, kt, keys);
        for (long h = g * per; h < (g + 1) * per; h++) {
            const float *q = HEAD(m->q, b, h);
            float *y = HEAD(m->y, b, h), *norms = m->norms + (b * m->heads + h) * T;
            for (long t = 0; t < T; t += SIDE) {
                long M = T - t < SIDE ? T - t : SIDE, n = N(padded)(t + M);
                N(product)(M, n, D, q + t * m->q.token, m->q.token, 1, kt, keys, s, keys, 0);
                /* in three loops, so that the rows do not wait for each other */
                for (long i = 0; i < M; i++) norms[t + i] = scale * N(largest)(s + i * keys, t + i + 1);
                for (long i = 0; i < M; i++) sums[i] = N(weights)(s + i * keys, t + i + 1, n, scale, norms[t + i]);
                for (long i = 0; i < M; i++) norms[t + i] += logf(sums[i]);
                N(product)(M, D, t + M, s, keys, 1, v, m->v.token, y + t * m->y.token, m->y.token, 0);
                for (long i = 0; i < M; i++)
                    for (long d = 0; d < D; d += LANES) {
                        float *place = y + (t + i) * m->y.token + d;
                        STORE(place, LOAD(place) * (1 / sums[i]));
                    }
            }
        }
    }
}

KERNEL void N(attend_back)(void *data) {
    Attention *m = data;
    long T = m->tokens, D = m->width, keys = (T + PAIR - 1) / PAIR * PAIR, G = m->groups, per = m->heads / G;
    float scale = 1 / sqrtf(D), *kt = m->room + atomic_fetch_add(&m->entered, 1) * m->size;
    float *vt = kt + keys * D, *p = vt + keys * D, *ds = p + QUERIES * keys;
    for (long at; (at = atomic_fetch_add(&m->next, 1)) < m->batch * G;) {
        long b = at / G, g = at % G;
        const float *k = HEAD(m->k, b, g);
        float *dk = HEAD(m->dk, b, g), *dv = HEAD(m->dv, b, g);
        N(transpose)(k, m->k.token, T, D, kt, keys);
        N(transpose)(HEAD(m->v, b, g), m->v.token, T, D, vt, keys);
        for (long h = g * per; h < (g + 1) * per; h++) {
            const float *q = HEAD(m->q, b, h), *dy = HEAD(m->y, b, h), *norms = m->norms + (b * m->heads + h) * T;
            float *dq = HEAD(m->dq, b, h);
            for (long begin = 0; begin < T; begin += QUERIES) {
                long end = begin + QUERIES < T ? begin + QUERIES : T;
                for (long t = begin; t < end; t += SIDE) {
                    long M = end - t < SIDE ? end - t : SIDE, n = N(padded)(t + M);
                    float *few = p + (t - begin) * keys, *slopes = ds + (t - begin) * keys;
                    N(product)(M, n, D, q + t * m->q.token, m->q.token, 1, kt, keys, few, keys, 0);
                    N(product)(M, n, D, dy + t * m->y.token, m->y.token, 1, vt, keys, slopes, keys, 0);
                    for (long i = 0; i < M; i++) N(weights)(few + i * keys, t + i + 1, n, scale, norms[t + i]);
                    for (long i = 0; i < M; i++) {
                        const float *w = few + i * keys;
                        float *d = slopes + i * keys;
                        Vec sum = ALL(0);
                        for (long j = 0; j < n; j += LANES) sum = FMA(LOAD(w + j), LOAD(d + j), sum);
                        float mean = TOTAL(sum);
                        for (long j = 0; j < n; j += LANES) STORE(d + j, (LOAD(d + j) - mean) * LOAD(w + j) * scale);
                    }
                    N(product)(M, D, t + M, slopes, keys, 1, k, m->k.token, dq + t * m->dq.token, m->dq.token, 0);
                }
                for (long s = 0; s < end; s += SIDE) {
                    long M = T - s < SIDE ? T - s : SIDE, from = s > begin ? s : begin, at = (from - begin) * keys + s;
                    int add = h > g * per || s < begin;
                    N(product)(M, D, end - from, ds + at, 1, keys, q + from * m->q.token, m->q.token,
                               dk + s * m->dk.token, m->dk.token, add);
                    N(product)(M, D, end - from, p + at, 1, keys, dy + from * m->y.token, m->y.token,
                               dv + s * m->dv.token, m->dv.token, add);
                }
            }
        }
    }
}

/* --- loss --- */

KERNEL void N(entropy)(void *data, long row) {
    const Entropy *m = data;
    float *z = m->logits + row * m->width, most = N(largest)(z, m->width), own = z[m->ids[row]];
    double total = 0;
    for (long begin = 0; begin < m->width; begin += PIECE) {  /* float sums of few numbers each */
        long end = begin + PIECE < m->width ? begin + PIECE : m->width;
        Vec sum = ALL(0);
        for (long i = begin; i < end; i += LANES) {
            Vec e = N(exp)(LOAD(z + i) - most);
            if (m->back) STORE(z + i, e);
            sum += e;
        }
        total += TOTAL(sum);
    }
    m->losses[row] = log(total) + (most - own);
    if (!m->back) return;
    float share = 1 / total;
    for (long i = 0; i < m->width; i += LANES) STORE(z + i, LOAD(z + i) * share);
    z[m->ids[row]] -= 1;
}

#endif
