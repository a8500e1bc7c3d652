// exp, tanh and the way from raw products to logits.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace aapo_fast {
namespace {

// exp is 0 from here down. What is smaller than 1.3e-24 of the largest changes no sum of fp32 numbers; but divided by the
// tokens of a step it would be a subnormal number, of which the processor makes products a hundred times more slowly.
constexpr float EXP_LOWEST = -55.0f;

// exp(x) for x <= 0 (differences from a maximum, and the -2|y| of tanh) and what is left of x: below EXP_LOWEST it is cut,
// where exp is zero, so that x exp(x) is zero and not NaN. Within 2 units in the last place.
// Of NaN nothing is promised: its low bits may reach the exponent. Of x above 1 neither.
//
// x = n log 2 + r with |r| <= log(2) / 2; exp(r) = 1 + r + r^2 q(r), q fitted to 3e-9 of exp(r).
AAPO_INLINE Floats exp_and_cut(Floats &x) {
  constexpr float LOG2_E = 1.44269504f, LOG_2_HIGH = 0x1.62e4p-1f, LOG_2_LOW = 1.42860677e-6f;
  constexpr float ROUND = 12582912.0f; // what is added to 1.5 * 2^23 loses its fraction, and stands in its low bits
#if AAPO_WIDTH == 16 && defined(__AVX512F__)
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(EXP_LOWEST), _CMP_NLE_UQ);
#else
  const Bits kept = ~(Bits)(x <= EXP_LOWEST);
#endif
  x = larger(all(EXP_LOWEST), x);
  const Floats rounded = multiply_add(x, all(LOG2_E), all(ROUND)); // n, in those bits
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
#if AAPO_WIDTH == 16 && defined(__AVX512F__)
  return (Floats)_mm512_maskz_scalef_ps(kept, (__m512)y, (__m512)n);
#else
  return (Floats)(((Bits)y + ((Bits)rounded << 23)) & kept); // times 2^n, by its exponent
#endif
}

// exp(x) for x <= 0.
AAPO_INLINE Floats exp(Floats x) { return exp_and_cut(x); }

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
