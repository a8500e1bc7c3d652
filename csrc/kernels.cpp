// The kernels of one level of instructions: compiled once for each, with its flags and its name as AAPO_LEVEL.
#include "gather.h"
#include "sample.h"

namespace aapo_fast {
namespace {

void statistics(const Block &block, const Partials &partials, const Tiles &tiles, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    statistics_of(block, row, RowTransform(block, row), partials, tiles.of(row));
}

void gradient(const Block &block, const Wanted &wanted, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    gradient_of(block, row, RowTransform(block, row), RowGradient(wanted, row));
}

void both_sweeps(const Block &block, const float *on_logp, const Partials &partials, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const RowTransform transform(block, row);
    const Sums rest = statistics_of(block, row, transform, partials, Tiles{});
    // The target joins, as in statistics.finish.
    const double target = partials.target[row], row_max = target > rest.row_max ? target : rest.row_max;
    const double total = rest.total * __builtin_exp(rest.row_max - row_max) + __builtin_exp(target - row_max);
    gradient_of(block, row, transform, RowGradient(on_logp[row], float(row_max), float(total)));
  }
}

void sample(const Block &block, const Chances &chances, const Tiles &tiles, const Sample &how, const Found &found,
            int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    sample_row(block, chances, tiles, how, found, row);
}

void pack(const Block &block, const Wanted &wanted, const Found &found, const Packed &packed, int64_t begin,
          int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    pack_row(block, wanted, found, packed, row);
}

void add_gathered(const Gather &gather, int64_t begin, int64_t end) {
  switch (gather.type) {
  case Type::FP32:
    return add_segments<Fp32>(gather, begin, end);
  case Type::BF16:
    return add_segments<Bf16>(gather, begin, end);
  case Type::FP16:
    return add_segments<Fp16>(gather, begin, end);
  }
}

void exp_of(const float *x, float *out, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += WIDTH) {
    const int64_t n = least(WIDTH, end - i);
    store(out + i, exp(load(x + i, n)), n);
  }
}

} // namespace

#define AAPO_JOIN(a, b) a##b
#define AAPO_NAME(level) AAPO_JOIN(kernels_, level)
extern const Kernels AAPO_NAME(AAPO_LEVEL);
const Kernels AAPO_NAME(AAPO_LEVEL) = {statistics, gradient, both_sweeps, sample, pack, add_gathered, exp_of};

} // namespace aapo_fast
