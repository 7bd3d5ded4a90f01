// What decoding needs, in float32: products of few rows with large matrices, and attention of the next token.
//
// A library's product is made for many rows; for eight it reads the weights at a fraction of what memory
// delivers. Here a tile of ROWS x 3 sums stays in registers while weights stream past once, the next ones
// already on their way. The order of additions in a sum depends on k alone: a row's result is the same, bit
// by bit, whatever rows surround it.
//
// Compiled by `python -m preftune.models.fast.native` for the vector width of the machine (see there).

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#ifndef WIDTH
#define WIDTH 8  // floats in a vector
#endif

namespace {

typedef float Vector __attribute__((vector_size(4 * WIDTH), aligned(4)));
constexpr int ROWS = WIDTH == 16 ? 8 : 4, COLUMNS = 3;  // 24 of 32 registers, or 12 of 16
constexpr long AHEAD = 16384;  // floats of an (n, k) matrix: how far ahead of their use weights are fetched
constexpr long DEPTH = 32;     // rows of a (k, n) matrix in a block; the next one is fetched meanwhile

inline Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }
inline Vector all(float x) { return x - Vector{}; }

// Into the L2 cache: what is fetched that early would drive out of the smaller one what is needed now.
inline void fetch(const float* p) { __builtin_prefetch(p, 0, 2); }

inline float total(Vector v) {
    typedef float Half __attribute__((vector_size(2 * WIDTH)));
    typedef float Quad __attribute__((vector_size(16)));
    union { Vector v; Half half[2]; } a = {v};
    union { Half v; Quad quad[WIDTH / 8]; } b = {a.half[0] + a.half[1]};
    Quad q = b.quad[0];
    if (WIDTH == 16) q += b.quad[WIDTH / 8 - 1];
    return (q[0] + q[2]) + (q[1] + q[3]);
}

// y[r][c] = x[r] . w[c] for R rows of x and C of w, k long each.
template <int R, int C>
void dots(const float* x, const float* w, const float* bias, float* y, long n, long k, const float* ahead) {
    Vector sum[R][C] = {};
    long i = 0;
    for (; i + WIDTH <= k; i += WIDTH) {
        Vector weights[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
            weights[c] = load(w + c * k + i);
            if (ahead) fetch(ahead + c * k + i);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            Vector value = load(x + r * k + i);
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) sum[r][c] += value * weights[c];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
            float s = total(sum[r][c]);
            for (long j = i; j < k; j++) s += x[r * k + j] * w[c * k + j];
            y[r * n + c] = s + (bias ? bias[c] : 0);
        }
}

template <int C, int R = ROWS>
void dots_of_rows(const float* x, const float* w, const float* bias, float* y, long m, long n, long k, long next) {
    if constexpr (R > 0) {
        if (m < R) return dots_of_rows<C, R - 1>(x, w, bias, y, m, n, k, next);
        dots<R, C>(x, w, bias, y, n, k, next ? w + AHEAD : nullptr);
        if (m > R) dots_of_rows<C, R>(x + R * k, w, bias, y + R * n, m - R, n, k, 0);
    }
}

// y[r][c ...] += sum over i of x[r][i] w[i][c ...] for R rows of x and C vectors of columns.
template <int R, int C>
void tile(const float* x, const float* w, float* y, long n, long k, long depth, const float* ahead) {
    Vector sum[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) sum[r][c] = load(y + r * n + c * WIDTH);
    for (long i = 0; i < depth; i++) {
        Vector weights[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
            weights[c] = load(w + i * n + c * WIDTH);
            if (ahead) fetch(ahead + i * n + c * WIDTH);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            Vector value = all(x[r * k + i]);
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) sum[r][c] += value * weights[c];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) store(y + r * n + c * WIDTH, sum[r][c]);
}

template <int C, int R = ROWS>
void tile_rows(const float* x, const float* w, float* y, long m, long n, long k, long depth, const float* ahead) {
    if constexpr (R > 0) {
        if (m < R) return tile_rows<C, R - 1>(x, w, y, m, n, k, depth, ahead);
        tile<R, C>(x, w, y, n, k, depth, ahead);
        if (m > R) tile_rows<C, R>(x + R * k, w, y + R * n, m - R, n, k, depth, nullptr);
    }
}

// out[j] = q . k[j] for `count` rows of k.
void products(const float* q, const float* k, float* out, long count, long width) {
    long j = 0;
    for (; j + COLUMNS <= count; j += COLUMNS)
        dots<1, COLUMNS>(q, k + j * width, nullptr, out + j, count, width, nullptr);
    for (; j < count; j++) dots<1, 1>(q, k + j * width, nullptr, out + j, count, width, nullptr);
}

// out += sum over j of p[j] v[j], for `count` rows of v with `width` floats, a multiple of WIDTH.
void weighted(const float* p, const float* v, float* out, long count, long width) {
    for (long d = 0; d < width; d += WIDTH) {
        Vector sum[2] = {load(out + d), Vector{}};
        long j = 0;
        for (; j + 1 < count; j += 2) {
            sum[0] += p[j] * load(v + j * width + d);
            sum[1] += p[j + 1] * load(v + (j + 1) * width + d);
        }
        if (j < count) sum[0] += p[j] * load(v + j * width + d);
        store(out + d, sum[0] + sum[1]);
    }
}

}  // namespace

extern "C" {

// y (m, n) = x (m, k) . w (n, k)^T + bias: nn.Linear, and the head.
void preftune_linear(const float* x, const float* w, const float* bias, float* y, long m, long n, long k, int threads) {
    long blocks = n / COLUMNS;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long b = 0; b < blocks; b++) {
        long c = b * COLUMNS, next = b + 1 < blocks ? COLUMNS * k : 0;
        dots_of_rows<COLUMNS>(x, w + c * k, bias ? bias + c : nullptr, y + c, m, n, k, next);
    }
    for (long c = blocks * COLUMNS; c < n; c++)
        dots_of_rows<1>(x, w + c * k, bias ? bias + c : nullptr, y + c, m, n, k, 0);
}

// y (m, n) = x (m, k) . w (k, n) + bias: transformers' Conv1D. n must be a multiple of `preftune_width`.
void preftune_conv1d(const float* x, const float* w, const float* bias, float* y, long m, long n, long k, int threads) {
    const long share = (n / WIDTH + threads - 1) / threads * WIDTH;  // columns of a thread
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int thread = 0; thread < threads; thread++) {
        const long begin = thread * share, end = std::min(n, begin + share);
        for (long r = 0; r < m; r++)
            for (long c = begin; c < end; c++) y[r * n + c] = bias ? bias[c] : 0;
        for (long i = 0; i < k; i += DEPTH) {
            const long depth = std::min(DEPTH, k - i);
            for (long c = begin; c < end; c += COLUMNS * WIDTH) {
                const float* from = w + i * n + c;
                const float* ahead = i + depth < k ? from + depth * n : nullptr;
                const long vectors = (end - c) / WIDTH;
                if (vectors >= 3) tile_rows<3>(x + i, from, y + c, m, n, k, depth, ahead);
                if (vectors == 2) tile_rows<2>(x + i, from, y + c, m, n, k, depth, ahead);
                if (vectors == 1) tile_rows<1>(x + i, from, y + c, m, n, k, depth, ahead);
            }
        }
    }
}

// One layer's attention of n rows to their prompts and to what they have written, as GridDecoder.attend has it.
// query, out (n, heads, width) · key, value (n, kv, width), put at `written` of new_keys, new_values
// (groups, kv, places, limit, width) · keys, values (groups, kv, length, width) · place (n) · lengths (groups).
void preftune_attend(const float* query, const float* key, const float* value, const float* keys,
                     const float* values, float* new_keys, float* new_values, const int64_t* place,
                     const int64_t* lengths, float* out, const long* sizes, float scaling, int threads) {
    auto [n, heads, kv, width, length, places, limit, written] =
        std::array<long, 8>{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7]};
    const long share = heads / kv;
    const bool split = threads > 1 && n * kv > 1;
#pragma omp parallel for num_threads(threads) if (split) schedule(static)
    for (long task = 0; task < n * kv; task++) {
        // Rows of a group follow each other, so that their prompt's keys stay in the cache.
        const long row = task % n, head = task / n;
        const long group = place[row] / places, shared = lengths[group];
        const long incoming = (row * kv + head) * width;  // where this token's key and value are given
        const long history = (((group * kv + head) * places + place[row] % places) * limit) * width;  // of the row
        std::copy_n(key + incoming, width, new_keys + history + written * width);
        std::copy_n(value + incoming, width, new_values + history + written * width);
        const float* k = keys + (group * kv + head) * length * width;
        const float* v = values + (group * kv + head) * length * width;
        std::vector<float> weights(shared + written + 1);
        for (long h = head * share; h < (head + 1) * share; h++) {
            const float* q = query + (row * heads + h) * width;
            float* o = out + (row * heads + h) * width;
            products(q, k, weights.data(), shared, width);
            products(q, new_keys + history, weights.data() + shared, written + 1, width);
            const float top = *std::max_element(weights.begin(), weights.end());
            float sum = 0;
            for (float& w : weights) {
                w = std::exp(scaling * (w - top));
                sum += w;
            }
            for (float& w : weights) w /= sum;
            std::fill_n(o, width, 0.0f);
            weighted(weights.data(), v, o, shared, width);
            weighted(weights.data() + shared, new_values + history, o, written + 1, width);
        }
    }
}

int preftune_width() { return WIDTH; }
}
