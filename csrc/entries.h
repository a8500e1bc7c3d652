// Entries in the order in which a product takes them, and shares of the work.
#pragma once

#include <cstdint>
#include <vector>

namespace aapo_fast {

// Entries of the segments (rows, or columns): those of s are [starts[s], starts[s + 1]).
struct Segments {
  std::vector<int64_t> starts;
  std::vector<int32_t> index; // of each entry, what it is multiplied with
  std::vector<float> value;
};

// Whether all numbers lie in [0, bound), and none is smaller than the one before it.
bool all_below(const int32_t *numbers, int64_t count, int64_t bound);
bool ascending(const int32_t *numbers, int64_t count);

// starts[s] of sorted or unsorted segment numbers in [0, num_segments).
std::vector<int64_t> starts_of(const int32_t *segment, int64_t count, int64_t num_segments);

// Entries sorted by segment, those of a segment in the order they came in.
Segments sorted(const int32_t *segment, const int32_t *index, const float *value, int64_t count, int64_t num_segments);

// Segments cut into parts of about the same number of entries; part k is [cuts[k], cuts[k + 1]).
std::vector<int64_t> even_cuts(const int64_t *starts, int64_t num_segments, int64_t num_parts);

} // namespace aapo_fast
