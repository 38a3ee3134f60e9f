/* Passes over rows of numbers in float32, forward and backward: activations, RMSNorm, dropout. */

#ifndef LANES

#define BODY "passes.c"
#include <stdint.h>

enum { PIECE = 1 << 13, ROWS = 32, PIECES = 64 };

typedef struct { const float *a, *b, *c; float *y, *z; long n; } Numbers;
typedef struct {
    const float *x, *weight, *dy;
    float *y, *scale, *sums;   /* y: the result, or the gradient of x; sums: of each piece, the weight's gradient */
    long rows, width, few;     /* few: rows of a piece */
    float eps;
    long heads, token;         /* of x: `heads` rows lie side by side, and `token` numbers farther the next ones */
} Norm;
typedef struct { const float *x; const int16_t *noise; float *y; long n; int least; float scale; } Dropped;

#define ACTIVATION(NAME, ...)                                                                                          \
    KERNEL void N(NAME)(void *data, long piece) {                                                                      \
        const Numbers *m = data;                                                                                       \
        long end = (piece + 1) * PIECE < m->n ? (piece + 1) * PIECE : m->n;                                            \
        for (long i = piece * PIECE; i < end; i += LANES) __VA_ARGS__                                                  \
    }

#include "vectors.h"

/* n is a multiple of 16. */
void activation(int which, const float *a, const float *b, const float *c, float *y, float *z, long n, int has_avx512,
                int threads) {
    static void (*const functions[][2])(void *, long) = {
        {gelu_tanh_8, gelu_tanh_16}, {gelu_tanh_back_8, gelu_tanh_back_16}, {swiglu_8, swiglu_16},
        {swiglu_back_8, swiglu_back_16}, {relu2_8, relu2_16}, {relu2_back_8, relu2_back_16},
        {gelu_8, gelu_16}, {gelu_back_8, gelu_back_16},
    };
    Numbers job = {a, b, c, y, z, n};
    share(functions[which][has_avx512], &job, (n + PIECE - 1) / PIECE, threads);
}

/* RMSNorm. The width is a multiple of 16. heads, token: as in Norm. */
void normalize(const float *x, const float *weight, float *y, float *scale, long rows, long width, long heads,
               long token, float eps, int has_avx512, int threads) {
    Norm job = {x, weight, NULL, y, scale, NULL, rows, width, ROWS, eps, heads, token};
    share(has_avx512 ? normalize_16 : normalize_8, &job, (rows + ROWS - 1) / ROWS, threads);
}

/* Returns 0, or 1 if memory is short. */
int normalize_back(const float *x, const float *weight, const float *dy, float *scale, float *dx, float *dweight,
                   long rows, long width, long heads, long token, int has_avx512, int threads) {
    long few = rows > ROWS * PIECES ? (rows + PIECES - 1) / PIECES : ROWS, pieces = (rows + few - 1) / few;
    float *sums = calloc(pieces * width, sizeof *sums);
    if (!sums) return 1;
    Norm job = {x, weight, dy, dx, scale, sums, rows, width, few, 0, heads, token};
    share(has_avx512 ? normalize_back_16 : normalize_back_8, &job, pieces, threads);
    for (long i = 0; i < width; i++) dweight[i] = 0;
    for (long p = 0; p < pieces; p++)
        for (long i = 0; i < width; i++) dweight[i] += sums[p * width + i];
    free(sums);
    return 0;
}

/* x * scale where the noise is at least `least`, 0 elsewhere. n is a multiple of 16. */
void drop(const float *x, const int16_t *noise, float *y, long n, int least, float scale, int has_avx512,
          int threads) {
    Dropped job = {x, noise, y, n, least, scale};
    share(has_avx512 ? drop_16 : drop_8, &job, (n + PIECE - 1) / PIECE, threads);
}

#else

/* --- activations --- */

INLINE Vec N(logistic)(Vec x) { return 1.0f / (1.0f + N(exp)(-x)); }

/* exp(-x^2 / 2), and the share of a normal distribution below x. The share beyond |x| is t * p(t) * exp(-x^2 / 2), with
   t = 1 / (1 + 0.2316 |x|) and a polynomial p, fitted here, within 1.2e-7 of itself. Beyond 40 it is 0. */
INLINE Vec N(below)(Vec x, Vec *bell) {
    Vec d = FMA(MIN(ALL(40), MAX(x, -x)), ALL(0.2316419f), ALL(1)), about = INVERSE(d);
    Vec t = about * FMA(-d, about, ALL(2)), p = ALL(-0.0707839131f);  /* a step of Newton's: faster than a division */
    p = FMA(p, t, ALL(0.249234959f));
    p = FMA(p, t, ALL(-0.204433277f));
    p = FMA(p, t, ALL(0.227926329f));
    p = FMA(p, t, ALL(0.0120572513f));
    p = FMA(p, t, ALL(0.103134185f));
    p = FMA(p, t, ALL(0.0903362855f));
    p = FMA(p, t, ALL(0.0925282389f));
    *bell = N(exp)(x * x * -0.5f);
    Vec tail = p * t * *bell;
    return N(choose)((Int)(x > 0.0f), 1.0f - tail, tail);
}

ACTIVATION(gelu, {
    Vec x = LOAD(m->a + i), bell;
    STORE(m->y + i, x * N(below)(x, &bell));
})
ACTIVATION(gelu_back, {
    Vec x = LOAD(m->a + i), bell, share = N(below)(x, &bell);
    STORE(m->y + i, LOAD(m->b + i) * FMA(x * 0.398942280f, bell, share));
})
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
ACTIVATION(relu2_back, {
    Vec x = MAX(ALL(0), LOAD(m->a + i));
    STORE(m->y + i, x * 2.0f * LOAD(m->b + i));
})

/* --- RMSNorm --- */

KERNEL void N(normalize)(void *data, long piece) {
    const Norm *m = data;
    long n = m->width, end = (piece + 1) * m->few < m->rows ? (piece + 1) * m->few : m->rows;
    for (long r = piece * m->few; r < end; r++) {
        const float *x = m->x + r / m->heads * m->token + r % m->heads * n;
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
        const float *x = m->x + r / m->heads * m->token + r % m->heads * n, *dy = m->dy + r * n;
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

/* --- dropout --- */

KERNEL void N(drop)(void *data, long piece) {
    const Dropped *m = data;
    long end = (piece + 1) * PIECE < m->n ? (piece + 1) * PIECE : m->n;
    for (long i = piece * PIECE; i < end; i += LANES) {
        Int noise = __builtin_convertvector(*(const JOIN(Shorts, LANES) *)(m->noise + i), Int);
        /* times 0 and not left out, so that NaN stays NaN */
        STORE(m->y + i, LOAD(m->x + i) * (Vec)((noise >= m->least) & (Int)ALL(m->scale)));
    }
}

#endif
