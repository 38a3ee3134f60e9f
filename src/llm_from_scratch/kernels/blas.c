/* Matrix products by a BLAS library's function for one thread, in slices that torch's threads share. */

#ifndef LANES

#define BODY "blas.c"
#include "vectors.h"

enum { ROW_MAJOR = 101, PLAIN = 111, TRANSPOSED = 112, ALIGNED = 48, SLICES = 2 };

typedef void Sgemm(int order, int a_kind, int b_kind, int64_t rows, int64_t columns, int64_t inner, float alpha,
                   const float *a, int64_t a_row, const float *b, int64_t b_row, float beta, float *c, int64_t c_row);

/* c = a b, or c += a b. a: (rows, inner), b: (inner, columns); one of the strides of each is 1. */
typedef struct {
    Sgemm *sgemm;
    const float *a, *b;
    float *c;
    int64_t rows, columns, inner, a_row, a_column, b_row, b_column, add;
} Product;
typedef struct { const Product *product; int64_t slice; } Sliced;

static void slice(void *data, long piece) {
    const Sliced *s = data;
    const Product *m = s->product;
    int is_wide = m->columns >= m->rows, a_turned = m->a_column != 1, b_turned = m->b_column != 1;
    int64_t from = piece * s->slice, whole = is_wide ? m->columns : m->rows;
    int64_t count = whole - from < s->slice ? whole - from : s->slice;
    const float *a = m->a + (is_wide ? 0 : from * m->a_row), *b = m->b + (is_wide ? from * m->b_column : 0);
    m->sgemm(ROW_MAJOR, a_turned ? TRANSPOSED : PLAIN, b_turned ? TRANSPOSED : PLAIN, is_wide ? m->rows : count,
             is_wide ? count : m->columns, m->inner, 1, a, a_turned ? m->a_column : m->a_row, b,
             b_turned ? m->b_column : m->b_row, m->add, m->c + from * (is_wide ? 1 : m->columns), m->columns);
}

void blas_product(const Product *m, int threads) {
    int64_t whole = m->columns >= m->rows ? m->columns : m->rows, pieces = threads > 1 ? threads * SLICES : 1;
    Sliced sliced = {m, ((whole + pieces - 1) / pieces + ALIGNED - 1) / ALIGNED * ALIGNED};
    share(slice, &sliced, (whole + sliced.slice - 1) / sliced.slice, threads);
}

int is_amd(void) { return __builtin_cpu_is("amd"); }

#endif
