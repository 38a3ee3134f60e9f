/* A list of operations on float32, run without returning to Python in between.

   An operand is a view, as in torch: the number of a memory block, an offset and four strides, in numbers. Strides of 0
   broadcast. compiled_step.py writes the list; LIST must have the order of its OPERATIONS. */

#include <immintrin.h>
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

extern void GOMP_parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags);
int multiply(const void *matrix, const float *x, float *y, long rows, int threads);

#define INLINE static inline __attribute__((always_inline))
#define VECTORS __attribute__((target("avx2,fma")))

enum { DIMS = 4, OPERANDS = 4, WIDTH = 32, PARALLEL = 1 << 17 };
enum {
    COPY, NEG, RSQRT, SQRT, SQUARE, RECIPROCAL, RELU, SIGMOID, SILU, EXP, TANH, ERF, GELU, GELU_TANH, COS, SIN,
    ADD, SUB, MUL, DIV, MAXIMUM, MINIMUM, ADDCMUL,
    FROM_INT, CHOOSE, NORM, LAYER_NORM, EMBED, STORE_ROWS, ATTEND, PRODUCT
};

typedef struct { long block, offset, stride[DIMS]; } View;
typedef struct {
    long op, shape[DIMS];          /* of the result, padded with ones at the front */
    View y, in[OPERANDS];
    double number;                 /* a factor, an epsilon or a scale */
    long size, more;               /* of the dimension that an operation sums over; heads per key head */
    const void *matrix;
} Operation;

/* exp(x), to 2 units in the last place; the polynomial is the Taylor series on |r| <= ln 2 / 2 */
VECTORS INLINE float exp_(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = __builtin_rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720; p = p * r + 1.0f / 120; p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6; p = p * r + 0.5f; p = p * r + 1.0f; p = p * r + 1.0f;
    union { int32_t bits; float number; } power = {.bits = ((int32_t)n + 127) << 23};
    return p * power.number;
}

#define UNARY(NAME, RESULT)                                                                                            \
    VECTORS static void NAME(float *restrict y, const float *a, long n, long sy, long sa) {                            \
        if (sy == 1 && sa == 1) for (long i = 0; i < n; i++) { float x = a[i]; y[i] = RESULT; }                        \
        else for (long i = 0; i < n; i++) { float x = a[i * sa]; y[i * sy] = RESULT; }                                 \
    }
UNARY(copy, x) UNARY(neg, -x) UNARY(rsqrt, 1 / sqrtf(x)) UNARY(root, sqrtf(x)) UNARY(square, x * x)
UNARY(reciprocal, 1 / x) UNARY(relu, x > 0 || x != x ? x : 0) UNARY(sigmoid, 1 / (1 + exp_(-x)))
UNARY(silu, x / (1 + exp_(-x))) UNARY(exponential, expf(x)) UNARY(tangent, tanhf(x)) UNARY(error, erff(x))
UNARY(gelu, x * 0.5f * (1 + erff(x * 0.70710678f)))
UNARY(gelu_tanh, x - x / (1 + exp_(1.59576912f * (x + 0.044715f * x * x * x)))) UNARY(cosine, cosf(x)) UNARY(sine, sinf(x))

#define BINARY(NAME, RESULT)                                                                                           \
    VECTORS static void NAME(float *restrict y, const float *a, const float *b, float c, long n, long sy, long sa, long sb) { \
        if (sy == 1 && sa == 1 && sb == 1) for (long i = 0; i < n; i++) { float u = a[i], v = b[i]; y[i] = RESULT; }   \
        else if (sy == 1 && sa == 1 && sb == 0) { float v = b[0]; for (long i = 0; i < n; i++) { float u = a[i]; y[i] = RESULT; } } \
        else for (long i = 0; i < n; i++) { float u = a[i * sa], v = b[i * sb]; y[i * sy] = RESULT; }                  \
    }
BINARY(add, u + c * v) BINARY(sub, u - c * v) BINARY(mul, u * v) BINARY(divide, u / v)
BINARY(maximum, u > v || u != u ? u : v) BINARY(minimum, u < v || u != u ? u : v)

VECTORS static void addcmul(float *restrict y, const float *a, const float *b, const float *d, float c, long n, const long *s) {
    if (s[0] == 1 && s[1] == 1 && s[2] == 1 && s[3] == 1) for (long i = 0; i < n; i++) y[i] = a[i] + c * b[i] * d[i];
    else for (long i = 0; i < n; i++) y[i * s[0]] = a[i * s[1]] + c * b[i * s[2]] * d[i * s[3]];
}

VECTORS INLINE float total8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

VECTORS INLINE float dot(const float *a, const float *b, long n) {
    __m256 s = _mm256_setzero_ps(), t = s;
    float rest = 0;
    long i = 0;
    for (; i + 16 <= n; i += 16) {
        s = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i), s);
        t = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8), _mm256_loadu_ps(b + i + 8), t);
    }
    for (; i < n; i++) rest += a[i] * b[i];
    return rest + total8(_mm256_add_ps(s, t));
}

VECTORS static float norm(const float *x, long n) { return sqrtf(dot(x, x, n)); }

VECTORS static void layer_norm(float *restrict y, const float *x, const float *weight, const float *bias, long n, float eps) {
    double sum = 0;
    for (long i = 0; i < n; i++) sum += x[i];
    double mean = sum / n;
    for (long i = 0; i < n; i++) y[i] = x[i] - mean;
    float scale = 1 / sqrtf(dot(y, y, n) / n + eps);
    for (long i = 0; i < n; i++) y[i] *= scale;
    if (weight) for (long i = 0; i < n; i++) y[i] *= weight[i];
    if (bias) for (long i = 0; i < n; i++) y[i] += bias[i];
}

/* One query of D numbers, S keys; mask is added to the scores, or NULL. Strides are of keys; scores has room for S. */
VECTORS static void attend(float *restrict y, const float *q, const float *k, const float *v, const float *mask, long step,
                           long S, long D, long sk, long sv, float scale, float *restrict scores) {
    float most = -INFINITY, total = 0;
    while (mask && S && mask[(S - 1) * step] == -INFINITY) S--;
    for (long s = 0; s < S; s++) {
        float shown = mask ? mask[s * step] : 0;
        scores[s] = shown == -INFINITY ? shown : scale * dot(q, k + s * sk, D) + shown;
    }
    for (long s = 0; s < S; s++) most = scores[s] > most || scores[s] != scores[s] ? scores[s] : most;
    for (long s = 0; s < S; s++) scores[s] = scores[s] == -INFINITY ? 0 : exp_(scores[s] - most);
    for (long s = 0; s < S; s++) total += scores[s];
    for (long d = 0; d < D; d += WIDTH) {
        float sums[WIDTH] = {0};
        long n = D - d < WIDTH ? D - d : WIDTH;
        for (long s = 0; s < S; s++) {
            const float *row = v + s * sv + d;
            if (scores[s] == 0) continue;
            if (n == WIDTH) for (int i = 0; i < WIDTH; i++) sums[i] += scores[s] * row[i];
            else for (long i = 0; i < n; i++) sums[i] += scores[s] * row[i];
        }
        for (long i = 0; i < n; i++) y[d + i] = sums[i] / total;
    }
}

typedef struct { const Operation *op; char **blocks; atomic_long next; atomic_int failed; } Heads;

#define AT(VIEW, TYPE) ((TYPE *)blocks[(VIEW).block] + (VIEW).offset)

static void attend_heads(void *data) {
    Heads *job = data;
    const Operation *o = job->op;
    char **blocks = job->blocks;
    const View *q = o->in, *k = o->in + 1, *v = o->in + 2, *m = o->in + 3;
    long S = o->size, D = o->shape[3], heads = o->shape[1];
    float *scores = malloc(S * sizeof *scores);
    if (!scores) { atomic_store(&job->failed, 1); return; }
    for (long i; (i = atomic_fetch_add(&job->next, 1)) < o->shape[0] * heads;) {
        long b = i / heads, h = i % heads, g = h / o->more;
        const float *mask = m->block < 0 ? NULL : AT(*m, float) + b * m->stride[0] + h * m->stride[1];
        attend(AT(o->y, float) + b * o->y.stride[0] + h * o->y.stride[1], AT(*q, float) + b * q->stride[0] + h * q->stride[1],
               AT(*k, float) + b * k->stride[0] + g * k->stride[1], AT(*v, float) + b * v->stride[0] + g * v->stride[1], mask,
               m->stride[3], S, D, k->stride[2], v->stride[2], o->number, scores);
    }
    free(scores);
}

static int attention(const Operation *o, char **blocks, int threads) {
    Heads job = {o, blocks, 0, 0};
    if (threads > 1 && o->shape[0] * o->shape[1] * o->size * o->shape[3] >= PARALLEL) GOMP_parallel(attend_heads, &job, threads, 0);
    else attend_heads(&job);
    return atomic_load(&job.failed);
}

static void elementwise(const Operation *o, float *y, const float *a, const float *b, const float *c, const long *s) {
    static void (*const unary[])(float *, const float *, long, long, long) = {
        copy, neg, rsqrt, root, square, reciprocal, relu, sigmoid, silu, exponential, tangent, error, gelu, gelu_tanh, cosine, sine};
    static void (*const binary[])(float *, const float *, const float *, float, long, long, long, long) = {
        add, sub, mul, divide, maximum, minimum};
    long n = o->shape[3];
    if (o->op < ADD) unary[o->op](y, a, n, s[0], s[1]);
    else if (o->op < ADDCMUL) binary[o->op - ADD](y, a, b, o->number, n, s[0], s[1], s[2]);
    else addcmul(y, a, b, c, o->number, n, s);
}

/* The operations up to ADDCMUL, and those of whole rows of the last dimension. Returns 0, or 2 for a wrong index. */
static int each_row(const Operation *o, char **blocks) {
    const View *a = o->in, *b = o->in + 1, *c = o->in + 2;
    const long strides[] = {o->y.stride[3], a->stride[3], b->stride[3], c->stride[3]};
    for (long i = 0; i < o->shape[0]; i++) for (long j = 0; j < o->shape[1]; j++) for (long k = 0; k < o->shape[2]; k++) {
#define PLACE(VIEW) (i * (VIEW)->stride[0] + j * (VIEW)->stride[1] + k * (VIEW)->stride[2])
#define ROW(VIEW, TYPE) ((VIEW)->block < 0 ? NULL : AT(*(VIEW), TYPE) + PLACE(VIEW))
        float *y = AT(o->y, float) + PLACE(&o->y);
        long n = o->shape[3];
        if (o->op <= ADDCMUL) elementwise(o, y, ROW(a, float), ROW(b, float), ROW(c, float), strides);
        else if (o->op == FROM_INT) for (long x = 0; x < n; x++) y[x * strides[0]] = ROW(a, int64_t)[x * strides[1]];
        else if (o->op == CHOOSE)
            for (long x = 0; x < n; x++)
                y[x * strides[0]] = ROW(a, uint8_t)[x * strides[1]] ? ROW(b, float)[x * strides[2]] : ROW(c, float)[x * strides[3]];
        else if (o->op == NORM) *y = norm(ROW(a, float), o->size);
        else if (o->op == LAYER_NORM) layer_norm(y, ROW(a, float), ROW(b, float), ROW(c, float), n, o->number);
        else {
            int64_t index = *ROW(a, int64_t);
            if (index < 0 || index >= o->size) return 2;
            if (o->op == EMBED) memcpy(y, AT(*b, float) + index * b->stride[2], n * sizeof *y);
            else memcpy(AT(o->y, float) + index * o->y.stride[2], AT(*b, float) + PLACE(b), n * sizeof *y);
        }
    }
    return 0;
}

/* Returns 0; 1 if memory is short; 2 if an index is out of range. */
int run(const Operation *operations, long count, char **blocks, int threads) {
    int wrong = 0;
    for (const Operation *o = operations; o < operations + count && !wrong; o++) {
        if (o->op == PRODUCT) wrong = multiply(o->matrix, AT(o->in[0], float), AT(o->y, float), o->size, threads);
        else if (o->op == ATTEND) wrong = attention(o, blocks, threads);
        else wrong = each_row(o, blocks);
    }
    return wrong;
}
