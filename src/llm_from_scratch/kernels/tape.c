/* A model's training step in one call: loss and gradients of a list of operations on the rows of a batch.

   Threads share the sequences. Each computes the forward and backward pass of a few sequences at a time, whose
   activations stay in its cache, into gradients of its own, which are added at the end in a fixed order. Every operation
   but attention works on rows (tokens). tape.py writes the list. */

#ifndef LANES

#define BODY "tape.c"
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

enum { DEEP = 256, WIDE = 32, PIECE = 1 << 13 };
enum { TOKENS, PLACES, ADD, NORM, LINEAR, ACTIVATION, ATTENTION, LOSS };

/* values and gradients in a thread's memory, and their width, in numbers per row */
typedef struct { long values, slopes, width; } Buffer;
typedef struct {
    long kind, x, other, y;          /* buffers */
    long inputs, outputs;
    long add, add_other;             /* whether the gradient of x and other is added to what is there; -1: there is none,
                                        or it is in the same place as that of y */
    long weight, bias;               /* parameters, or -1 */
    long packed, kept;               /* of a linear layer: its transposed weight; what backward needs, per row */
    long which, heads, groups;       /* activation, or whether a norm subtracts the mean */
    double epsilon;
} Operation;
typedef struct { const float *data; long gradient; } Parameter;  /* gradient: its place among all */
typedef struct {
    const Operation *operations;
    const Buffer *buffers;
    const Parameter *parameters;
    const int64_t *ids, *targets;    /* (batch, tokens) */
    float *gradients, *others;       /* of the first share; of the others */
    float *memory, *packed;
    double *losses;                  /* of each share */
    long count, batch, tokens, few;  /* few: sequences at once */
    long size, numbers, learned;     /* of one thread's memory, and of all gradients; targets that are not -1 */
    long shares, has_avx512;
    atomic_long next;
    atomic_int failed;
} Tape;

/* of layers.c and passes.c */
typedef struct { float *data; long batch, head, token; } View;
typedef struct {
    View q, k, v, y, dq, dk, dv;
    float *norms;
    long batch, heads, groups, tokens, width;
    const int16_t *const *noise;
    long few, least;
    float *room;
    long size;
    atomic_long next, entered;
} Attention;
int attention(const Attention *given, int has_avx512, int threads);
void entropy(float *logits, const int64_t *ids, float *losses, long rows, long width, int back, int has_avx512, int threads);
void activation(int which, const float *a, const float *b, const float *c, float *y, float *z, long n, int has_avx512,
                int threads);

/* One thread's work on a few sequences */
typedef struct {
    const Tape *tape;
    float *memory, *gradients;
    const int64_t *ids, *targets;
    long sequences, rows;
    double loss;
} Chunk;

#include "vectors.h"

static void step_share(void *data) {
    Tape *m = data;
    for (long s; (s = atomic_fetch_add(&m->next, 1)) < m->shares;) {
        long end = m->batch * (s + 1) / m->shares;
        Chunk c = {m, m->memory + s * m->size, s ? m->others + (s - 1) * m->numbers : m->gradients, NULL, NULL, 0, 0, 0};
        memset(c.gradients, 0, m->numbers * sizeof *c.gradients);
        for (long b = m->batch * s / m->shares; b < end; b += m->few) {
            c.sequences = end - b < m->few ? end - b : m->few;
            c.rows = c.sequences * m->tokens;
            c.ids = m->ids + b * m->tokens;
            c.targets = m->targets + b * m->tokens;
            if ((m->has_avx512 ? pass_16 : pass_8)(&c)) m->failed = 1;
        }
        m->losses[s] = c.loss;
    }
}

static void pack(void *data, long at) {
    const Tape *m = data;
    const Operation *o = m->operations + at;
    if (o->kind == LINEAR) (m->has_avx512 ? pack_16 : pack_8)(m, o);
}

static void add_shares(void *data, long piece) {
    const Tape *m = data;
    long end = (piece + 1) * PIECE < m->numbers ? (piece + 1) * PIECE : m->numbers;
    for (long s = 0; s + 1 < m->shares; s++)
        for (long i = piece * PIECE; i < end; i++) m->gradients[i] += m->others[s * m->numbers + i];
}

/* Returns 0; 1 if memory is short; 2 if a token, 3 if a target is out of range. */
int train(Tape *m, long vocabulary, long head, int threads) {
    m->learned = 0;
    for (long i = 0; i < m->batch * m->tokens; i++) {
        if (m->ids[i] < 0 || m->ids[i] >= vocabulary) return 2;
        if (m->targets[i] < -1 || m->targets[i] >= head) return 3;
        m->learned += m->targets[i] >= 0;
    }
    share(pack, m, m->count, threads);
    m->next = 0;
    m->failed = 0;
    if (threads > 1) GOMP_parallel(step_share, m, threads, 0);
    else step_share(m);
    if (m->shares > 1) share(add_shares, m, (m->numbers + PIECE - 1) / PIECE, threads);
    return m->failed;
}

#else

#define PANEL (2 * LANES)

/* c = a b, or c += a b: M rows, V vectors, the rows of b in a panel */
#define STRIPS(V)                                                                                                      \
    long m = 0;                                                                                                        \
    for (; m + TALL <= M; m += TALL) N(tile)(TALL, V, K, a + m * ar, ar, ac, b, PANEL, c + m * cr, cr, add);           \
    for (; m + 4 <= M; m += 4) N(tile)(4, V, K, a + m * ar, ar, ac, b, PANEL, c + m * cr, cr, add);                    \
    for (; m < M; m++) N(tile)(1, V, K, a + m * ar, ar, ac, b, PANEL, c + m * cr, cr, add);

KERNEL void N(two)(long M, long K, const float *a, long ar, long ac, const float *b, float *c, long cr, int add) { STRIPS(2) }
KERNEL void N(one)(long M, long K, const float *a, long ar, long ac, const float *b, float *c, long cr, int add) { STRIPS(1) }

/* c (+)= a b: (M, K) times (K, n), n a multiple of LANES. b in panels, or with rows `br` apart, copied to `room`. */
KERNEL void N(multiply)(long M, long n, long K, const float *a, long ar, long ac, const float *b, long br, float *c,
                        long cr, int add, float *room) {
    for (long i = 0; i < n; i += PANEL) {
        int whole = i + PANEL <= n;
        for (long k = 0; k < K; k += DEEP) {
            long depth = K - k < DEEP ? K - k : DEEP;
            const float *from = b + i * K + k * PANEL;
            if (br) {
                from = room;
                for (long j = 0; j < depth; j++) {
                    STORE(room + j * PANEL, LOAD(b + (k + j) * br + i));
                    if (whole) STORE(room + j * PANEL + LANES, LOAD(b + (k + j) * br + i + LANES));
                }
            }
            if (whole) N(two)(M, depth, a + k * ac, ar, ac, from, c + i, cr, add || k);
            else N(one)(M, depth, a + k * ac, ar, ac, from, c + i, cr, add || k);
        }
    }
}

/* c += a' b: a with K rows of M numbers, its rows `ar` apart, whose columns are copied to strips in the room first */
KERNEL void N(multiply_turned)(long M, long n, long K, const float *a, long ar, const float *b, long br, float *c, float *room) {
    float *strips = room + DEEP * WIDE;
    for (long k = 0; k < K; k += DEEP) {
        long depth = K - k < DEEP ? K - k : DEEP;
        for (long m = 0; m < M; m += TALL)
            for (long j = 0; j < depth; j++) {
                float *to = strips + m * depth + j * TALL;
                const float *from = a + (k + j) * ar + m;
                if (m + TALL <= M) memcpy(to, from, TALL * sizeof *to);
                else for (long i = 0; m + i < M; i++) to[i] = from[i];
            }
        for (long i = 0; i < n; i += PANEL) {
            int whole = i + PANEL <= n;
            for (long j = 0; j < depth; j++) {
                STORE(room + j * PANEL, LOAD(b + (k + j) * br + i));
                if (whole) STORE(room + j * PANEL + LANES, LOAD(b + (k + j) * br + i + LANES));
            }
            for (long m = 0; m < M; m += TALL) {
                long few = M - m < TALL ? M - m : TALL;
                if (whole) N(two)(few, depth, strips + m * depth, 1, TALL, room, c + m * n + i, n, 1);
                else N(one)(few, depth, strips + m * depth, 1, TALL, room, c + m * n + i, n, 1);
            }
        }
    }
}

/* The transposed weight in panels, zeros beyond its outputs */
KERNEL void N(pack)(const Tape *m, const Operation *o) {
    const float *w = m->parameters[o->weight].data;
    float *to = m->packed + o->packed;
    long K = o->inputs, width = m->buffers[o->y].width;
    for (long i = 0; i < width; i += PANEL) {
        long some = o->outputs - i < PANEL ? o->outputs - i : PANEL;
        for (long k = 0; k < K; k++, to += PANEL) {
            for (long j = 0; j < some; j++) to[j] = w[(i + j) * K + k];
            for (long j = some; j < PANEL; j++) to[j] = 0;
        }
    }
}

KERNEL void N(norm)(const Operation *o, long rows, const float *x, const float *w, const float *bias, float *y, float *kept) {
    long n = o->inputs;
    for (long r = 0; r < rows; r++, x += n, y += n) {
        Vec sum = ALL(0), square = ALL(0);
        for (long i = 0; o->which && i < n; i += LANES) sum += LOAD(x + i);
        float mean = TOTAL(sum) / n;
        for (long i = 0; i < n; i += LANES) {
            Vec d = LOAD(x + i) - mean;
            square = FMA(d, d, square);
        }
        float scale = 1 / sqrtf(TOTAL(square) / n + (float)o->epsilon);
        for (long i = 0; i < n; i += LANES) {
            Vec d = (LOAD(x + i) - mean) * scale * LOAD(w + i);
            if (bias) d += LOAD(bias + i);
            STORE(y + i, d);
        }
        kept[2 * r] = mean;
        kept[2 * r + 1] = scale;
    }
}

KERNEL void N(norm_back)(const Operation *o, long rows, const float *x, const float *w, const float *dy, const float *kept,
                         float *dx, float *dw, float *dbias) {
    long n = o->inputs;
    for (long r = 0; r < rows; r++, x += n, dy += n, dx += n) {
        float mean = kept[2 * r], scale = kept[2 * r + 1];
        Vec sum = ALL(0), along = ALL(0);
        for (long i = 0; i < n; i += LANES) {
            Vec d = LOAD(dy + i), g = d * LOAD(w + i), h = (LOAD(x + i) - mean) * scale;
            sum += g;
            along = FMA(g, h, along);
            STORE(dw + i, FMA(d, h, LOAD(dw + i)));
            if (dbias) STORE(dbias + i, LOAD(dbias + i) + d);
        }
        float shift = o->which ? TOTAL(sum) / n : 0, slope = TOTAL(along) / n;
        for (long i = 0; i < n; i += LANES) {
            Vec h = (LOAD(x + i) - mean) * scale, d = (LOAD(dy + i) * LOAD(w + i) - shift - h * slope) * scale;
            if (o->add) d += LOAD(dx + i);
            STORE(dx + i, d);
        }
    }
}

INLINE void N(sum)(long n, const float *a, const float *b, float *y) {
    for (long i = 0; i < n; i += LANES) STORE(y + i, LOAD(a + i) + LOAD(b + i));
}

#define VALUES(b) (c->memory + m->buffers[b].values)
#define SLOPES(b) (c->memory + m->buffers[b].slopes)
#define GRADIENT(p) (c->gradients + m->parameters[p].gradient)

KERNEL int N(attend)(const Chunk *c, const Operation *o, int back) {
    const Tape *m = c->tape;
    long D = o->outputs / o->heads, T = m->tokens, in = m->buffers[o->x].width, out = m->buffers[o->y].width;
    float *q = VALUES(o->x), *dq = back ? SLOPES(o->x) : NULL, *y = back ? SLOPES(o->y) : VALUES(o->y);
    long k = o->heads * D, v = k + o->groups * D;
    Attention job = {
        {q, T * in, D, in}, {q + k, T * in, D, in}, {q + v, T * in, D, in}, {y, T * out, D, out},
        {dq, T * in, D, in}, {back ? dq + k : NULL, T * in, D, in}, {back ? dq + v : NULL, T * in, D, in},
        c->memory + o->kept, c->sequences, o->heads, o->groups, T, D,
    };
    return attention(&job, LANES == 16, 1);
}

KERNEL int N(forward)(Chunk *c, const Operation *o) {
    const Tape *m = c->tape;
    long n = m->buffers[o->y].width, rows = c->rows;
    const float *x = VALUES(o->x), *w = o->weight < 0 ? NULL : m->parameters[o->weight].data;
    const float *bias = o->bias < 0 ? NULL : m->parameters[o->bias].data;
    float *y = VALUES(o->y);
    switch (o->kind) {
    case TOKENS: case PLACES:
        for (long r = 0; r < rows; r++)
            memcpy(y + r * n, w + (o->kind == TOKENS ? c->ids[r] : r % m->tokens) * n, n * sizeof *y);
        break;
    case ADD: N(sum)(rows * n, x, VALUES(o->other), y); break;
    case NORM: N(norm)(o, rows, x, w, bias, y, c->memory + o->kept); break;
    case LINEAR:
        for (long r = 0; bias && r < rows; r++) memcpy(y + r * n, bias, o->outputs * sizeof *y);
        N(multiply)(rows, n, o->inputs, x, m->buffers[o->x].width, 1, m->packed + o->packed, 0, y, n, bias != NULL, NULL);
        break;
    case ACTIVATION:
        activation(o->which, x, o->other < 0 ? NULL : VALUES(o->other), NULL, y, NULL, rows * n, LANES == 16, 1);
        break;
    case ATTENTION: return N(attend)(c, o, 0);
    case LOSS: {  /* the gradient of the logits takes their place */
        float *z = (float *)x, loss;
        long width = m->buffers[o->x].width;
        for (long r = 0; r < rows; r++, z += width) {
            Vec share = ALL(c->targets[r] < 0 ? 0 : 1.0f / m->learned);
            for (long i = o->inputs; i < width; i++) z[i] = -INFINITY;
            entropy(z, c->targets + r, &loss, c->targets[r] >= 0, width, 1, LANES == 16, 1);
            if (c->targets[r] < 0) memset(z, 0, width * sizeof *z);
            else c->loss += loss;
            for (long i = 0; i < width; i += LANES) STORE(z + i, LOAD(z + i) * share);
        }
    }
    }
    return 0;
}

KERNEL int N(backward)(Chunk *c, const Operation *o) {
    const Tape *m = c->tape;
    long n = m->buffers[o->y].width, rows = c->rows, in = o->x < 0 ? 0 : m->buffers[o->x].width;
    float *dy = SLOPES(o->y), *dx = SLOPES(o->x), *dw = o->weight < 0 ? NULL : GRADIENT(o->weight);
    float *dbias = o->bias < 0 ? NULL : GRADIENT(o->bias), *room = c->memory;
    const float *x = VALUES(o->x), *w = o->weight < 0 ? NULL : m->parameters[o->weight].data;
    switch (o->kind) {
    case TOKENS: case PLACES:
        for (long r = 0; r < rows; r++) {
            float *to = dw + (o->kind == TOKENS ? c->ids[r] : r % m->tokens) * n;
            N(sum)(n, to, dy + r * n, to);
        }
        break;
    case ADD:
        if (o->add > 0) N(sum)(rows * n, dx, dy, dx);
        if (o->add_other > 0) N(sum)(rows * n, SLOPES(o->other), dy, SLOPES(o->other));
        break;
    case NORM: N(norm_back)(o, rows, x, w, dy, c->memory + o->kept, dx, dw, dbias); break;
    case LINEAR:
        N(multiply_turned)(o->outputs, o->inputs, rows, dy, n, x, in, dw, room);
        for (long r = 0; dbias && r < rows; r++)
            for (long i = 0; i < o->outputs; i++) dbias[i] += dy[r * n + i];
        N(multiply)(rows, o->inputs, o->outputs, dy, n, 1, w, o->inputs, dx, in, o->add, room);
        break;
    case ACTIVATION: {
        const float *two = o->other < 0 ? dy : VALUES(o->other), *three = o->other < 0 ? NULL : dy;
        activation(o->which + 1, x, two, three, dx, o->other < 0 ? NULL : SLOPES(o->other), rows * n, LANES == 16, 1);
        break;
    }
    case ATTENTION: return N(attend)(c, o, 1);
    }
    return 0;
}

KERNEL int N(pass)(Chunk *c) {
    const Tape *m = c->tape;
    int failed = 0;
    for (long i = 0; i < m->count; i++) failed |= N(forward)(c, m->operations + i);
    for (long i = m->count - 2; i >= 0; i--) failed |= N(backward)(c, m->operations + i);
    return failed;
}

#endif
