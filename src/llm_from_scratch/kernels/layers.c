/* Layers of training in float32, forward and backward: rotations, causal attention, loss. */

#ifndef LANES

#define BODY "layers.c"
#include <stdatomic.h>
#include <stdint.h>

enum { PIECE = 1 << 13, QUERIES = 64, PAIR = 32 };

/* a tensor (batch, heads, tokens, D): its strides, in numbers */
typedef struct { float *data; long batch, head, token; } View;
typedef struct {
    View q, k, v, y, dq, dk, dv;   /* y: the result, or its gradient */
    float *norms;                  /* (batch, heads, tokens): log of the sum of exp of the scores */
    long batch, heads, groups, tokens, width;
    const int16_t *const *noise;   /* of dropout, or NULL: per `few` sequences and QUERIES, (few, heads, QUERIES, keys) */
    long few, least;               /* least: noise of a weight that is kept */
    float *room;                   /* of all threads */
    long size;                     /* of one thread's */
    atomic_long next, entered;     /* head, thread */
} Attention;
static const int32_t places[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* x, rotated to y by the angles of each token; sign: -1 rotates back */
typedef struct { View x, y; const float *cos, *sin; long batch, heads, tokens, width; float sign; } Rotation;
typedef struct { float *logits, *losses; const int64_t *ids; long rows, width; int back; } Entropy;

#include "vectors.h"

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

/* The weights of a query, or their gradients, with those zero that dropout leaves out (times 0: NaN stays NaN) */
INLINE void N(leave_out)(const Attention *m, float *s, long b, long h, long t) {
    if (!m->noise) return;
    long T = m->tokens, block = t / QUERIES, begin = block * QUERIES, end = begin + QUERIES < T ? begin + QUERIES : T;
    const int16_t *noise = m->noise[b / m->few * ((T + QUERIES - 1) / QUERIES) + block];
    noise += (((b % m->few) * m->heads + h) * (end - begin) + t - begin) * end;
    float kept = 65536.0f / (32768 - m->least);
    long j = 0;
    for (; j + LANES <= t + 1; j += LANES) {
        Int drawn = __builtin_convertvector(*(const JOIN(Shorts, LANES) *)(noise + j), Int);
        STORE(s + j, LOAD(s + j) * (Vec)((drawn >= (int32_t)m->least) & (Int)ALL(kept)));
    }
    for (; j <= t; j++) s[j] *= noise[j] >= m->least ? kept : 0;
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
                for (long i = 0; i < M; i++) N(leave_out)(m, s + i * keys, b, h, t + i);
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
                        float *w = few + i * keys, *d = slopes + i * keys;
                        N(leave_out)(m, d, b, h, t + i);
                        Vec sum = ALL(0);
                        for (long j = 0; j < n; j += LANES) sum = FMA(LOAD(w + j), LOAD(d + j), sum);
                        float mean = TOTAL(sum);
                        for (long j = 0; j < n; j += LANES) STORE(d + j, (LOAD(d + j) - mean) * LOAD(w + j) * scale);
                        N(leave_out)(m, w, b, h, t + i);
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
