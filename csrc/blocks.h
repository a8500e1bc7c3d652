// Blocks of rows that are sampled, or left to be dense where they would have too many entries. No PyTorch:
// over_rows(n, work) calls work(begin, end) for parts of n rows, on whatever threads there are.
#pragma once

#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace aapo_fast {

struct Looked {
  int64_t num_rows; // that were sampled
  bool sparse;      // whether their entries are to be kept
};

// Samples n rows by work(begin, end), and says whether they have at most `most` entries in the mean over the uniforms,
// which work leaves in `means`: a choice that looked at the uniforms would bias the sample. An eighth of the rows is
// sampled first, and the others only if it has less than 1.5 eighths of `most`: rows of which nothing is kept should not
// be walked to the end.
template <class Rows, class Work>
Looked look(int64_t n, const double *means, double most, const Rows &over_rows, const Work &work) {
  const int64_t first_rows = (n + 7) / 8;
  const auto mean_of = [&](int64_t from, int64_t to) {
    over_rows(to - from, [&](int64_t begin, int64_t end) { work(from + begin, from + end); });
    return std::accumulate(means + from, means + to, 0.0);
  };
  const double first = mean_of(0, first_rows);
  if (first * double(n) > 1.5 * most * double(first_rows))
    return {first_rows, false};
  return {n, first + mean_of(first_rows, n) <= most};
}

// Maximum and total of a whole row, as in statistics.finish.
inline void join_target(const Partials &from, int64_t row, float *row_max, float *total) {
  const double top = from.row_max[row], target = from.target[row], highest = std::max(top, target);
  row_max[row] = float(highest);
  total[row] = float(double(from.total[row]) * std::exp(top - highest) + std::exp(target - highest));
}

// Between sparse and dense: of each block of so many rows, 1 where it has more than `most_a_row` entries a row in the mean,
// and is to be dense, else 0.
struct Choice {
  int64_t block_rows;
  double most_a_row;
  int64_t *is_dense;
};

// Samples n rows a block at a time by work(begin, end), and leaves blocks that are to be dense without entries. Those of
// their rows that were not sampled are passed to rest(begin, end).
template <class Rows, class Work, class Rest>
void in_blocks(int64_t n, const Choice &choice, const Found &found, const Rows &over_rows, const Work &work,
               const Rest &rest) {
  for (int64_t start = 0; start < n; start += choice.block_rows) {
    const int64_t rows = std::min(choice.block_rows, n - start);
    const auto of_block = [&](int64_t begin, int64_t end) { work(start + begin, start + end); };
    const Looked looked = look(rows, found.means + start, choice.most_a_row * double(rows), over_rows, of_block);
    choice.is_dense[start / choice.block_rows] = !looked.sparse;
    if (looked.sparse)
      continue;
    const int64_t first = start + looked.num_rows;
    over_rows(rows - looked.num_rows, [&](int64_t begin, int64_t end) { rest(first + begin, first + end); });
    std::fill_n(found.counts + start, rows, 0);
  }
}

// Sweep 1 and the sample, of each row while it is in the second cache. `kept` has room for one block.
template <class Rows>
void sweep_sparsely(const Kernels &k, const Block &block, const bool *live, const Partials &partials, const Tiles &kept,
                    const Sample &sample, const Choice &choice, const Found &found, const Rows &over_rows) {
  const int64_t n = block.num_rows;
  std::vector<float> whole(static_cast<size_t>(2 * n));
  float *row_max = whole.data(), *total = row_max + n;
  const Chances chances{row_max, total, live};
  const auto sweep_and_sample = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Tiles own = kept.of(row % choice.block_rows);
      k.statistics(block, partials, own, row, row + 1);
      join_target(partials, row, row_max, total);
      k.sample(block, chances, own, sample, found, row, row + 1);
    }
  };
  const auto sweep = [&](int64_t begin, int64_t end) { k.statistics(block, partials, Tiles{}, begin, end); };
  in_blocks(n, choice, found, over_rows, sweep_and_sample, sweep);
}

// The sample of rows that were swept before, from the statistics of whole rows. `kept` has all of them.
template <class Rows>
void sample_sparsely(const Kernels &k, const Block &block, const Chances &chances, const Tiles &kept,
                     const Sample &sample, const Choice &choice, const Found &found, const Rows &over_rows) {
  const auto work = [&](int64_t begin, int64_t end) { k.sample(block, chances, kept, sample, found, begin, end); };
  in_blocks(block.num_rows, choice, found, over_rows, work, [](int64_t, int64_t) {});
}

} // namespace aapo_fast
