// What a step does between its matrix products: attention of new tokens over rings of cached keys and values, the
// residual sum with its LayerNorm, GELU, encodings of time, the logarithms of event-time distance, and length one. See
// kernel.py for the contract and twin.py for the same in plain torch.
//
// The build fixes HEAD_DIM (K, even), SHARE (query heads to a key/value head), WINDOW_MAX, and the types ROW (of what
// products read and write) and CELL (of what slabs hold): float or bf16. Arithmetic is float, double where times
// and positions are taken modulo a period. Only vector extensions of GCC and Clang, no intrinsics.
//
// A block holds one layer of one slot: for each key/value head first the keys, then the values.
//   keys   [K / 2][ring places][2]  two neighbours of a head side by side
//   values [ring places / 2][K][2]  two neighbours in time side by side
// so that both products run down the memory with one accumulator for each place or dimension, without horizontal sums,
// and a pair of bfloat16 becomes two floats in two operations. Float slabs keep the pair as two vectors in a row
// instead. Places and K are padded to whole vectors. The ring place of the token at offset o is o % window.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__)
constexpr int LANES = 16, ACCUMULATORS = 16;
#elif defined(__AVX__)
constexpr int LANES = 8, ACCUMULATORS = 8;
#else
constexpr int LANES = 4, ACCUMULATORS = 8;
#endif

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
// Keeps a vector in a register: GCC would rather load it again for each use, and loads are what is scarce.
#if defined(__x86_64__)
#define KEEP(v) __asm__("" : "+v"(v))
#elif defined(__aarch64__)
#define KEEP(v) __asm__("" : "+w"(v))
#else
#define KEEP(v)
#endif
#define INLINE static inline __attribute__((always_inline))

struct bf16 { uint16_t bits; };
typedef uint16_t hvec __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef ROW row_t;
typedef CELL cell_t;

INLINE float widen(float f) { return f; }
INLINE float widen(bf16 e) { uint32_t u = uint32_t(e.bits) << 16; float f; memcpy(&f, &u, 4); return f; }
INLINE void put(float* p, float f) { *p = f; }
INLINE void put(bf16* p, float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  p->bits = uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
INLINE vec load(const float* p) { return *(const vec*)p; }
INLINE vec load(const bf16* p) { return (vec)(__builtin_convertvector(*(const hvec*)p, uvec) << 16); }
INLINE void store(float* p, vec v) { *(vec*)p = v; }
INLINE void store(bf16* p, vec v) {
  uvec u = (uvec)v;
  *(hvec*)p = __builtin_convertvector((u + 0x7fff + ((u >> 16) & 1)) >> 16, hvec);
}

constexpr int padded(int n) { return (n + LANES - 1) / LANES * LANES; }
constexpr int HALF = HEAD_DIM / 2, WIDTH = padded(HEAD_DIM), PLACES_MAX = padded(WINDOW_MAX);

// The pair of vectors number i: element 2j is in `a`, 2j + 1 in `b`, for LANES values of j.
INLINE void load_pair(const float* p, int i, vec& a, vec& b) {
  a = ((const vec*)p)[2 * i];
  b = ((const vec*)p)[2 * i + 1];
}
INLINE void load_pair(const bf16* p, int i, vec& a, vec& b) {
  uvec u = ((const uvec*)p)[i];
  a = (vec)(u << 16);
  b = (vec)(u & 0xffff0000u);
}
// Where side (0 or 1) of pair j lies.
INLINE int64_t pair_index(const float*, int64_t j, int side) { return j / LANES * 2 * LANES + side * LANES + j % LANES; }
INLINE int64_t pair_index(const bf16*, int64_t j, int side) { return 2 * j + side; }
INLINE void prefetch_pair(const cell_t* p, int i) {
  constexpr int bytes = 2 * LANES * sizeof(cell_t);
  for (int at = 0; at < bytes; at += 64) __builtin_prefetch((const char*)p + int64_t(i) * bytes + at, 0, 0);
}

// N pairs of vectors from number `at`, and the same of the next ring on its way to the cache.
template <int N> INLINE void load_pairs(const cell_t* p, const cell_t* next, int at, vec* a, vec* b) {
  for (int n = 0; n < N; n++) {
    load_pair(p, at + n, a[n], b[n]);
    prefetch_pair(next, at + n);
    KEEP(a[n]);
    KEEP(b[n]);
  }
}

template <int N, class Op> INLINE float fold(const float* v, Op op) {
  if constexpr (N == 1) return v[0];
  else {
    typedef float half __attribute__((vector_size(N * 2), aligned(4), may_alias));
    half r = op(*(const half*)v, *(const half*)(v + N / 2));
    return fold<N / 2>((const float*)&r, op);
  }
}
struct Add { template <class V> V operator()(V a, V b) const { return a + b; } };
struct Max { template <class V> V operator()(V a, V b) const { return a > b ? a : b; } };
struct Min { template <class V> V operator()(V a, V b) const { return a < b ? a : b; } };
INLINE float sum(vec v) { return fold<LANES>((const float*)&v, Add()); }
INLINE float largest(vec v) { return fold<LANES>((const float*)&v, Max()); }

// 2^x by rounding to an integer power and a polynomial on [-1/2, 1/2] (degree 5, least greatest relative error, exact
// at 0); x at least -126 and, where it can be larger, cut to 126 by the caller. NaN stays NaN.
INLINE vec exp2v(vec x) {
  x = Max()(vec{} - 126.f, x);
  vec whole = (x + 12582912.f) - 12582912.f, f = x - whole, p = vec{} + 1.3264727e-3f;
  p = p * f + 9.6715130e-3f;
  p = p * f + 5.5507336e-2f;
  p = p * f + 2.4022242e-1f;
  p = p * f + 6.9314700e-1f;
  p = p * f + 1.f;
  return (vec)((ivec)p + (__builtin_convertvector(whole, ivec) << 23));
}
constexpr float LOG2E = 1.44269504f, LN2 = 0.69314718f, PI = 3.14159265f;

// ln x for normal x >= 1: exponent, and artanh's series of the mantissa m in [sqrt(1/2), sqrt(2)]; error 2e-7.
INLINE vec logv(vec x) {
  ivec e = ((ivec)x - 0x3f3504f3) >> 23;
  vec m = (vec)((ivec)x - (e << 23)), s = (m - 1.f) / (m + 1.f), z = s * s, p = vec{} + 1 / 9.f;
  p = p * z + 1 / 7.f;
  p = p * z + 1 / 5.f;
  p = p * z + 1 / 3.f;
  return __builtin_convertvector(e, vec) * LN2 + 2.f * s * (1.f + z * p);
}

// sin(2 pi x): x brought to a quarter turn around 0, where sin is its Taylor series; error 1e-7, and that of x.
INLINE vec sin_turns(vec x) {
  x -= (x + 12582912.f) - 12582912.f;
  const vec half = (vec)(((uvec)x & 0x80000000u) | 0x3f000000u), size = (vec)((uvec)x & 0x7fffffffu);
  x = size > 0.25f ? half - x : x;
  const vec z = x * x;
  vec p = vec{} - 15.0946426f;
  p = p * z + 42.0586939f;
  p = p * z - 76.7058598f;
  p = p * z + 81.6052493f;
  p = p * z - 41.3417022f;
  p = p * z + 6.28318531f;
  return p * x;
}

// cos(2 pi t / p + phase) for `count` periods p, and the same sines behind them. t, a whole number, is exact until it
// is a fraction of a turn: what goes beyond whole turns is rounded once.
struct Waves {
  const double* periods;
  const float* phases;  // [2, count]
  int count, whole, rest;
  double last_periods[LANES];  // what is no whole vector, filled up
  float last_phases[2][LANES] = {};
  Waves(const double* periods, const float* phases, int count)
      : periods(periods), phases(phases), count(count), whole(count / LANES * LANES), rest(count - whole) {
    for (int j = 0; j < LANES; j++) last_periods[j] = j < rest ? periods[whole + j] : 1;
    for (int side = 0; side < 2; side++) memcpy(last_phases[side], phases + side * count + whole, rest * sizeof(float));
  }
  template <class T> void write(double t, T* out) const {
    for (int j = 0; j < whole; j += LANES) {
      const vec turns = turns_of(t, &periods[j]);
      for (int side = 0; side < 2; side++) store(&out[side * count + j], at(turns, &phases[side * count + j], side));
    }
    if (rest) {
      const vec turns = turns_of(t, last_periods);
      for (int side = 0; side < 2; side++) {
        T some[LANES];
        store(some, at(turns, last_phases[side], side));
        memcpy(&out[side * count + whole], some, rest * sizeof(T));
      }
    }
  }
  static vec turns_of(double t, const double* periods) {
    typedef double dvec __attribute__((vector_size(LANES * 8), aligned(8), may_alias));
    const dvec p = *(const dvec*)periods, nearest = (t / p + 6755399441055744.) - 6755399441055744.;
    double beyond[LANES];
    for (int j = 0; j < LANES; j++) beyond[j] = __builtin_fma(-nearest[j], p[j], t);
    return __builtin_convertvector(*(const dvec*)beyond / p, vec);
  }
  static vec at(vec turns, const float* phase, int side) {
    return sin_turns(turns + *(const vec*)phase * (0.5f / PI) + (side ? 0 : 0.25f));
  }
};

// scores[h][place] for N vectors of places from `at`, all SHARE heads; pairs of key rows are `stride` pairs apart.
template <int N, int H> INLINE void score(const cell_t* keys, const cell_t* next, int at, int stride,
                                          const float (*q)[WIDTH], float (*scores)[PLACES_MAX]) {
  vec acc[N][H] = {};
  for (int i = 0; i < HALF; i++) {
    vec a[N], b[N];
    load_pairs<N>(keys, next, i * stride + at, a, b);
    for (int h = 0; h < H; h++)
      for (int n = 0; n < N; n++) acc[n][h] = acc[n][h] + q[h][2 * i] * a[n] + q[h][2 * i + 1] * b[n];
  }
  for (int n = 0; n < N; n++)
    for (int h = 0; h < H; h++) *(vec*)&scores[h][(at + n) * LANES] = acc[n][h];
}

// out[h][d] += weights[h][place] * values[place][d] for N vectors of dimensions from `at`; `pairs` pairs of places.
template <int N, int H> INLINE void mix(const cell_t* values, const cell_t* next, int at, int pairs,
                                        const float (*weights)[PLACES_MAX], float (*out)[WIDTH]) {
  constexpr int stride = WIDTH / LANES;
  vec acc[N][H];
  for (int n = 0; n < N; n++)
    for (int h = 0; h < H; h++) acc[n][h] = *(vec*)&out[h][(at + n) * LANES];
  for (int w = 0; w < pairs; w++) {
    vec a[N], b[N];
    load_pairs<N>(values, next, w * stride + at, a, b);
    for (int h = 0; h < H; h++)
      for (int n = 0; n < N; n++) acc[n][h] = acc[n][h] + weights[h][2 * w] * a[n] + weights[h][2 * w + 1] * b[n];
  }
  for (int n = 0; n < N; n++)
    for (int h = 0; h < H; h++) *(vec*)&out[h][(at + n) * LANES] = acc[n][h];
}

// Run f<N>(at) over `total` vectors, as many at once as fit the registers: fewer chains of sums than the processor can
// keep in flight would leave it waiting.
template <int N, class F> INLINE void tiled(int total, F f, int at = 0) {
  for (; at + N <= total; at += N) f(std::integral_constant<int, N>(), at);
  if constexpr (N > 1) tiled<N / 2>(total, f, at);
}
constexpr int TILE = ACCUMULATORS / SHARE > 1 ? ACCUMULATORS / SHARE : 1;

// Keys and values of one key/value head in a block.
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
  void zero_values() const { memset(values, 0, sizeof(cell_t) * places * WIDTH); }
};

// What every token of a layer shares.
struct Layer {
  int heads, kv_heads, window;
  const float* slopes;  // [heads], null without a bias
};
// What one token brings along.
struct Token {
  int64_t offset;
  const float *cos, *sin, *lags;  // [K / 2], [K / 2], [padded window]
};

INLINE void rotate(const row_t* x, const Token& t, float scale, float* out) {
  for (int i = 0; i < HALF; i++) {
    float a = widen(x[i]), b = widen(x[i + HALF]);
    out[i] = (a * t.cos[i] - b * t.sin[i]) * scale;
    out[i + HALF] = (b * t.cos[i] + a * t.sin[i]) * scale;
  }
  for (int i = HEAD_DIM; i < WIDTH; i++) out[i] = 0;
}

// To what a slab will hold: a token sees itself as later tokens will see it.
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

// Scores (in powers of two) of all heads to unnormalised weights of `held` places (0 behind them, up to whole vectors),
// and 1 / their sums. Head by head within each loop, so that one head's sums do not wait for another's.
INLINE void soften(float (*scores)[PLACES_MAX], int held, const float* lags, const float* slopes, float* scale) {
  const int vectors = padded(held) / LANES;
  vec most[SHARE], total[SHARE] = {};
  float top[SHARE];
  for (int h = 0; h < SHARE; h++) most[h] = vec{} - 1e30f;
  for (int h = 0; h < SHARE; h++)
    for (int w = held; w < vectors * LANES; w++) scores[h][w] = -1e30f;
  for (int n = 0; n < vectors; n++)
    for (int h = 0; h < SHARE; h++) {
      vec& s = *(vec*)&scores[h][n * LANES];
      if (lags) s -= slopes[h] * *(const vec*)&lags[n * LANES];
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
  for (int h = 0; h < SHARE; h++)
    for (int w = held; w < vectors * LANES; w++) scores[h][w] = 0;
}

// One token and one key/value head: attend to the ring and to itself, then enter the ring. The token takes part from
// registers, so that nothing waits for its stores; its place in the ring counts for nothing until then.
INLINE void attend_head(const row_t* row, int g, const Layer& layer, const Token& t, Ring ring, Ring next, row_t* out) {
  const int place = int(t.offset % layer.window), held = t.offset + 1 < layer.window ? int(t.offset + 1) : layer.window;
  float q[SHARE][WIDTH], k[WIDTH], v[WIDTH], own[SHARE], slopes[SHARE], scale[SHARE], mixed[SHARE][WIDTH];
  alignas(64) float scores[SHARE][PLACES_MAX];
  rotate(row + (layer.heads + g) * HEAD_DIM, t, 1, k);
  widen_all(row + (layer.heads + layer.kv_heads + g) * HEAD_DIM, v);
  round_all(k);
  round_all(v);
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
  soften(scores, held, t.lags, slopes, scale);
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

INLINE void write_only(const row_t* row, int g, const Layer& layer, const Token& t, Ring ring) {
  float k[WIDTH], v[WIDTH];
  rotate(row + (layer.heads + g) * HEAD_DIM, t, 1, k);
  widen_all(row + (layer.heads + layer.kv_heads + g) * HEAD_DIM, v);
  ring.write(int(t.offset % layer.window), k, v);
}

// f(c, i) for every whole vector i of a row, in CHAINS sums that do not wait for each other.
constexpr int CHAINS = 4;
template <class F> INLINE void in_chains(int whole, F f) {
  int i = 0;
  for (; i + CHAINS * LANES <= whole; i += CHAINS * LANES)
    for (int c = 0; c < CHAINS; c++) f(c, i + c * LANES);
  for (; i < whole; i += LANES) f(0, i);
}
INLINE float sum_chains(const vec* v) { return sum((v[0] + v[1]) + (v[2] + v[3])); }

extern "C" {

int lanes() { return LANES; }

// Bytes of one layer of one slot.
int64_t block_bytes(int kv_heads, int window) {
  return (int64_t(kv_heads) * padded(window) * (HEAD_DIM + WIDTH) * sizeof(cell_t) + 63) / 64 * 64;
}

// Attention of one layer. `blocks` is its block in slot 0; user s of `users` owns rows starts[s] to starts[s + 1], of
// which the first silent[s] have no output; its first row is token tokens[s] of the plan, its first token firsts[s].
void attend(const row_t* rows, row_t* out, char* blocks, int64_t slot_bytes, int heads, int kv_heads, int window,
            const float* slopes, int64_t users, const int64_t* slots, const int64_t* starts, const int64_t* tokens,
            const int64_t* silent, const int64_t* firsts, const int64_t* offsets, const float* rotations,
            const float* lags) {
  const Layer layer{heads, kv_heads, window, slopes};
  for (int64_t s = 0; s < users; s++) {
    char* block = blocks + slots[s] * slot_bytes;
    char* next = s + 1 < users ? blocks + slots[s + 1] * slot_bytes : block;
    if (offsets[firsts[s]] == 0)
      for (int g = 0; g < kv_heads; g++) Ring(block, g, window).zero_values();
    for (int64_t r = starts[s]; r < starts[s + 1]; r++) {
      const int64_t i = tokens[s] + r - starts[s];
      const row_t* row = rows + r * (heads + 2 * kv_heads) * HEAD_DIM;
      const float* cos = rotations + i * HEAD_DIM;
      const Token t{offsets[i], cos, cos + HALF, lags ? lags + i * padded(window) : nullptr};
      if (r < starts[s] + silent[s]) {
        for (int g = 0; g < kv_heads; g++) write_only(row, g, layer, t, Ring(block, g, window));
        continue;
      }
      for (int g = 0; g < kv_heads; g++) {
        const Ring then = g + 1 < kv_heads ? Ring(block, g + 1, window) : Ring(next, 0, window);
        attend_head(row, g, layer, t, Ring(block, g, window), then, out);
      }
      out += heads * HEAD_DIM;
      next = block;
    }
  }
}

constexpr int AHEAD = 8;  // users whose event times are on their way to the cache

// Enter the tokens' event times into rings of `widest` places a slot, and write the logarithms ln(1 + minutes) from
// each token to the places of a ring of windows[n], n < kinds, to lags[n] [tokens, padded window].
void lags(int64_t* times, int widest, const int64_t* slots, const int64_t* starts, int64_t users,
          const int64_t* offsets, const int64_t* token_ms, int kinds, const int* windows, float** lags) {
  for (int64_t s = 0; s < users; s++) {
    int64_t* ring = times + slots[s] * widest;
    if (s + AHEAD < users)
      for (int w = 0; w < widest; w += 8) __builtin_prefetch(&times[slots[s + AHEAD] * widest + w], 1);
    for (int64_t i = starts[s]; i < starts[s + 1]; i++) {
      const int64_t offset = offsets[i], now = token_ms[i];
      ring[offset % widest] = now;
      for (int n = 0; n < kinds; n++) {
        const int window = windows[n], here = int(offset % window);
        float* out = lags[n] + i * padded(window);
        const int held = offset + 1 < window ? int(offset + 1) : window;
        for (int w = 0; w < held; w++) {
          const int behind = w <= here ? here - w : here - w + window;
          const int64_t apart = now - ring[window == widest ? w : (offset - behind) % widest];
          out[w] = apart > 0 ? float(apart) : 0;
        }
        for (int w = held; w < padded(window); w++) out[w] = 0;
        for (int w = 0; w < padded(window); w += LANES) *(vec*)&out[w] = logv(*(vec*)&out[w] / 60000.f + 1.f);
      }
    }
  }
}

// x += y (where y is given), then out = LayerNorm(x), for `rows` rows of `dim`.
void add_norm(float* x, const row_t* y, const float* weight, const float* bias, row_t* out, float eps, int64_t rows,
              int dim) {
  const int whole = dim / LANES * LANES;
  for (int64_t r = 0; r < rows; r++, x += dim, out += dim) {
    vec totals[CHAINS] = {}, squares[CHAINS] = {};
    float mean = 0, variance = 0;
    if (y) {
      in_chains(whole, [&](int c, int i) { totals[c] += *(vec*)&x[i] += load(&y[i]); });
      for (int i = whole; i < dim; i++) mean += x[i] += widen(y[i]);
      y += dim;
    } else {
      in_chains(whole, [&](int c, int i) { totals[c] += *(vec*)&x[i]; });
      for (int i = whole; i < dim; i++) mean += x[i];
    }
    mean = (mean + sum_chains(totals)) / dim;
    in_chains(whole, [&](int c, int i) { squares[c] += (*(vec*)&x[i] - mean) * (*(vec*)&x[i] - mean); });
    for (int i = whole; i < dim; i++) variance += (x[i] - mean) * (x[i] - mean);
    const float scale = 1 / sqrtf((variance + sum_chains(squares)) / dim + eps);
    for (int i = 0; i < whole; i += LANES)
      store(&out[i], (*(vec*)&x[i] - mean) * scale * *(const vec*)&weight[i] + *(const vec*)&bias[i]);
    for (int i = whole; i < dim; i++) put(&out[i], (x[i] - mean) * scale * weight[i] + bias[i]);
  }
}

// For each time t cos and sin of 2 pi t / p + phase for `count` periods p, and ln(1 + seconds) - origin, into rows of
// `out` that are `stride` apart; phases are those of the cosines, then those of the sines.
void encode_times(const int64_t* times_ms, const double* periods, const float* phases, int count, double origin,
                  row_t* out, int64_t stride, int64_t rows) {
  const Waves waves(periods, phases, count);
  for (int64_t r = 0; r < rows; r++, out += stride) {
    const double t = times_ms[r] > 0 ? double(times_ms[r]) : 0;
    waves.write(t, out);
    put(&out[2 * count], float(log1p(t / 1000) - origin));
  }
}

// For each position cos, then sin, of its rotary angles: [rows, K]; `periods` [K / 2] are positions to a turn.
void rotations(const int64_t* positions, const double* periods, float* out, int64_t rows) {
  const float phases[2 * HALF] = {};
  const Waves waves(periods, phases, HALF);
  for (int64_t r = 0; r < rows; r++) waves.write(double(positions[r]), &out[r * 2 * HALF]);
}

// out = x / |x| for `rows` rows of `dim`; a NaN spreads over its row.
void to_length_one(const row_t* x, float* out, int64_t rows, int dim) {
  const int whole = dim / LANES * LANES;
  for (int64_t r = 0; r < rows; r++, x += dim, out += dim) {
    vec squares[CHAINS] = {};
    float rest = 0;
    in_chains(whole, [&](int c, int i) { squares[c] += load(&x[i]) * load(&x[i]); });
    for (int i = whole; i < dim; i++) rest += widen(x[i]) * widen(x[i]);
    const float length = sqrtf(rest + sum_chains(squares)), scale = 1 / (length < 1e-12f ? 1e-12f : length);
    for (int i = 0; i < whole; i += LANES) *(vec*)&out[i] = load(&x[i]) * scale;
    for (int i = whole; i < dim; i++) out[i] = widen(x[i]) * scale;
  }
}

// x = x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), which is the tanh form of GELU.
void gelu(row_t* x, int64_t count) {
  constexpr float A = -2 * 0.79788456f * LOG2E, B = A * 0.044715f;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    vec v = load(&x[i]);
    store(&x[i], v / (1.f + exp2v(Min()(vec{} + 126.f, v * (A + B * v * v)))));
  }
  for (; i < count; i++) {
    float v = widen(x[i]);
    put(&x[i], v / (1 + exp2f(v * (A + B * v * v))));
  }
}

}  // extern "C"
