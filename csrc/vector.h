// Vectors as wide as a register of the level, in the vector extension of GCC and Clang: one source for every width.
//
// Everything here and in the headers that build on it has internal linkage. A function that two levels shared would be
// merged by the linker, and a machine without AVX-512 could meet AVX-512 code; for the same reason these headers use no
// template of the standard library.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifndef AAPO_WIDTH
#if defined(__AVX512F__)
#define AAPO_WIDTH 16
#elif defined(__AVX2__)
#define AAPO_WIDTH 8
#else
#define AAPO_WIDTH 4
#endif
#endif

#define AAPO_INLINE inline __attribute__((always_inline))

namespace aapo_fast {
namespace {

constexpr int64_t WIDTH = AAPO_WIDTH;

typedef float Floats __attribute__((vector_size(4 * AAPO_WIDTH)));
typedef uint32_t Bits __attribute__((vector_size(4 * AAPO_WIDTH)));
typedef uint16_t Shorts __attribute__((vector_size(2 * AAPO_WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * AAPO_WIDTH)));
typedef int64_t Longs __attribute__((vector_size(4 * AAPO_WIDTH)));
typedef uint64_t LongBits __attribute__((vector_size(4 * AAPO_WIDTH)));
typedef double Doubles __attribute__((vector_size(4 * AAPO_WIDTH)));
constexpr int64_t LONGS = AAPO_WIDTH / 2;
constexpr int64_t LINE = 16; // fp32 numbers of a cache line

AAPO_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// x - 0 is x, also for -0 and NaN, so this costs nothing but the broadcast.
AAPO_INLINE Floats all(float x) { return x - Floats{}; }

// --- memory, at any alignment ----------------------------------------------------------------------------------------

AAPO_INLINE Floats load(const float *p) {
  Floats v;
  memcpy(&v, p, sizeof v);
  return v;
}

AAPO_INLINE Longs all(int64_t x) { return x - Longs{}; }

AAPO_INLINE Longs load(const int64_t *p) {
  Longs v;
  memcpy(&v, p, sizeof v);
  return v;
}

AAPO_INLINE void store(int64_t *p, Longs v) { memcpy(p, &v, sizeof v); }

AAPO_INLINE void store(float *p, Floats v) { memcpy(p, &v, sizeof v); }

// The first n lanes, 0 < n <= WIDTH; zeros beyond.
AAPO_INLINE Floats load(const float *p, int64_t n) {
  if (n == WIDTH)
    return load(p);
  Floats v{};
  memcpy(&v, p, size_t(n) * 4);
  return v;
}

AAPO_INLINE void store(float *p, Floats v, int64_t n) {
  if (n == WIDTH)
    store(p, v);
  else
    memcpy(p, &v, size_t(n) * 4);
}

// --- arithmetic ------------------------------------------------------------------------------------------------------

// a * b + c, fused where the level has it. Nothing else is: the compiler is told not to contract (setup.py), because a
// logit that is rounded in sweep 1 and not in sweep 2 would cost peaked rows the digits of 1 - p.
AAPO_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if AAPO_WIDTH == 16 && defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif AAPO_WIDTH == 8 && defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// With a mask of all lanes intrinsics compile to the same instruction, without a warning of GCC's about its own header.
constexpr uint16_t EVERY = 0xffff;

// a > b ? a : b. Where one is NaN: b. So a running maximum passes NaN over, and a lower bound on the left keeps it.
AAPO_INLINE Floats larger(Floats a, Floats b) {
#if AAPO_WIDTH == 16 && defined(__AVX512F__)
  return (Floats)_mm512_maskz_max_ps(EVERY, (__m512)a, (__m512)b);
#elif AAPO_WIDTH == 8 && defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// Lanes from n on replaced.
AAPO_INLINE Floats first_lanes(Floats v, int64_t n, float beyond) {
  for (int64_t lane = n; lane < WIDTH; ++lane)
    v[lane] = beyond;
  return v;
}

template <int N> struct Lanes {
  typedef float type __attribute__((vector_size(4 * N)));
};

// Bit i for the i-th lane of a comparison, which is all ones or all zeros.
AAPO_INLINE uint32_t lanes_of(Bits holds) {
#if AAPO_WIDTH == 16 && defined(__AVX512DQ__)
  return uint32_t(_mm512_movepi32_mask((__m512i)holds));
#elif AAPO_WIDTH == 8 && defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps((__m256)holds));
#else
  uint32_t lanes = 0;
  for (int64_t lane = 0; lane < WIDTH; ++lane)
    lanes |= (holds[lane] & 1) << lane;
  return lanes;
#endif
}

AAPO_INLINE uint32_t lanes_of(LongBits holds) {
#if AAPO_WIDTH == 16 && defined(__AVX512DQ__)
  return uint32_t(_mm512_movepi64_mask((__m512i)holds));
#elif AAPO_WIDTH == 8 && defined(__AVX2__)
  return uint32_t(_mm256_movemask_pd((__m256d)holds));
#else
  uint32_t lanes = 0;
  for (int64_t lane = 0; lane < LONGS; ++lane)
    lanes |= uint32_t(holds[lane] & 1) << lane;
  return lanes;
#endif
}

// Lanes of two vectors, numbered on from `low` to `high`. GCC has Clang's builtin only since 12.
#ifdef __clang__
#define AAPO_SHUFFLE(low, high, Indices, ...) __builtin_shufflevector(low, high, __VA_ARGS__)
#else
#define AAPO_SHUFFLE(low, high, Indices, ...) __builtin_shuffle(low, high, Indices{__VA_ARGS__})
#endif

// Lane i: the sum of the first i + 1 lanes.
AAPO_INLINE Longs running_sum(Longs v) {
  const Longs none{};
#if AAPO_WIDTH == 16
  v += AAPO_SHUFFLE(none, v, Longs, 0, 8, 9, 10, 11, 12, 13, 14);
  v += AAPO_SHUFFLE(none, v, Longs, 0, 0, 8, 9, 10, 11, 12, 13);
  v += AAPO_SHUFFLE(none, v, Longs, 0, 0, 0, 0, 8, 9, 10, 11);
#elif AAPO_WIDTH == 8
  v += AAPO_SHUFFLE(none, v, Longs, 0, 4, 5, 6);
  v += AAPO_SHUFFLE(none, v, Longs, 0, 0, 4, 5);
#else
  v += AAPO_SHUFFLE(none, v, Longs, 0, 2);
#endif
  return v;
}

AAPO_INLINE Doubles all(double x) { return x - Doubles{}; }

// LONGS numbers from memory as double.
AAPO_INLINE Doubles load_doubles(const float *p) {
  typename Lanes<LONGS>::type v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Doubles);
}

AAPO_INLINE Longs to_longs(Doubles v) { return __builtin_convertvector(v, Longs); }

AAPO_INLINE Floats running_sum(Floats v) {
  const Floats none{};
#if AAPO_WIDTH == 16
  v += AAPO_SHUFFLE(none, v, Ints, 0, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30);
  v += AAPO_SHUFFLE(none, v, Ints, 0, 0, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29);
  v += AAPO_SHUFFLE(none, v, Ints, 0, 0, 0, 0, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27);
  v += AAPO_SHUFFLE(none, v, Ints, 0, 0, 0, 0, 0, 0, 0, 0, 16, 17, 18, 19, 20, 21, 22, 23);
#elif AAPO_WIDTH == 8
  v += AAPO_SHUFFLE(none, v, Ints, 0, 8, 9, 10, 11, 12, 13, 14);
  v += AAPO_SHUFFLE(none, v, Ints, 0, 0, 8, 9, 10, 11, 12, 13);
  v += AAPO_SHUFFLE(none, v, Ints, 0, 0, 0, 0, 8, 9, 10, 11);
#else
  v += AAPO_SHUFFLE(none, v, Ints, 0, 4, 5, 6);
  v += AAPO_SHUFFLE(none, v, Ints, 0, 0, 4, 5);
#endif
  return v;
}

// Of all lanes, by halves. Shuffled whole: GCC keeps a vector whose halves are copied out in memory, and with it the
// running sum that it came from.
template <class Combine> AAPO_INLINE float reduced(Floats v, const Combine &combine) {
#if AAPO_WIDTH == 16
  v = combine(v, AAPO_SHUFFLE(v, v, Ints, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = combine(v, AAPO_SHUFFLE(v, v, Ints, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3));
  v = combine(v, AAPO_SHUFFLE(v, v, Ints, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1));
  v = combine(v, AAPO_SHUFFLE(v, v, Ints, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0));
#elif AAPO_WIDTH == 8
  v = combine(v, AAPO_SHUFFLE(v, v, Ints, 4, 5, 6, 7, 0, 1, 2, 3));
  v = combine(v, AAPO_SHUFFLE(v, v, Ints, 2, 3, 4, 5, 6, 7, 0, 1));
  v = combine(v, AAPO_SHUFFLE(v, v, Ints, 1, 2, 3, 4, 5, 6, 7, 0));
#else
  v = combine(v, AAPO_SHUFFLE(v, v, Ints, 2, 3, 0, 1));
  v = combine(v, AAPO_SHUFFLE(v, v, Ints, 1, 2, 3, 0));
#endif
  return v[0];
}

// Of all lanes of each of four vectors, to as many numbers: together, in two fifths of the instructions.
template <class Combine> AAPO_INLINE void reduced_four(float *out, const Floats *v, const Combine &combine) {
#if AAPO_WIDTH == 16
  const auto pairs = [&](Floats a, Floats b) { // in each quarter: a, b, a, b
    return combine(AAPO_SHUFFLE(a, b, Ints, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29),
                   AAPO_SHUFFLE(a, b, Ints, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31));
  };
  const Floats a = pairs(v[0], v[1]), b = pairs(v[2], v[3]);
  Floats each = combine(AAPO_SHUFFLE(a, b, Ints, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
                        AAPO_SHUFFLE(a, b, Ints, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
  each = combine(each, AAPO_SHUFFLE(each, each, Ints, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  each = combine(each, AAPO_SHUFFLE(each, each, Ints, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3));
  memcpy(out, &each, 16);
#else
  for (int64_t k = 0; k < 4; ++k)
    out[k] = reduced(v[k], combine);
#endif
}

AAPO_INLINE Floats added(Floats a, Floats b) { return a + b; }

AAPO_INLINE float sum(Floats v) { return reduced(v, added); }

AAPO_INLINE float largest(Floats v) { return reduced(v, larger); }

} // namespace
} // namespace aapo_fast
