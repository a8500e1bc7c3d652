// The seam between PyTorch and the kernels: operators of the namespace aapo_fast_native, over PyTorch's stable ABI.
//
// Nothing else in csrc/ knows PyTorch. Python's side of the seam is aapo_fast/ops/native.py, which loads this library
// and gives the operators their fake implementations; INTERFACE there and here must agree.
//
// All operators write into tensors that they are given, so that memory is PyTorch's business. `level` is a number of
// kernels.h. Matrices may have any row stride; vectors are contiguous.

#include "blocks.h"
#include "entries.h"
#include "operands.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

namespace aapo_fast {
namespace {

constexpr int64_t INTERFACE = 10;
constexpr int64_t GRAIN = 1 << 15; // logits below which a second thread costs more than it brings

// Calls work(begin, end) for parts of so many rows of a block, on PyTorch's threads.
struct Threads {
  const Block &block;

  template <class Work> void operator()(int64_t num_rows, const Work &work) const {
    torch::stable::parallel_for(0, num_rows, std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, block.vocab)), work);
  }
};

// --- operators: the sweeps -------------------------------------------------------------------------------------------

void statistics(const Tensor &products, const Tensor &targets, const Tensor &temperature, double scale,
                std::optional<double> softcap, const Tensor &partials, const std::optional<Tensor> &tiles,
                int64_t level) {
  const Kernels &k = kernels(level);
  const Block block = block_of(products, targets, temperature, scale, softcap);
  const Partials to = partials_of(partials, block);
  const Tiles kept = tiles.has_value() ? tiles_of(*tiles, block, block.num_rows) : Tiles{};
  Threads{block}(block.num_rows, [&](int64_t begin, int64_t end) { k.statistics(block, to, kept, begin, end); });
}

void gradient(const Tensor &products, const Tensor &targets, const Tensor &temperature, double scale,
              std::optional<double> softcap, const Tensor &row_max, const Tensor &total, const Tensor &entropy,
              const Tensor &on_logp, const std::optional<Tensor> &on_entropy,
              const std::optional<Tensor> &on_logsumexp, int64_t level) {
  const Kernels &k = kernels(level);
  const Block block = block_of(products, targets, temperature, scale, softcap);
  const Wanted w = wanted_of(row_max, total, entropy, on_logp, on_entropy, on_logsumexp, block);
  Threads{block}(block.num_rows, [&](int64_t begin, int64_t end) { k.gradient(block, w, begin, end); });
}

void both_sweeps(const Tensor &products, const Tensor &targets, const Tensor &temperature, double scale,
                 std::optional<double> softcap, const Tensor &on_logp, const Tensor &partials, int64_t level) {
  const Kernels &k = kernels(level);
  const Block block = block_of(products, targets, temperature, scale, softcap);
  const Partials to = partials_of(partials, block);
  const float *a = vector_of<float>(on_logp, block.num_rows, "on_logp");
  Threads{block}(block.num_rows, [&](int64_t begin, int64_t end) { k.both_sweeps(block, a, to, begin, end); });
}

// --- operators: sparse rows ------------------------------------------------------------------------------------------

// What is found of row r is the first starts[r + 1] - starts[r] of its places.
void to_starts(const Found &found, int64_t num_rows) {
  int64_t *starts = found.counts - 1;
  starts[0] = 0;
  std::partial_sum(starts, starts + num_rows + 1, starts);
}

// Entries of a panel, as probabilities, from what sweep 1 kept of it in `tiles`; and for each block of so many rows in
// `dense` whether it has more than `most_a_row` entries a row in the mean, and therefore none here.
void sample_entries(const Tensor &products, const Tensor &targets, const Tensor &temperature, double scale,
                    std::optional<double> softcap, const Tensor &row_max, const Tensor &total, const Tensor &live,
                    const Tensor &tiles, const Tensor &uniforms, double threshold, int64_t block_rows,
                    double most_a_row, const Tensor &found_column, const Tensor &found_p, const Tensor &starts,
                    const Tensor &dense, int64_t level) {
  const Kernels &k = kernels(level);
  const Block block = block_of(products, targets, temperature, scale, softcap);
  const int64_t n = block.num_rows;
  const Chances chances{vector_of<float>(row_max, n, "row_max"), vector_of<float>(total, n, "total"),
                        vector_of<bool>(live, n, "live")};
  std::vector<double> means(static_cast<size_t>(n));
  const Found found = found_of(found_column, found_p, starts, means.data(), n);
  sample_sparsely(k, block, chances, tiles_of(tiles, block, n), sample_of(uniforms, threshold, block),
                  choice_of(dense, block_rows, most_a_row, block), found, Threads{block});
  to_starts(found, n);
}

// Sweep 1 and the same at once, as blocks.h has it: `tiles` has room for one block.
void sparse_sweeps(const Tensor &products, const Tensor &targets, const Tensor &temperature, double scale,
                   std::optional<double> softcap, const Tensor &live, const Tensor &partials, const Tensor &tiles,
                   const Tensor &uniforms, double threshold, int64_t block_rows, double most_a_row,
                   const Tensor &found_column, const Tensor &found_p, const Tensor &starts, const Tensor &dense,
                   int64_t level) {
  const Kernels &k = kernels(level);
  const Block block = block_of(products, targets, temperature, scale, softcap);
  const int64_t n = block.num_rows;
  const Choice choice = choice_of(dense, block_rows, most_a_row, block);
  const Tiles kept = tiles_of(tiles, block, std::min(block_rows, n));
  std::vector<double> means(static_cast<size_t>(n));
  const Found found = found_of(found_column, found_p, starts, means.data(), n);
  sweep_sparsely(k, block, vector_of<bool>(live, n, "live"), partials_of(partials, block), kept,
                 sample_of(uniforms, threshold, block), choice, found, Threads{block});
  to_starts(found, n);
}

bool wants(const Wanted &wanted, int64_t row) { // NaN is something
  const auto some = [row](const float *wish) { return wish != nullptr && wish[row] != 0; };
  return some(wanted.on_logp) || some(wanted.on_entropy) || some(wanted.on_logsumexp);
}

// What was found, row by row, as d loss / d products, without the rows of which nothing is wanted; `count` becomes the
// number of these entries. There is room for all.
void pack_entries(const Tensor &products, const Tensor &targets, const Tensor &temperature, double scale,
                  std::optional<double> softcap, const Tensor &row_max, const Tensor &total, const Tensor &entropy,
                  const Tensor &on_logp, const std::optional<Tensor> &on_entropy,
                  const std::optional<Tensor> &on_logsumexp, const Tensor &found_column, const Tensor &found_p,
                  const Tensor &starts, const Tensor &row, const Tensor &column, const Tensor &value,
                  const Tensor &count, int64_t level) {
  const Kernels &k = kernels(level);
  const Block block = block_of(products, targets, temperature, scale, softcap);
  const Wanted w = wanted_of(row_max, total, entropy, on_logp, on_entropy, on_logsumexp, block);
  const int64_t n = block.num_rows, room = row.numel();
  const Found found = found_of(found_column, found_p, n);
  const int64_t *slots = vector_of<int64_t>(starts, n + 1, "starts");
  bool fits = slots[0] == 0 && slots[n] == room;
  for (int64_t r = 0; fits && r < n; ++r)
    fits = slots[r] <= slots[r + 1] && slots[r + 1] - slots[r] <= found.capacity;
  STD_TORCH_CHECK(fits, "aapo_fast_native: starts must ascend from 0 to the number of entries, and a row hold ",
                  found.capacity, " at most");
  std::vector<int64_t> places{0};
  for (int64_t r = 0; r < n; ++r) {
    const int64_t count_of_row = wants(w, r) ? slots[r + 1] - slots[r] : 0;
    STD_TORCH_CHECK(all_below(found.column + r * found.capacity, count_of_row, block.vocab),
                    "aapo_fast_native: an entry lies outside the ", block.vocab, " columns");
    places.push_back(places.back() + count_of_row);
  }
  const Packed packed{places.data(), vector_of<int32_t>(row, room, "row"), vector_of<int32_t>(column, room, "column"),
                      vector_of<float>(value, room, "value")};
  *vector_of<int64_t>(count, 1, "count") = places.back();
  Threads{block}(n, [&](int64_t begin, int64_t end) { k.pack(block, w, found, packed, begin, end); });
}

// --- operators: the sparse products ----------------------------------------------------------------------------------

void add_gathered(const Kernels &k, const Gather &g, int64_t num_segments) {
  const int64_t parts = g.starts[num_segments] * g.width < GRAIN ? 1 : torch::stable::get_num_threads();
  const auto cuts = even_cuts(g.starts, num_segments, parts);
  torch::stable::parallel_for(
      0, parts, 1, [&](int64_t begin, int64_t end) { k.add_gathered(g, cuts[size_t(begin)], cuts[size_t(end)]); });
}

struct Given {
  const int32_t *row, *column;
  const float *value;
  int64_t count;

  Given(const Tensor &row, const Tensor &column, const Tensor &value, int64_t num_rows, int64_t num_columns)
      : row(vector_of<int32_t>(row, value.numel(), "row")), column(vector_of<int32_t>(column, value.numel(), "column")),
        value(vector_of<float>(value, value.numel(), "value")), count(value.numel()) {
    STD_TORCH_CHECK(all_below(this->row, count, num_rows) && all_below(this->column, count, num_columns),
                    "aapo_fast_native: an entry lies outside the ", num_rows, " rows or ", num_columns, " columns");
  }
};

void add_times_weight(const Tensor &row, const Tensor &column, const Tensor &value, const Tensor &weight,
                      const Tensor &out, int64_t level) {
  const Kernels &k = kernels(level);
  Gather g = gather_of(weight, out);
  const int64_t num_rows = out.size(0);
  const Given given(row, column, value, num_rows, weight.size(0));
  STD_TORCH_CHECK(ascending(given.row, given.count), "aapo_fast_native: entries must come row by row");
  const auto starts = starts_of(given.row, given.count, num_rows);
  g.starts = starts.data();
  g.index = given.column;
  g.value = given.value;
  add_gathered(k, g, num_rows);
}

void add_transposed_times(const Tensor &row, const Tensor &column, const Tensor &value, const Tensor &hidden,
                          const Tensor &out, int64_t level) {
  const Kernels &k = kernels(level);
  Gather g = gather_of(hidden, out);
  const int64_t num_columns = out.size(0);
  const Given given(row, column, value, hidden.size(0), num_columns);
  const Segments by_column = sorted(given.column, given.row, given.value, given.count, num_columns);
  g.starts = by_column.starts.data();
  g.index = by_column.index.data();
  g.value = by_column.value.data();
  add_gathered(k, g, num_columns);
}

// --- operators: for tests and for doctor -----------------------------------------------------------------------------

// Of x <= 0.
void exp(const Tensor &x, const Tensor &out, int64_t level) {
  const Kernels &k = kernels(level);
  const float *from = vector_of<float>(x, x.numel(), "x");
  float *to = vector_of<float>(out, x.numel(), "out");
  torch::stable::parallel_for(0, x.numel(), GRAIN, [&](int64_t begin, int64_t end) { k.exp(from, to, begin, end); });
}

int64_t interface() { return INTERFACE; }

// "compiler; levels that run here, the best first".
std::string describe() {
#ifdef __clang__
  std::string said = "clang " __clang_version__ ";";
#else
  std::string said = "g++ " __VERSION__ ";";
#endif
  for (int64_t level = NUM_LEVELS - 1; level >= 0; --level)
    if (kernels_of(level) != nullptr)
      said += std::string(" ") + LEVEL_NAMES[level];
  return said;
}

} // namespace
} // namespace aapo_fast

// (C, V) products; vectors of C: targets in int64, temperature, statistics of whole rows, and d loss / d log-probability,
// entropy and log-sum-exp, absent where it is zero; partials (4, C): row_max, total, weighted, target. Live: whether
// anything can depend on the row.
#define AAPO_BLOCK "Tensor targets, Tensor temperature, float scale, float? softcap"
#define AAPO_WANTED "Tensor row_max, Tensor total, Tensor entropy, Tensor on_logp, Tensor? on_entropy, Tensor? on_logsumexp"
#define AAPO_FOUND "Tensor(d!) found_column, Tensor(e!) found_p, Tensor(f!) starts, Tensor(g!) dense"

STABLE_TORCH_LIBRARY(aapo_fast_native, m) {
  m.def("statistics(Tensor(a!) products, " AAPO_BLOCK ", Tensor(b!) partials, Tensor(c!)? tiles, int level) -> ()");
  m.def("gradient(Tensor(a!) products, " AAPO_BLOCK ", " AAPO_WANTED ", int level) -> ()");
  m.def("both_sweeps(Tensor(a!) products, " AAPO_BLOCK ", Tensor on_logp, Tensor(b!) partials, int level) -> ()");
  m.def("sample_entries(Tensor products, " AAPO_BLOCK ", Tensor row_max, Tensor total, Tensor live, Tensor tiles, "
        "Tensor uniforms, float threshold, int block_rows, float most_a_row, " AAPO_FOUND ", int level) -> ()");
  m.def("sparse_sweeps(Tensor(a!) products, " AAPO_BLOCK ", Tensor live, Tensor(b!) partials, Tensor(c!) tiles, "
        "Tensor uniforms, float threshold, int block_rows, float most_a_row, " AAPO_FOUND ", int level) -> ()");
  m.def("pack_entries(Tensor products, " AAPO_BLOCK ", " AAPO_WANTED ", Tensor found_column, Tensor found_p, "
        "Tensor starts, Tensor(a!) row, Tensor(b!) column, Tensor(c!) value, Tensor(d!) count, int level) -> ()");
  m.def("add_times_weight(Tensor row, Tensor column, Tensor value, Tensor weight, Tensor(a!) out, int level) -> ()");
  m.def(
      "add_transposed_times(Tensor row, Tensor column, Tensor value, Tensor hidden, Tensor(a!) out, int level) -> ()");
  m.def("exp(Tensor x, Tensor(a!) out, int level) -> ()");
  m.def("interface() -> int");
  m.def("describe() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(aapo_fast_native, CPU, m) {
  m.impl("statistics", TORCH_BOX(&aapo_fast::statistics));
  m.impl("gradient", TORCH_BOX(&aapo_fast::gradient));
  m.impl("both_sweeps", TORCH_BOX(&aapo_fast::both_sweeps));
  m.impl("sample_entries", TORCH_BOX(&aapo_fast::sample_entries));
  m.impl("sparse_sweeps", TORCH_BOX(&aapo_fast::sparse_sweeps));
  m.impl("pack_entries", TORCH_BOX(&aapo_fast::pack_entries));
  m.impl("add_times_weight", TORCH_BOX(&aapo_fast::add_times_weight));
  m.impl("add_transposed_times", TORCH_BOX(&aapo_fast::add_transposed_times));
  m.impl("exp", TORCH_BOX(&aapo_fast::exp));
}

STABLE_TORCH_LIBRARY_IMPL(aapo_fast_native, CompositeExplicitAutograd, m) {
  m.impl("interface", TORCH_BOX(&aapo_fast::interface));
  m.impl("describe", TORCH_BOX(&aapo_fast::describe));
}
