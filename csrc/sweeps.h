// The two sweeps over a row: statistics, and the dense gradient in place of the products.
#pragma once

#include "functions.h"

namespace aapo_fast {
namespace {

// A line of what comes so far after x[i], for each line that is read, into the second cache, which has room for more
// fetches under way than the first: a processor that fetches ahead by itself stops after 4 KiB, which is one panel of
// logits. Beyond the end of memory a fetch does nothing.
AAPO_INLINE void fetch_ahead(const float *x, int64_t i, int64_t distance) {
  if (i % LINE == 0)
    __builtin_prefetch(x + i + distance, 0, 2);
}

constexpr int64_t FOUR = 4; // vectors, and tiles, at a time: one after the other they would wait for each other
constexpr int64_t LOGITS_AHEAD = 2 * PANEL;
constexpr float LOWEST = -1e34f; // stands for minus infinity where differences are taken: finite times any count

// --- sweep 1 ---------------------------------------------------------------------------------------------------------

struct Sums {
  float row_max = LOWEST;
  double total = 0, weighted = 0; // sums of exp(z - row_max), and of that times (z - row_max)
};

// Logits of n columns of x to z, and -inf beyond up to four whole tiles. Returns the largest.
template <bool CAPPED> AAPO_INLINE float logits_to(float *z, const float *x, int64_t n, const RowTransform &transform) {
  Floats tops[FOUR];
  for (Floats &top : tops)
    top = all(LOWEST);
  int64_t i = 0;
  for (; i + FOUR * WIDTH <= n; i += FOUR * WIDTH)
    for (int64_t k = 0; k < FOUR; ++k) {
      const Floats v = transform.of<CAPPED>(load(x + i + k * WIDTH)).z;
      store(z + i + k * WIDTH, v);
      tops[k] = larger(v, tops[k]);
    }
  Floats top = larger(larger(tops[0], tops[1]), larger(tops[2], tops[3]));
  for (; i + WIDTH <= n; i += WIDTH) {
    const Floats v = transform.of<CAPPED>(load(x + i)).z;
    store(z + i, v);
    top = larger(v, top);
  }
  if (i < n) {
    const Floats v = first_lanes(transform.of<CAPPED>(load(x + i, n - i)).z, n - i, -__builtin_inff());
    store(z + i, v);
    top = larger(v, top);
    i += WIDTH;
  }
  for (; i % (FOUR * TILE) != 0; i += WIDTH)
    store(z + i, all(-__builtin_inff()));
  return largest(top);
}

// A panel is summed in fp32 from its own maximum; panels join in double. A total near one that took hundreds of
// roundings would cost a peaked row the last digits of its log-probability.
AAPO_INLINE void join(Sums &row, float top, double mass, double pull) {
  if (top > row.row_max) {
    const double gap = double(row.row_max) - top, factor = __builtin_exp(gap);
    row.weighted = factor * (row.weighted + gap * row.total);
    row.total *= factor;
    row.row_max = top;
  }
  const double gap = double(top) - row.row_max, factor = gap == 0 ? 1.0 : __builtin_exp(gap);
  row.total += factor * mass;
  row.weighted += factor * (pull + gap * mass);
}

// Sweep 1 over x; `tiles` are those of this row.
template <bool CAPPED, bool KEEP>
Sums sweep_1(const float *x, int64_t vocab, const RowTransform &transform, const Tiles &tiles) {
  alignas(64) float z[PANEL];
  Sums row;
  for (int64_t start = 0; start < vocab; start += PANEL) {
    const int64_t n = least(PANEL, vocab - start);
    const float top = logits_to<CAPPED>(z, x + start, n, transform);
    Floats pull{};
    double panel_mass = 0;
    for (int64_t first = 0; first < n; first += FOUR * TILE) {
      Floats mass[FOUR]{}, peak[FOUR]{};
      for (int64_t k = 0; k < FOUR; ++k)
        for (int64_t i = first + k * TILE; i < first + (k + 1) * TILE; i += WIDTH) {
          fetch_ahead(x + start, i, LOGITS_AHEAD);
          Floats shifted = load(z + i) - top;
          const Floats e = exp_and_cut(shifted);
          mass[k] += e;
          if constexpr (KEEP)
            peak[k] = larger(e, peak[k]);
          pull = multiply_add(e, shifted, pull);
        }
      float masses[FOUR], peaks[FOUR];
      reduced_four(masses, mass, added);
      for (const float summed : masses)
        panel_mass += summed;
      if constexpr (KEEP) {
        reduced_four(peaks, peak, larger);
        const int64_t tile = (start + first) / TILE, count = least(FOUR, (n - first + TILE - 1) / TILE);
        memcpy(tiles.mass + tile, masses, size_t(count) * 4);
        memcpy(tiles.peak + tile, peaks, size_t(count) * 4);
      }
    }
    if constexpr (KEEP)
      tiles.level[start / PANEL] = top;
    // A NaN whose low bits are set comes out of exp as a number, but never out of its product with the logit.
    const float pulled = sum(pull);
    join(row, top, pulled == pulled ? panel_mass : pulled, pulled);
  }
  return row;
}

AAPO_INLINE Sums statistics_of(const Block &block, int64_t row, const RowTransform &transform, const Partials &partials,
                               const Tiles &tiles) {
  const bool capped = block.softcap != 0, keep = tiles.mass != nullptr;
  float *x = block.products + row * block.stride;
  const int64_t target = block.targets[row];
  partials.target[row] = -__builtin_inff();
  if (target >= 0) {
    const Floats at_target = all(x[target]);
    partials.target[row] = (capped ? transform.of<true>(at_target) : transform.of<false>(at_target)).z[0];
    x[target] = LEFT_OUT;
  }
  const auto sweep = capped ? (keep ? sweep_1<true, true> : sweep_1<true, false>)
                            : (keep ? sweep_1<false, true> : sweep_1<false, false>);
  const Sums sums = sweep(x, block.vocab, transform, tiles);
  partials.row_max[row] = sums.row_max;
  partials.total[row] = float(sums.total);
  partials.weighted[row] = float(sums.weighted);
  return sums;
}

// --- sweep 2 ---------------------------------------------------------------------------------------------------------

// d loss / d z_v = -a p_v - b p_v (log p_v + H) + c p_v but at the target, with a, b, c the derivatives by
// log-probability, entropy and log-sum-exp.
struct RowGradient {
  float a = 0, b = 0, c = 0;
  float row_max, inverse; // p_v = exp(z_v - row_max) inverse
  float offset;           // log p_v + H = z_v - row_max + offset

  RowGradient(float on_logp, float row_max, float total) : a(on_logp), row_max(row_max), inverse(1.0f / total) {}

  RowGradient(const Wanted &wanted, int64_t row)
      : RowGradient(wanted.on_logp[row], wanted.row_max[row], wanted.total[row]) {
    b = wanted.on_entropy == nullptr ? 0 : wanted.on_entropy[row];
    c = wanted.on_logsumexp == nullptr ? 0 : wanted.on_logsumexp[row];
    offset = float(wanted.entropy[row] - __builtin_log(double(wanted.total[row])));
  }

  // Whether anything depends on the row; NaN does.
  bool live() const { return a != 0 || b != 0 || c != 0; }

  // d loss / d z_v over p_v.
  Floats factor(Floats shifted) const { return c - a - b * (shifted + offset); }
};

template <bool CAPPED, bool ENTROPY>
void sweep_2(float *x, int64_t vocab, const RowTransform &transform, const RowGradient &row) {
  const Floats on_every = all((row.c - row.a) * row.inverse), on_log = all(-row.b * row.inverse);
  const auto of = [&](Floats products) {
    const Logits logits = transform.of<CAPPED>(products);
    Floats shifted = logits.z - row.row_max;
    const Floats e = exp_and_cut(shifted);
    const Floats share = ENTROPY ? multiply_add(on_log, shifted + row.offset, on_every) : on_every;
    return e * share * logits.slope;
  };
  int64_t i = 0;
  for (; i + WIDTH <= vocab; i += WIDTH) {
    fetch_ahead(x, i, LOGITS_AHEAD);
    store(x + i, of(load(x + i)));
  }
  if (i < vocab)
    store(x + i, of(load(x + i, vocab - i)), vocab - i);
}

AAPO_INLINE void gradient_of(const Block &block, int64_t row, const RowTransform &transform,
                             const RowGradient &wanted) {
  float *x = block.products + row * block.stride;
  if (!wanted.live()) {
    memset(x, 0, size_t(block.vocab) * 4);
    return;
  }
  if (block.softcap != 0)
    (wanted.b != 0 ? sweep_2<true, true> : sweep_2<true, false>)(x, block.vocab, transform, wanted);
  else
    (wanted.b != 0 ? sweep_2<false, true> : sweep_2<false, false>)(x, block.vocab, transform, wanted);
}

} // namespace
} // namespace aapo_fast
