#include "entries.h"

#include <algorithm>

namespace aapo_fast {

bool all_below(const int32_t *numbers, int64_t count, int64_t bound) {
  uint32_t largest = 0; // without a way out of the loop, so that it is done in vectors
  for (int64_t i = 0; i < count; ++i)
    largest = std::max(largest, uint32_t(numbers[i])); // a negative number is 2^31 at least
  return count == 0 || int64_t(largest) < std::min(bound, int64_t(1) << 31);
}

bool ascending(const int32_t *numbers, int64_t count) { return std::is_sorted(numbers, numbers + count); }

std::vector<int64_t> starts_of(const int32_t *segment, int64_t count, int64_t num_segments) {
  std::vector<int64_t> starts(size_t(num_segments) + 1);
  for (int64_t e = 0; e < count; ++e)
    ++starts[size_t(segment[e]) + 1];
  for (int64_t s = 0; s < num_segments; ++s)
    starts[size_t(s) + 1] += starts[size_t(s)];
  return starts;
}

Segments sorted(const int32_t *segment, const int32_t *index, const float *value, int64_t count, int64_t num_segments) {
  Segments s{starts_of(segment, count, num_segments), std::vector<int32_t>(size_t(count)),
             std::vector<float>(size_t(count))};
  std::vector<int64_t> next(s.starts.begin(), s.starts.end() - 1);
  for (int64_t e = 0; e < count; ++e) {
    const size_t place = size_t(next[size_t(segment[e])]++);
    s.index[place] = index[e];
    s.value[place] = value[e];
  }
  return s;
}

std::vector<int64_t> even_cuts(const int64_t *starts, int64_t num_segments, int64_t num_parts) {
  std::vector<int64_t> cuts{0};
  for (int64_t part = 1; part < num_parts; ++part) {
    const int64_t entries = starts[num_segments] / num_parts * part;
    cuts.push_back(std::lower_bound(starts + cuts.back(), starts + num_segments, entries) - starts);
  }
  cuts.push_back(num_segments);
  return cuts;
}

} // namespace aapo_fast
