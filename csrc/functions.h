// exp, tanh and the way from raw products to logits.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace aapo_fast {
namespace {

constexpr float EXP_LOWEST = -104.0f; // exp is 0 from here down: below half the smallest subnormal number

// exp(x) for x in [EXP_LOWEST, 89], within 2 units in the last place, subnormal and infinite results included.
//
// x = n log 2 + r with |r| <= log(2) / 2; exp(r) = 1 + r + r^2 q(r), q fitted to 3e-9 of exp(r).
AAPO_INLINE Floats exp_within(Floats x) {
  constexpr float LOG2_E = 1.44269504f, LOG_2_HIGH = 0x1.62e4p-1f, LOG_2_LOW = 1.42860677e-6f;
  constexpr float ROUND = 12582912.0f; // 1.5 * 2^23: what is added to it loses its fraction, and stands in its low bits
  const Floats rounded = multiply_add(x, all(LOG2_E), all(ROUND));
  const Floats n = rounded - ROUND;
  // LOG_2_HIGH has 15 bits, so its product with n is exact without a fused multiply-add too.
  Floats r = multiply_add(n, all(-LOG_2_HIGH), x);
  r = multiply_add(n, all(-LOG_2_LOW), r);
  Floats q = all(0.00138145406f);
  q = multiply_add(q, r, all(0.00836874545f));
  q = multiply_add(q, r, all(0.041668389f));
  q = multiply_add(q, r, all(0.166665211f));
  q = multiply_add(q, r, all(0.49999994f));
  const Floats y = multiply_add(q, r * r, r) + 1.0f;
  // Times 2^n in two steps, n / 2 into the exponent and the rest by a multiplication that rounds once: one step could
  // not reach subnormal numbers or 2^128. The high bits of ROUND fall off at the left.
  const Bits whole = (Bits)rounded, half = whole >> 1;
  const Floats most = (Floats)((Bits)y + (half << 23));
  return most * (Floats)(((whole - half) << 23) + 0x3f800000u);
}

// exp(x) for any x; NaN stays.
AAPO_INLINE Floats exp(Floats x) { return exp_within(smaller(all(89.0f), larger(all(EXP_LOWEST), x))); }

// exp(x) for x <= 0 and what is left of x: where exp is zero it is cut, so that x exp(x) is zero and not NaN.
AAPO_INLINE Floats exp_and_cut(Floats &x) {
  x = larger(all(EXP_LOWEST), x);
  return exp_within(x);
}

constexpr float LEFT_OUT = -0x1.fffffcp127f; // a raw product whose logit is minus infinity, or as good as

struct Logits {
  Floats z, slope; // logit and d z / d x
};

// The transform of one row: z = outer tanh(inner x), or inner x.
struct RowTransform {
  float inner, outer;

  RowTransform(const Block &block, int64_t row) {
    const float temperature = block.temperature[row];
    inner = block.softcap != 0 ? block.scale / block.softcap : block.scale / temperature;
    outer = block.softcap / temperature;
  }

  template <bool CAPPED> AAPO_INLINE Logits of(Floats x) const {
    const Floats y = x * inner;
    if constexpr (!CAPPED)
      return {y, all(inner)};
    const Bits sign = (Bits)y & 0x80000000u;
    const Floats size = (Floats)((Bits)y ^ sign);
    const Floats e = exp(size * -2.0f), r = 1.0f / (1.0f + e);
    // (1 - e) / (1 + e) loses its digits near zero; there, a polynomial fitted on [0, 0.5] to 1.5e-8.
    const Floats s = size * size;
    Floats t = all(0.017241491f);
    t = multiply_add(t, s, all(-0.0530454926f));
    t = multiply_add(t, s, all(0.13325879f));
    t = multiply_add(t, s, all(-0.333331436f));
    const Floats near_zero = multiply_add(size * s, t, size);
    const Floats tanh = size < 0.5f ? near_zero : (1.0f - e) * r;
    const Floats z = (Floats)((Bits)tanh | sign) * outer;
    // 1 - tanh^2 is 4 e / (1 + e)^2, without the cancellation.
    return {x == LEFT_OUT ? all(-__builtin_inff()) : z, e * r * r * (4.0f * inner * outer)};
  }
};

} // namespace
} // namespace aapo_fast
