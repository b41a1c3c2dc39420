/* y[i][n] = sum_k x[i][k] * table[code(n, k)] * scale[n][k / group]: few tokens against packed
   4-bit weights. The weights are decoded in registers (one permute for 16 codes) and never stored,
   so a call reads 4 bits a weight instead of the 16 or 32 of a dequantised copy.
   x comes split by the parity of k, as the two nibbles of a byte are: xs[i][0][k/2], xs[i][1][k/2]. */
#include <stdint.h>

#define LANES 16 /* bytes a step: 32 weights, one smallest scale group */
#define ROWS 4   /* tokens a pass over the weights: their sums fit in registers */

typedef float f32v __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t i32v __attribute__((vector_size(4 * LANES)));
typedef uint8_t u8v __attribute__((vector_size(LANES), aligned(1)));

static float sum(f32v v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

static inline __attribute__((always_inline)) void dot(
    const float *xs, const uint8_t *codes, const float *scales, f32v table, float *y,
    int rows, long k, long group, long ldy) {
    const long half = k / 2;
    f32v acc[ROWS] = {0};
    for (long j = 0; j < half; j += LANES) {
        const i32v byte = __builtin_convertvector(*(const u8v *)(codes + j), i32v);
        const float scale = scales[2 * j / group];
        const f32v low = __builtin_shuffle(table, byte & 15) * scale;
        const f32v high = __builtin_shuffle(table, byte >> 4) * scale;
        for (int i = 0; i < rows; i++) {
            const float *x = xs + i * k + j;
            acc[i] += *(const f32v *)x * low + *(const f32v *)(x + half) * high;
        }
    }
    for (int i = 0; i < rows; i++) y[i * ldy] = sum(acc[i]);
}

void mixmoe_w4_matmul(const float *xs, const uint8_t *codes, const float *scales,
                      const float *values, float *y, long m, long n, long k, long group,
                      int threads) {
    const f32v table = *(const f32v *)values;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long row = 0; row < n; row++) {
        const uint8_t *c = codes + row * (k / 2);
        const float *s = scales + row * (k / group);
        long i = 0;
        for (; i + ROWS <= m; i += ROWS) dot(xs + i * k, c, s, table, y + i * n + row, ROWS, k, group, n);
        switch (m - i) { /* constant row counts, so that the sums stay in registers */
        case 3: dot(xs + i * k, c, s, table, y + i * n + row, 3, k, group, n); break;
        case 2: dot(xs + i * k, c, s, table, y + i * n + row, 2, k, group, n); break;
        case 1: dot(xs + i * k, c, s, table, y + i * n + row, 1, k, group, n); break;
        }
    }
}
