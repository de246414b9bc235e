// The operations of a forward pass between its matrix products, as functions that native.py calls. kernel.py is the
// contract, and reference.py computes the same in plain torch.
//
// The build fixes what the compiler should know: HEAD_DIM (K), SHARE (H / G), WINDOW_MAX, ROW and CELL; see vectors.h and
// attention.h, which also has the map of the KV cache. Arithmetic is float, and double where times and positions are
// reduced modulo a period.
//
// Shapes: H query heads, G key/value heads, K head size, W window, P periods.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "vectors.h"

// cos(2 pi t / p + phase) for `count` periods p, followed by the sines of the same angles.
// t is a whole number and stays exact up to the remainder by whole turns, so only the fraction of a turn is rounded, once.
struct Waves {
  const double* periods;  // [P]
  const float* phases;    // [2, P]: of the cosines, then of the sines
  int count, whole, rest;
  double last_periods[LANES];  // the periods behind the last whole vector, filled up with ones
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
  // Fractions of a turn in [-1/2, 1/2]. Adding and subtracting 1.5 * 2^52 rounds a double to a whole number.
  static vec turns_of(double t, const double* periods) {
    typedef double dvec __attribute__((vector_size(LANES * 8), aligned(8), may_alias));
    const dvec p = *(const dvec*)periods, nearest = (t / p + 6755399441055744.) - 6755399441055744.;
    double beyond[LANES];
    for (int j = 0; j < LANES; j++) beyond[j] = __builtin_fma(-nearest[j], p[j], t);
    return __builtin_convertvector(*(const dvec*)beyond / p, vec);
  }
  // Side 0 is the cosine, which is the sine a quarter of a turn later.
  static vec at(vec turns, const float* phase, int side) {
    return sin_turns(turns + *(const vec*)phase * (0.5f / PI) + (side ? 0 : 0.25f));
  }
};

// Call f(c, i) for every whole vector i of a row, where c names one of CHAINS sums that do not wait for each other.
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

// Bytes of one layer of one slot, a multiple of 64.
int64_t block_bytes(int kv_heads, int window) {
  return (int64_t(kv_heads) * padded(window) * (HEAD_DIM + WIDTH) * sizeof(cell_t) + 63) / 64 * 64;
}

// Attention of one layer for `users` users. `rows` are [R, (H + 2 G) K], `out` is [rows with output, H K].
// `blocks` is the layer's block in slot 0. User s owns rows starts[s] to starts[s + 1]; the first silent[s] of them only
// write keys and values. The user's first row is token tokens[s] of the plan; its first token of all is firsts[s].
//
//   tokens of user s   firsts[s] ........ tokens[s] ............................ firsts[s + 1]
//   rows of this layer                    starts[s] ............................ starts[s + 1]
//                                         |<- silent[s] ->|<- rows with output ->|
//
// `offsets` [T], `rope` [T, K] and `time_gaps` [T, padded window] (or null) are by token.
void attend(const row_t* rows, row_t* out, char* blocks, int64_t slot_bytes, int heads, int kv_heads, int window,
            const float* slopes, int64_t users, const int64_t* slots, const int64_t* starts, const int64_t* tokens,
            const int64_t* silent, const int64_t* firsts, const int64_t* offsets, const float* rope,
            const float* time_gaps) {
  const Layer layer{heads, kv_heads, window, slopes};
  for (int64_t s = 0; s < users; s++) {
    char* block = blocks + slots[s] * slot_bytes;
    char* next = s + 1 < users ? blocks + slots[s + 1] * slot_bytes : block;
    if (offsets[firsts[s]] == 0)
      for (int g = 0; g < kv_heads; g++) Ring(block, g, window).zero_values();
    for (int64_t r = starts[s]; r < starts[s + 1]; r++) {
      const int64_t i = tokens[s] + r - starts[s];
      const row_t* row = rows + r * (heads + 2 * kv_heads) * HEAD_DIM;
      const float* cos = rope + i * HEAD_DIM;
      const Token t{offsets[i], cos, cos + HALF, time_gaps ? time_gaps + i * padded(window) : nullptr};
      if (r < starts[s] + silent[s]) {
        for (int g = 0; g < kv_heads; g++) write_only(row, g, layer, t, Ring(block, g, window));
        continue;
      }
      for (int g = 0; g < kv_heads; g++) {
        const Ring then = g + 1 < kv_heads ? Ring(block, g + 1, window) : Ring(next, 0, window);
        attend_head(row, g, layer, t, Ring(block, g, window), then, out);
      }
      out += heads * HEAD_DIM;
      next = block;  // the next user's ring is prefetched once; this user's own is in the cache by now
    }
  }
}

constexpr int AHEAD = 8;  // how many users ahead event times are prefetched

// Write the tokens' event times into rings of `widest` places per slot. For every token, and for each window
// windows[n] of n < kinds, write the time gaps ln(1 + minutes) from the token back to each place of a ring of that
// window to time_gaps[n] [T, padded window].
//
// Place w of a ring of W, seen from the token in place `here`, is `behind` tokens old:
//
//   place w     0     1    here    3     4        (W = 5, here = 2)
//   behind      2     1     0      4     3
//
// The times are kept once, in the widest ring, so narrower windows look them up by offset.
void time_gaps(int64_t* times, int widest, const int64_t* slots, const int64_t* starts, int64_t users,
               const int64_t* offsets, const int64_t* token_ms, int kinds, const int* windows, float** time_gaps) {
  for (int64_t s = 0; s < users; s++) {
    int64_t* ring = times + slots[s] * widest;
    if (s + AHEAD < users)
      for (int w = 0; w < widest; w += 8) __builtin_prefetch(&times[slots[s + AHEAD] * widest + w], 1);
    for (int64_t i = starts[s]; i < starts[s + 1]; i++) {
      const int64_t offset = offsets[i], now = token_ms[i];
      ring[offset % widest] = now;
      for (int n = 0; n < kinds; n++) {
        const int window = windows[n], here = int(offset % window);
        float* out = time_gaps[n] + i * padded(window);
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

// x += y (unless y is null), then out = LayerNorm(x), for `rows` rows of `dim`.
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

// For each time t, write Waves of `count` periods and then ln(1 + seconds) - origin: 2 P + 1 numbers.
// The rows of `out` are `stride` apart.
void encode_times(const int64_t* times_ms, const double* periods, const float* phases, int count, double origin,
                  row_t* out, int64_t stride, int64_t rows) {
  const Waves waves(periods, phases, count);
  for (int64_t r = 0; r < rows; r++, out += stride) {
    const double t = times_ms[r] > 0 ? double(times_ms[r]) : 0;
    waves.write(t, out);
    put(&out[2 * count], float(log1p(t / 1000) - origin));
  }
}

// For each position, write the cosines and then the sines of its rotary angles: [rows, K].
// `periods` [K / 2] state after how many positions each pair has turned once.
void rope(const int64_t* positions, const double* periods, float* out, int64_t rows) {
  const float phases[2 * HALF] = {};
  const Waves waves(periods, phases, HALF);
  for (int64_t r = 0; r < rows; r++) waves.write(double(positions[r]), &out[r * 2 * HALF]);
}

// out = x / |x| for `rows` rows of `dim`. A row with a NaN becomes NaN.
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

// The tanh form of GELU, written as x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3).
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
