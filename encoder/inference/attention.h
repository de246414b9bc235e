// Attention of one token to a ring of cached keys and values.
//
// The build defines HEAD_DIM (K, even), SHARE (query heads per key/value head, H / G) and WINDOW_MAX.
//
// Memory of the KV cache, for a window W whose ring has W places, padded to whole vectors:
//
//   slab    | slot 0                        | slot 1                        | ...
//   slot    | block of layer 0 | block of layer 1 | ...
//   block   | head 0: keys, values | head 1: keys, values | ... up to a multiple of 64 bytes      G heads
//
//   keys    [K / 2][W][2]   two neighbouring dimensions of a key side by side, for all places
//   values  [W / 2][K][2]   two neighbouring places side by side, for all dimensions
//
//             place 0       place 1       place 2                      dim 0         dim 1         dim 2
//   keys  0   d0 d1         d0 d1         d0 d1    ...     values  0   p0 p1         p0 p1         p0 p1    ...
//         1   d2 d3         d2 d3         d2 d3    ...             1   p2 p3         p2 p3         p2 p3    ...
//
// Scores need a sum over dimensions for each place; mixing needs a sum over places for each dimension. In these layouts
// both products walk down the rows with one accumulator lane per place or dimension, so there are no horizontal sums.
// The pairs are for bfloat16: 32 bits hold two numbers, and become two floats with one shift and one mask. Slabs of
// floats have the same rows, but store LANES first elements of pairs, then the LANES second ones (`pair_index`).
//
// The token at offset o (counted from the oldest token in the slot) is kept in place o % W, over the token that has just
// left the window:
//
//   offset   ...  W - 2   W - 1 |   W     W + 1   W + 2  ...
//   place    ...  W - 2   W - 1 |   0       1       2    ...      while o < W only places 0 to o are in use
#pragma once
#include <cmath>
#include <type_traits>

#include "vectors.h"

// WIDTH is the head size padded to whole vectors; what lies behind HEAD_DIM is 0.
constexpr int HALF = HEAD_DIM / 2, WIDTH = padded(HEAD_DIM), PLACES_MAX = padded(WINDOW_MAX);

// Load LANES pairs: first elements to `a`, second ones to `b`. `i` counts in units of LANES pairs.
INLINE void load_pair(const float* p, int i, vec& a, vec& b) {
  a = ((const vec*)p)[2 * i];
  b = ((const vec*)p)[2 * i + 1];
}
INLINE void load_pair(const bf16* p, int i, vec& a, vec& b) {
  uvec u = ((const uvec*)p)[i];
  a = (vec)(u << 16);
  b = (vec)(u & 0xffff0000u);
}
// The index of element `side` (0 or 1) of pair j.
INLINE int64_t pair_index(const float*, int64_t j, int side) { return j / LANES * 2 * LANES + side * LANES + j % LANES; }
INLINE int64_t pair_index(const bf16*, int64_t j, int side) { return 2 * j + side; }
INLINE void prefetch_pair(const cell_t* p, int i) {
  constexpr int bytes = 2 * LANES * sizeof(cell_t);
  for (int at = 0; at < bytes; at += 64) __builtin_prefetch((const char*)p + int64_t(i) * bytes + at, 0, 0);
}

// Load N times LANES pairs from unit `at`, and prefetch the same units of the ring that comes next.
template <int N> INLINE void load_pairs(const cell_t* p, const cell_t* next, int at, vec* a, vec* b) {
  for (int n = 0; n < N; n++) {
    load_pair(p, at + n, a[n], b[n]);
    prefetch_pair(next, at + n);
    KEEP(a[n]);
    KEEP(b[n]);
  }
}

// scores[h][place] = q[h] . key[place], for N vectors of places from vector `at` and H heads.
// `stride` is the length of one row of keys, in vectors.
template <int N, int H> INLINE void score(const cell_t* keys, const cell_t* next, int at, int stride,
                                          const float (*q)[WIDTH], float (*scores)[PLACES_MAX]) {
  vec acc[N][H] = {};
  for (int i = 0; i < HALF; i++) {  // dimensions 2 i and 2 i + 1
    vec a[N], b[N];
    load_pairs<N>(keys, next, i * stride + at, a, b);
    for (int h = 0; h < H; h++)
      for (int n = 0; n < N; n++) acc[n][h] = acc[n][h] + q[h][2 * i] * a[n] + q[h][2 * i + 1] * b[n];
  }
  for (int n = 0; n < N; n++)
    for (int h = 0; h < H; h++) *(vec*)&scores[h][(at + n) * LANES] = acc[n][h];
}

// out[h][d] += sum of weights[h][place] * values[place][d], for N vectors of dimensions from vector `at` and H heads.
// The sum runs over 2 * `pairs` places.
template <int N, int H> INLINE void mix(const cell_t* values, const cell_t* next, int at, int pairs,
                                        const float (*weights)[PLACES_MAX], float (*out)[WIDTH]) {
  constexpr int stride = WIDTH / LANES;
  vec acc[N][H];
  for (int n = 0; n < N; n++)
    for (int h = 0; h < H; h++) acc[n][h] = *(vec*)&out[h][(at + n) * LANES];
  for (int w = 0; w < pairs; w++) {  // places 2 w and 2 w + 1
    vec a[N], b[N];
    load_pairs<N>(values, next, w * stride + at, a, b);
    for (int h = 0; h < H; h++)
      for (int n = 0; n < N; n++) acc[n][h] = acc[n][h] + weights[h][2 * w] * a[n] + weights[h][2 * w + 1] * b[n];
  }
  for (int n = 0; n < N; n++)
    for (int h = 0; h < H; h++) *(vec*)&out[h][(at + n) * LANES] = acc[n][h];
}

// Call f<N>(at) for `total` vectors, N at a time, and the rest with N / 2, N / 4 and so on. N is as large as the registers
// allow, because with fewer independent sums the processor would wait for each addition.
template <int N, class F> INLINE void tiled(int total, F f, int at = 0) {
  for (; at + N <= total; at += N) f(std::integral_constant<int, N>(), at);
  if constexpr (N > 1) tiled<N / 2>(total, f, at);
}
constexpr int TILE = ACCUMULATORS / SHARE > 1 ? ACCUMULATORS / SHARE : 1;

// The keys and values of key/value head g in a block; the layout is at the top of this file.
struct Ring {
  cell_t *keys, *values;
  int places;
  Ring(char* block, int g, int window)
      : keys((cell_t*)block + int64_t(g) * padded(window) * (HEAD_DIM + WIDTH)),
        values(keys + int64_t(padded(window)) * HEAD_DIM), places(padded(window)) {}
  void write(int place, const float* k, const float* v) const {
    for (int i = 0; i < HEAD_DIM; i++) put(keys + int64_t(i / 2) * 2 * places + pair_index(keys, place, i & 1), k[i]);
    cell_t* pair = values + int64_t(place / 2) * 2 * WIDTH;
    for (int i = 0; i < HEAD_DIM; i++) put(pair + pair_index(pair, i, place & 1), v[i]);
  }
  // Needed before the first token of a slot: `mix` reads unwritten values with weight 0, and 0 * NaN is NaN.
  void zero_values() const { memset(values, 0, sizeof(cell_t) * places * WIDTH); }
};

// What every token of a layer shares.
struct Layer {
  int heads, kv_heads, window;
  const float* slopes;  // [H], null without an event-time bias
};
// What belongs to one token, in every layer and head.
struct Token {
  int64_t offset;
  const float *cos, *sin, *time_gaps;  // [K / 2], [K / 2], [padded window] by place of the ring
};

// Apply rotary position encoding: rotate the pairs (i, i + K / 2), and scale.
INLINE void rotate(const row_t* x, const Token& t, float scale, float* out) {
  for (int i = 0; i < HALF; i++) {
    float a = widen(x[i]), b = widen(x[i + HALF]);
    out[i] = (a * t.cos[i] - b * t.sin[i]) * scale;
    out[i + HALF] = (b * t.cos[i] + a * t.sin[i]) * scale;
  }
  for (int i = HEAD_DIM; i < WIDTH; i++) out[i] = 0;
}

// Round to the precision of the cache, so that a token sees itself exactly as later tokens will see it.
INLINE void round_all(float* x) {
  for (int i = 0; i < WIDTH; i++) {
    cell_t cell;
    put(&cell, x[i]);
    x[i] = widen(cell);
  }
}

INLINE void widen_all(const row_t* x, float* out) {
  for (int i = 0; i < HEAD_DIM; i++) out[i] = widen(x[i]);
  for (int i = HEAD_DIM; i < WIDTH; i++) out[i] = 0;
}

// Turn scores (as powers of two) into unnormalised softmax weights, and return 1 / their sum in `scale`, per head.
// Places from `held` to the end of its last vector get weight 0. First the event-time bias is subtracted.
// Each loop covers all heads, so that one head's reduction does not wait for another's.
INLINE void softmax(float (*scores)[PLACES_MAX], int held, const float* time_gaps, const float* slopes, float* scale) {
  const int vectors = padded(held) / LANES;
  vec most[SHARE], total[SHARE] = {};
  float top[SHARE];
  for (int h = 0; h < SHARE; h++) most[h] = vec{} - 1e30f;
  for (int h = 0; h < SHARE; h++)
    for (int w = held; w < vectors * LANES; w++) scores[h][w] = -1e30f;
  for (int n = 0; n < vectors; n++)
    for (int h = 0; h < SHARE; h++) {
      vec& s = *(vec*)&scores[h][n * LANES];
      if (time_gaps) s -= slopes[h] * *(const vec*)&time_gaps[n * LANES];
      most[h] = Max()(most[h], s);
    }
  for (int h = 0; h < SHARE; h++) top[h] = largest(most[h]);
  for (int n = 0; n < vectors; n++)
    for (int h = 0; h < SHARE; h++) {
      vec& s = *(vec*)&scores[h][n * LANES];
      s = exp2v(s - top[h]);
      total[h] += s;
    }
  for (int h = 0; h < SHARE; h++) scale[h] = 1 / sum(total[h]);
  for (int h = 0; h < SHARE; h++)  // exp2v does not go below 2^-126, so padding needs its zeros here
    for (int w = held; w < vectors * LANES; w++) scores[h][w] = 0;
}

// Attend with one token and key/value head g: mix the ring's values and the token's own, then write it into the ring.
//
// Until then the token's place holds the token that has left the window, or nothing. So the score of that place is
// replaced by the token's own, and its weight is applied to `v` in registers and set to 0 in the ring. This looks
// roundabout, but reading the token back from the ring would wait for its stores.
//
// A row is [q of H heads | k of G heads | v of G heads], each K long. `next` is the ring to prefetch.
INLINE void attend_head(const row_t* row, int g, const Layer& layer, const Token& t, Ring ring, Ring next, row_t* out) {
  const int place = int(t.offset % layer.window), held = t.offset + 1 < layer.window ? int(t.offset + 1) : layer.window;
  float q[SHARE][WIDTH], k[WIDTH], v[WIDTH], own[SHARE], slopes[SHARE], scale[SHARE], mixed[SHARE][WIDTH];
  alignas(64) float scores[SHARE][PLACES_MAX];
  rotate(row + (layer.heads + g) * HEAD_DIM, t, 1, k);
  widen_all(row + (layer.heads + layer.kv_heads + g) * HEAD_DIM, v);
  round_all(k);
  round_all(v);
  // log2(e) makes the softmax a matter of powers of two.
  for (int h = 0; h < SHARE; h++) rotate(row + (g * SHARE + h) * HEAD_DIM, t, LOG2E / sqrtf(HEAD_DIM), q[h]);
  tiled<TILE>(padded(held) / LANES, [&](auto n, int at) __attribute__((always_inline)) {
    score<n(), SHARE>(ring.keys, next.keys, at, ring.places / LANES, q, scores);
  });
  for (int h = 0; h < SHARE; h++) {
    vec s = {};
    for (int i = 0; i < WIDTH; i += LANES) s += *(vec*)&q[h][i] * *(vec*)&k[i];
    scores[h][place] = sum(s);
    slopes[h] = layer.slopes ? layer.slopes[g * SHARE + h] * LOG2E : 0;
  }
  softmax(scores, held, t.time_gaps, slopes, scale);
  for (int h = 0; h < SHARE; h++) {
    own[h] = scores[h][place];
    scores[h][place] = 0;
    for (int i = 0; i < WIDTH; i++) mixed[h][i] = own[h] * v[i];
  }
  tiled<TILE>(WIDTH / LANES, [&](auto n, int at) __attribute__((always_inline)) {
    mix<n(), SHARE>(ring.values, next.values, at, (held + 1) / 2, scores, mixed);
  });
  for (int h = 0; h < SHARE; h++)
    for (int i = 0; i < HEAD_DIM; i++) put(&out[(g * SHARE + h) * HEAD_DIM + i], mixed[h][i] * scale[h]);
  ring.write(place, k, v);
}

// Write a token into the ring without an output.
INLINE void write_only(const row_t* row, int g, const Layer& layer, const Token& t, Ring ring) {
  float k[WIDTH], v[WIDTH];
  rotate(row + (layer.heads + g) * HEAD_DIM, t, 1, k);
  widen_all(row + (layer.heads + layer.kv_heads + g) * HEAD_DIM, v);
  ring.write(int(t.offset % layer.window), k, v);
}
