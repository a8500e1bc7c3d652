// The sparse products: out[s] += sum of value[e] * source[index[e]] over the entries of segment s.
//
// With segments by row and W as the source it is dX, by column and X as the source it is dW. One thread sums a segment,
// in the order of its entries: no races, and the same bits at every number of threads.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace aapo_fast {
namespace {

constexpr int64_t GROUP = 4; // entries added at a time: as many streams from memory, one visit of the sum

struct Fp32 {
  float bits;
  static AAPO_INLINE Floats load(const Fp32 *p) { return aapo_fast::load(&p->bits); }
};

AAPO_INLINE Bits load_shorts(const void *p) {
  Shorts v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Bits);
}

struct Bf16 {
  uint16_t bits;
  static AAPO_INLINE Floats load(const Bf16 *p) { return (Floats)(load_shorts(p) << 16); }
};

struct Fp16 {
  uint16_t bits;
  static AAPO_INLINE Floats load(const Fp16 *p) {
    const Bits half = load_shorts(p), sign = (half & 0x8000u) << 16, rest = (half & 0x7fffu) << 13;
    // The exponent is 112 too small: a multiplication puts it right, for subnormal numbers too; infinity and NaN keep
    // the highest exponent.
    const Bits finite = (Bits)((Floats)rest * 0x1p112f);
    return (Floats)((rest >= 0x0f800000u ? (rest | 0x7f800000u) : finite) | sign);
  }
};

// The first n < WIDTH numbers, zeros beyond.
template <class Number> AAPO_INLINE Floats load_some(const Number *p, int64_t n) {
  Number padded[WIDTH] = {};
  memcpy(padded, p, size_t(n) * sizeof(Number));
  return Number::load(padded);
}

// out += the sum of COUNT entries; `next` are the source rows that follow and `next_out` is the sum that does, to be
// fetched meanwhile.
template <class Number, int64_t COUNT>
AAPO_INLINE void add_group(float *out, int64_t width, const Number *const *source, const float *value,
                           const Number *const *next, const float *next_out) {
  int64_t i = 0;
  for (; i + LINE <= width; i += LINE) {
    for (int64_t k = 0; k < COUNT; ++k)
      __builtin_prefetch(next[k] + i);
    __builtin_prefetch(next_out + i);
    for (int64_t j = i; j < i + LINE; j += WIDTH) {
      Floats sum = aapo_fast::load(out + j);
      for (int64_t k = 0; k < COUNT; ++k)
        sum = multiply_add(all(value[k]), Number::load(source[k] + j), sum);
      store(out + j, sum);
    }
  }
  for (; i < width; i += WIDTH) {
    const int64_t n = least(WIDTH, width - i);
    Floats sum = aapo_fast::load(out + i, n);
    for (int64_t k = 0; k < COUNT; ++k)
      sum = multiply_add(all(value[k]), n == WIDTH ? Number::load(source[k] + i) : load_some(source[k] + i, n), sum);
    store(out + i, sum, n);
  }
}

template <class Number> void add_segments(const Gather &g, int64_t begin, int64_t end) {
  const Number *source = static_cast<const Number *>(g.source);
  const int64_t last = g.starts[end] - 1;
  for (int64_t segment = begin, following; segment < end; segment = following) {
    for (following = segment + 1; following < end && g.starts[following] == g.starts[following + 1];)
      ++following;
    float *out = g.out + segment * g.out_stride;
    const float *next_out = following < end ? g.out + following * g.out_stride : out;
    int64_t e = g.starts[segment];
    for (; e < g.starts[segment + 1];) {
      const bool full = e + GROUP <= g.starts[segment + 1];
      const int64_t count = full ? GROUP : 1;
      const Number *now[GROUP], *next[GROUP];
      for (int64_t k = 0; k < count; ++k) {
        now[k] = source + g.index[e + k] * g.source_stride;
        next[k] = source + g.index[least(e + count + k, last)] * g.source_stride;
      }
      if (full)
        add_group<Number, GROUP>(out, g.width, now, g.value + e, next, next_out);
      else
        add_group<Number, 1>(out, g.width, now, g.value + e, next, next_out);
      e += count;
    }
  }
}

} // namespace
} // namespace aapo_fast
