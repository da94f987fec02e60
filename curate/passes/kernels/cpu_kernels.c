/* What torch has no fast operator for on a CPU: attention of a packed row, and the sums of a block of logits.
 *
 * Compiled where it runs by passes/kernels/cpu_kernels.py, which holds the contract of these functions and says which are tried before their first use.
 * Float32 throughout; NaN and infinities come out as torch's operators give them: not finite.
 */

#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#define WIDTH 16 /* numbers in a vector */
#define COLS 4   /* vectors side by side in a tile: ROWS × COLS sums and COLS operands stay in registers */
#else
#define WIDTH 8
#define COLS 2
#endif
#define ROWS 6
#define PANEL (WIDTH * COLS)
#define QUERIES 48 /* at a time */
#define KEYS 512   /* at a time, whole panels */
#define LOG2_E 1.4426950408889634

const int width = WIDTH;

typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH), aligned(4)));

static inline vec load(const float *from) { return *(const vec *)from; }
static inline void store(float *to, vec x) { *(vec *)to = x; }
static inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

/* larger(a, b): the larger, b where either is NaN. exp2_of(x): 2^x for x <= 0, to 2e-7; 0 far below 2^-126; NaN of NaN. */
static inline vec power(vec f) { /* 2^f in [-0.5, 0.5] */
    vec p = f * 1.5353362e-4f + 1.3398874e-3f;
    p = p * f + 9.6184374e-3f;
    p = p * f + 5.5503325e-2f;
    p = p * f + 2.4022648e-1f;
    p = p * f + 6.9314720e-1f;
    return p * f + 1.0f;
}

#ifdef __AVX512F__
static inline vec larger(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
static inline vec exp2_of(vec x) {
    x = larger((vec){0} - 200.0f, x);
    vec whole = (vec)_mm512_roundscale_ps((__m512)x, 0); /* to the nearest */
    return (vec)_mm512_scalef_ps((__m512)power(x - whole), (__m512)whole);
}
static inline float largest(vec x) { return _mm512_reduce_max_ps((__m512)x); }
static inline float sum(vec x) { return _mm512_reduce_add_ps((__m512)x); }
#else
static inline vec larger(vec a, vec b) { return (vec)_mm256_max_ps((__m256)a, (__m256)b); }
static inline vec exp2_of(vec x) {
    ivec enough = ~(x < -126.0f);
    x = larger((vec){0} - 126.0f, x);
    vec whole = (vec)_mm256_round_ps((__m256)x, 0);
    vec p = power(x - whole) * (vec)((__builtin_convertvector(whole, ivec) + 127) << 23);
    return (vec)((ivec)p & enough);
}
static inline float largest(vec x) {
    float found = x[0];
    for (int i = 1; i < WIDTH; i++) found = x[i] > found ? x[i] : found;
    return found;
}

static inline float sum(vec x) {
    float found = 0;
    for (int i = 0; i < WIDTH; i++) found += x[i];
    return found;
}
#endif

/* s[6][KEYS] = q[6][d] panel[d][PANEL] */
static inline void scores(const float *restrict q, int d, const float *restrict panel, float *restrict s) {
    vec a[ROWS][COLS] = {{{0}}};
    for (int c = 0; c < d; c++) {
        vec k[COLS];
        for (int j = 0; j < COLS; j++) k[j] = load(panel + c * PANEL + j * WIDTH);
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < COLS; j++) a[i][j] += q[i * d + c] * k[j];
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLS; j++) store(s + i * KEYS + j * WIDTH, a[i][j]);
}

/* o[6][cols vectors] += p[6][n of KEYS] v[n][dv] */
static inline __attribute__((always_inline)) void add_values(
    const float *restrict p, int n, const float *restrict v, int dv, float *restrict o, const int cols) {
    vec a[ROWS][COLS];
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < cols; j++) a[i][j] = load(o + i * dv + j * WIDTH);
    for (int t = 0; t < n; t++) {
        vec x[COLS];
        for (int j = 0; j < cols; j++) x[j] = load(v + (size_t)t * dv + j * WIDTH);
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < cols; j++) a[i][j] += p[i * KEYS + t] * x[j];
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < cols; j++) store(o + i * dv + j * WIDTH, a[i][j]);
}

/* One row of scores of the keys `from` to `to` of a block, n numbers in whole panels: into weights, with the row's running maximum and sum.
 * -> what its values so far shrink by. */
static inline float soften(float *s, int from, int to, int n, float *best, float *total) {
    if (to <= from) { /* `from` may lie far beyond the block */
        memset(s, 0, n * sizeof(float));
        return 1;
    }
    for (int j = 0; j < from; j++) s[j] = -INFINITY;
    for (int j = to; j < n; j++) s[j] = -INFINITY;
    vec top = load(s), added = {0};
    for (int j = WIDTH; j < n; j += WIDTH) top = larger(load(s + j), top);
    float now = largest(top);
    now = now > *best ? now : *best;
    float shrink = *total > 0 ? exp2f(*best - now) : 1; /* NaN: all is NaN anyway */
    for (int j = 0; j < n; j += WIDTH) {
        vec e = exp2_of(load(s + j) - now);
        store(s + j, e);
        added += e;
    }
    *total = *total * shrink + sum(added);
    *best = now;
    return shrink;
}

typedef struct {
    const float *q, *k, *v; /* of one head */
    int64_t q_step, k_step, v_step;
    float *out;
    int64_t out_step;
} Head;

/* Keys of one stretch and head in panels [d][PANEL], its values side by side. */
static void gather(Head head, int64_t own, int64_t prefix, int p, int total, int d, int dv, float *keys, float *values) {
    for (int t = 0; t < round_up(total, PANEL); t++) {
        int64_t token = t < p ? prefix + t : own + t - p;
        float *panel = keys + (size_t)(t / PANEL) * PANEL * d + t % PANEL;
        for (int c = 0; c < d; c++) panel[c * PANEL] = t < total ? head.k[token * head.k_step + c] : 0;
        if (t < total) memcpy(values + (size_t)t * dv, head.v + token * head.v_step, dv * sizeof(float));
    }
}

/* Queries i0 to i0 + m of a stretch that begins at token `own`, over its prefix of p keys and themselves. */
static void attend(Head head, int64_t own, int i0, int m, int p, int d, int dv, float scale, const int64_t *low, const float *keys,
                   const float *values, float *room) {
    float *q = room, *o = q + QUERIES * d, *s = o + QUERIES * dv, *best = s + ROWS * KEYS, *total = best + QUERIES;
    int rows = round_up(m, ROWS), first = p + i0, end = first + m, begin = first;
    for (int i = 0; i < rows; i++) {
        const float *from = head.q + (own + i0 + i) * head.q_step;
        for (int c = 0; c < d; c++) q[i * d + c] = i < m ? from[c] * scale : 0;
        best[i] = -INFINITY;
        total[i] = 0;
    }
    memset(o, 0, (size_t)rows * dv * sizeof(float));
    for (int i = 0; i < m; i++)
        if (!low || low[first + i] < begin) begin = low ? low[first + i] : 0;
    for (int b = begin / PANEL * PANEL; b < end; b += KEYS) {
        int n = end - b < KEYS ? end - b : KEYS;
        const float *v = values + (size_t)b * dv;
        for (int i = 0; i < rows; i += ROWS) { /* nothing beyond the last key that one of the six sees */
            int last = first + i + ROWS - b, most = last < n ? last : n, whole = round_up(most, PANEL), c = 0;
            if (most <= 0) continue;
            for (int j = 0; j < whole; j += PANEL) scores(q + i * d, d, keys + (size_t)(b + j) * d, s + j);
            for (int r = i; r < i + ROWS; r++) {
                int behind = low && r < m ? low[first + r] - b : 0, seen = r < m ? first + r + 1 - b : 0;
                float shrink = soften(s + (r - i) * KEYS, behind > 0 ? behind : 0, seen < whole ? seen : whole, whole, best + r, total + r);
                if (shrink != 1)
                    for (c = 0; c < dv; c++) o[r * dv + c] *= shrink;
            }
            for (c = 0; c + PANEL <= dv; c += PANEL) add_values(s, most, v + c, dv, o + i * dv + c, COLS);
            for (; c < dv; c += WIDTH) add_values(s, most, v + c, dv, o + i * dv + c, 1);
        }
    }
    for (int i = 0; i < m; i++) {
        float *to = head.out + (own + i0 + i) * head.out_step;
        float share = 1 / total[i];
        for (int c = 0; c < dv; c++) to[c] = o[i * dv + c] * share;
    }
}

/* -> 0, or 1 where memory is short. */
int packed_attention(const float *q, const float *k, const float *v, float *out, const int64_t *steps, int heads, int kv_heads, int d, int dv,
                     float scale, const int64_t *stretches, int n_stretches, const int64_t *low, int threads) {
    int64_t longest = 0;
    for (int s = 0; s < n_stretches; s++) {
        int64_t total = stretches[4 * s + 1] + stretches[4 * s + 3];
        if (total > longest) longest = total;
    }
    size_t kept = (size_t)round_up(longest, KEYS) * (d + dv), size = kept + (size_t)QUERIES * (d + dv + 2) + ROWS * KEYS;
    int failed = 0, group = heads / kv_heads;
    scale *= LOG2_E;
#pragma omp parallel num_threads(threads)
    {
        float *keys = aligned_alloc(64, (size * sizeof(float) + 63) / 64 * 64), *values = keys + (size_t)round_up(longest, KEYS) * d;
        if (!keys) failed = 1;
#pragma omp for schedule(dynamic) collapse(2)
        for (int s = 0; s < n_stretches; s++)
            for (int h = 0; h < kv_heads; h++) {
                if (!keys) continue;
                const int64_t *stretch = stretches + 4 * s;
                int n = stretch[1], p = stretch[3];
                Head head = {q, k + h * steps[3], v + h * steps[5], steps[0], steps[2], steps[4], out, (int64_t)heads * dv};
                gather(head, stretch[0], stretch[2], p, p + n, d, dv, keys, values);
                for (int g = h * group; g < (h + 1) * group; g++) {
                    head.q = q + g * steps[1];
                    head.out = out + (size_t)g * dv;
                    for (int i = 0; i < n; i += QUERIES)
                        attend(head, stretch[0], i, n - i < QUERIES ? n - i : QUERIES, p, d, dv, scale, low, keys, values, keys + kept);
                }
            }
        free(keys);
    }
    return failed;
}

typedef struct {
    vec total, square, weighted;
} Sums;

static inline Sums with(Sums sums, vec x) {
    vec e = exp2_of(x * (float)LOG2_E);
    return (Sums){sums.total + e, sums.square + e * e, sums.weighted + x * e};
}

void head_sums(float *z, int64_t n, int64_t width, int64_t step, int64_t start, float nothing, const int64_t *tokens, const double *own,
               double *best, double *total, double *square, double *weighted, double *rank, int64_t *best_token, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; i++) {
        float *row = z + i * step;
        int64_t at = tokens[i] - start, whole = width / WIDTH * WIDTH;
        if (at >= 0 && at < width) row[at] = nothing;
        vec rest = (vec){0} + nothing;
        memcpy(&rest, row + whole, (width - whole) * sizeof(float));
        vec top[4] = {rest, rest, rest, rest}; /* side by side: one would wait for itself */
        int64_t j = 0;
        for (; j + 4 * WIDTH <= whole; j += 4 * WIDTH)
            for (int t = 0; t < 4; t++) top[t] = larger(load(row + j + t * WIDTH), top[t]);
        for (; j < whole; j += WIDTH) top[0] = larger(load(row + j), top[0]);
        float highest = largest(larger(larger(top[0], top[1]), larger(top[2], top[3])));
        double now = highest > best[i] ? highest : best[i], shrink = exp(best[i] - now);
        if (rank) {
            float limit = own[i];
            ivec above = {0};
            for (j = 0; j < whole; j += WIDTH) above -= load(row + j) > limit;
            above -= rest > limit;
            for (j = 0; j < WIDTH; j++) rank[i] += above[j];
        }
        if (best_token && highest > best[i])
            for (j = 0; j < width; j++)
                if (row[j] == highest) {
                    best_token[i] = start + j;
                    break;
                }
        float shift = now;
        Sums one = {{0}, {0}, {0}}, other = {{0}, {0}, {0}}; /* two sums of half the terms round less than one */
        for (j = 0; j + 2 * WIDTH <= whole; j += 2 * WIDTH) {
            one = with(one, load(row + j) - shift);
            other = with(other, load(row + j + WIDTH) - shift);
        }
        if (j < whole) one = with(one, load(row + j) - shift);
        other = with(other, rest - shift);
        weighted[i] = shrink * (weighted[i] + total[i] * (best[i] - now)) + sum(one.weighted + other.weighted);
        square[i] = square[i] * shrink * shrink + sum(one.square + other.square);
        total[i] = total[i] * shrink + sum(one.total + other.total);
        best[i] = total[i] == total[i] ? now : NAN;
    }
}

/* y = x / rms(x) * weight, row by row, (n, d). */
void rms_norm(const float *x, float *y, const float *weight, int64_t n, int64_t d, float eps, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; i++) {
        const float *from = x + i * d;
        float *to = y + i * d;
        vec squares[2] = {{0}};
        int64_t j = 0;
        for (; j + 2 * WIDTH <= d; j += 2 * WIDTH)
            for (int t = 0; t < 2; t++) squares[t] += load(from + j + t * WIDTH) * load(from + j + t * WIDTH);
        float total = sum(squares[0] + squares[1]);
        for (; j < d; j++) total += from[j] * from[j];
        float scale = 1 / sqrtf(total / d + eps);
        for (j = 0; j < d; j++) to[j] = from[j] * scale * weight[j];
    }
}

/* a = a / (1 + e^-a) * b: a gated unit's SiLU. */
void silu_times(float *a, const float *b, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; i += WIDTH) {
        int64_t left = n - i < WIDTH ? n - i : WIDTH;
        vec x = {0}, y = {0};
        memcpy(&x, a + i, left * sizeof(float));
        memcpy(&y, b + i, left * sizeof(float));
        ivec negative = x < 0;
        vec e = exp2_of((vec)((ivec)(x * (float)LOG2_E) | (int32_t)0x80000000)); /* e^-|x| */
        vec over = (vec)((negative & (ivec)e) | (~negative & (ivec)((vec){0} + 1.0f)));
        x = x * over / (1 + e) * y;
        memcpy(a + i, &x, left * sizeof(float));
    }
}

/* Rotary angles: pairs (c, c + d/2) of each head of x are turned. y: (n, heads, d) side by side. */
void rotate(const float *x, float *y, const float *cosines, const float *sines, int64_t n, int64_t heads, int64_t d, int64_t step,
            int64_t head_step, int threads) {
    int64_t half = d / 2;
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; i++)
        for (int64_t h = 0; h < heads; h++) {
            const float *restrict from = x + i * step + h * head_step, *restrict cosine = cosines + i * d, *restrict sine = sines + i * d;
            float *restrict to = y + (i * heads + h) * d;
            for (int64_t c = 0; c < half; c++) {
                float a = from[c], b = from[c + half];
                to[c] = a * cosine[c] - b * sine[c];
                to[c + half] = b * cosine[c + half] + a * sine[c + half];
            }
        }
}
