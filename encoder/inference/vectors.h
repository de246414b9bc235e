// Vectors of floats, bfloat16, and the elementary functions that the kernel needs.
//
// Only vector extensions of GCC and Clang are used, no intrinsics. A `vec` holds LANES floats. The build defines ROW and
// CELL, the types of what products read and write and of cached keys and values: float or bf16. Arithmetic is float.
#pragma once
#include <cstdint>
#include <cstring>

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
// Keep a vector in a register. GCC would load it again for each use, and loads are the bottleneck.
#if defined(__x86_64__)
#define KEEP(v) __asm__("" : "+v"(v))
#elif defined(__aarch64__)
#define KEEP(v) __asm__("" : "+w"(v))
#else
#define KEEP(v)
#endif
#define INLINE static inline __attribute__((always_inline))

// A bfloat16 is the upper half of a float. It widens by a shift, and rounds to nearest, ties to even.
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

// The next multiple of LANES.
constexpr int padded(int n) { return (n + LANES - 1) / LANES * LANES; }

// Reduce the N floats at `v` to one by halves.
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

// 2^x. Splits x into a whole number and a fraction f in [-1/2, 1/2]. 2^f is a polynomial of degree 5 with the least
// maximal relative error, exact at 0. The whole number is added to the float's exponent bits. x below -126 counts as
// -126; a caller whose x can exceed 126 must limit it. NaN stays NaN: the comparison in Max is false, so x is taken.
//
// Adding and subtracting 12582912 = 1.5 * 2^23 rounds to a whole number: floats of that size have no fraction bits.
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

// ln x for normal x >= 1; error 2e-7. x = 2^e m with m in [sqrt(1/2), sqrt(2)]; 0x3f3504f3 is the bits of sqrt(1/2).
// ln m = 2 artanh(s) with s = (m - 1) / (m + 1), by its series in s^2.
INLINE vec logv(vec x) {
  ivec e = ((ivec)x - 0x3f3504f3) >> 23;
  vec m = (vec)((ivec)x - (e << 23)), s = (m - 1.f) / (m + 1.f), z = s * s, p = vec{} + 1 / 9.f;
  p = p * z + 1 / 7.f;
  p = p * z + 1 / 5.f;
  p = p * z + 1 / 3.f;
  return __builtin_convertvector(e, vec) * LN2 + 2.f * s * (1.f + z * p);
}

// sin(2 pi x); error 1e-7, plus that of x. First x is reduced to [-1/2, 1/2]. Then half turns are reflected into
// [-1/4, 1/4], because sin(pi - a) = sin a: `half` is 1/2 with the sign of x. There the Taylor series is accurate.
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
