// What the operators are given, checked and as the kernels take it: a bad tensor is an error that names it.
#pragma once

#include "blocks.h"

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

namespace aapo_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Kernels &kernels(int64_t level) {
  const Kernels *found = kernels_of(level);
  STD_TORCH_CHECK(found != nullptr, "aapo_fast_native: this machine cannot run level ", level);
  return *found;
}

template <class T> constexpr ScalarType type_of();
template <> constexpr ScalarType type_of<bool>() { return ScalarType::Bool; }
template <> constexpr ScalarType type_of<float>() { return ScalarType::Float; }
template <> constexpr ScalarType type_of<double>() { return ScalarType::Double; }
template <> constexpr ScalarType type_of<int32_t>() { return ScalarType::Int; }
template <> constexpr ScalarType type_of<int64_t>() { return ScalarType::Long; }

void check_type(const Tensor &t, ScalarType type, const char *name) {
  STD_TORCH_CHECK(t.scalar_type() == type, "aapo_fast_native: ", name, " must be ", torch::headeronly::toString(type),
                  ", not ", torch::headeronly::toString(t.scalar_type()));
}

template <class T> T *vector_of(const Tensor &t, int64_t size, const char *name) {
  check_type(t, type_of<T>(), name);
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size && (size < 2 || t.stride(0) == 1), "aapo_fast_native: ", name,
                  " must be a contiguous vector of ", size, " numbers");
  return static_cast<T *>(t.mutable_data_ptr());
}

void check_matrix(const Tensor &t, int64_t columns, const char *name) {
  STD_TORCH_CHECK(t.dim() == 2 && (t.size(1) < 2 || t.stride(1) == 1), "aapo_fast_native: ", name,
                  " must be a matrix whose rows are contiguous");
  STD_TORCH_CHECK(columns < 0 || t.size(1) == columns, "aapo_fast_native: ", name, " must have ", columns,
                  " columns, not ", t.size(1));
}

Block block_of(const Tensor &products, const Tensor &targets, const Tensor &temperature, double scale,
               std::optional<double> softcap) {
  check_type(products, ScalarType::Float, "products");
  check_matrix(products, -1, "products");
  const int64_t num_rows = products.size(0), vocab = products.size(1);
  const int64_t *target = vector_of<int64_t>(targets, num_rows, "targets");
  STD_TORCH_CHECK(std::all_of(target, target + num_rows, [=](int64_t t) { return t < vocab; }),
                  "aapo_fast_native: a target is not below the number of columns, ", vocab);
  return {static_cast<float *>(products.mutable_data_ptr()),
          products.stride(0),
          num_rows,
          vocab,
          target,
          vector_of<float>(temperature, num_rows, "temperature"),
          float(scale),
          float(softcap.value_or(0))};
}

// (4, C), contiguous.
Partials partials_of(const Tensor &partials, const Block &block) {
  const int64_t n = block.num_rows;
  check_type(partials, ScalarType::Float, "partials");
  STD_TORCH_CHECK(partials.dim() == 2 && partials.size(0) == 4 && partials.size(1) == n && partials.is_contiguous(),
                  "aapo_fast_native: partials must be contiguous, 4 vectors of ", n, " numbers");
  float *p = static_cast<float *>(partials.mutable_data_ptr());
  return {p, p + n, p + 2 * n, p + 3 * n};
}

Wanted wanted_of(const Tensor &row_max, const Tensor &total, const Tensor &entropy, const Tensor &on_logp,
                 const std::optional<Tensor> &on_entropy, const std::optional<Tensor> &on_logsumexp,
                 const Block &block) {
  const auto vector = [&](const Tensor &t, const char *name) { return vector_of<float>(t, block.num_rows, name); };
  return {vector(row_max, "row_max"),
          vector(total, "total"),
          vector(entropy, "entropy"),
          vector(on_logp, "on_logp"),
          on_entropy.has_value() ? vector(*on_entropy, "on_entropy") : nullptr,
          on_logsumexp.has_value() ? vector(*on_logsumexp, "on_logsumexp") : nullptr};
}

// Each row of `tiles` holds the masses, the peaks and the levels.
Tiles tiles_of(const Tensor &tiles, const Block &block, int64_t num_rows) {
  const int64_t num_tiles = (block.vocab + TILE - 1) / TILE, num_panels = (block.vocab + PANEL - 1) / PANEL;
  check_type(tiles, ScalarType::Float, "tiles");
  check_matrix(tiles, 2 * num_tiles + num_panels, "tiles");
  STD_TORCH_CHECK(tiles.size(0) >= num_rows, "aapo_fast_native: tiles must have a row for each of products");
  float *first = static_cast<float *>(tiles.mutable_data_ptr());
  return {first, first + num_tiles, first + 2 * num_tiles, tiles.stride(0)};
}

Sample sample_of(const Tensor &uniforms, double threshold, const Block &block) {
  STD_TORCH_CHECK(threshold > 0 && threshold <= 1, "aapo_fast_native: threshold must lie in (0, 1]");
  STD_TORCH_CHECK(block.vocab < int64_t(1) << 22, "aapo_fast_native: sparse rows of 2^22 columns at most");
  return {vector_of<float>(uniforms, block.num_rows, "uniforms"), threshold};
}

Choice choice_of(const Tensor &dense, int64_t block_rows, double most_a_row, const Block &block) {
  STD_TORCH_CHECK(block_rows > 0, "aapo_fast_native: block_rows must be at least 1");
  const int64_t num_rows = block.num_rows, num_blocks = num_rows / block_rows + (num_rows % block_rows != 0);
  int64_t *is_dense = vector_of<int64_t>(dense, num_blocks, "dense");
  return {std::min(block_rows, std::max<int64_t>(num_rows, 1)), most_a_row, is_dense};
}

// Without the counts and the means.
Found found_of(const Tensor &column, const Tensor &p, int64_t num_rows) {
  check_type(column, ScalarType::Int, "found_column");
  check_type(p, ScalarType::Float, "found_p");
  STD_TORCH_CHECK(column.dim() == 2 && p.dim() == 2 && column.is_contiguous() && p.is_contiguous() &&
                      column.size(0) >= num_rows && p.size(0) >= num_rows && column.size(1) == p.size(1),
                  "aapo_fast_native: found_column and found_p must be contiguous matrices of one shape with room for ",
                  num_rows, " rows");
  return {static_cast<int32_t *>(column.mutable_data_ptr()), static_cast<float *>(p.mutable_data_ptr()),
          column.size(1), nullptr, nullptr};
}

// Counts where they become starts: that of a row where the next one starts.
Found found_of(const Tensor &column, const Tensor &p, const Tensor &starts, double *means, int64_t num_rows) {
  Found found = found_of(column, p, num_rows);
  found.counts = vector_of<int64_t>(starts, num_rows + 1, "starts") + 1;
  found.means = means;
  return found;
}

Gather gather_of(const Tensor &source, const Tensor &out) {
  check_type(out, ScalarType::Float, "out");
  check_matrix(out, -1, "out");
  check_matrix(source, out.size(1), "the dense factor");
  Gather g{};
  switch (source.scalar_type()) {
  case ScalarType::Float:
    g.type = Type::FP32;
    break;
  case ScalarType::BFloat16:
    g.type = Type::BF16;
    break;
  case ScalarType::Half:
    g.type = Type::FP16;
    break;
  default:
    STD_TORCH_CHECK(false, "aapo_fast_native: the dense factor must be Float, BFloat16 or Half, not ",
                    torch::headeronly::toString(source.scalar_type()));
  }
  g.source = source.const_data_ptr();
  g.source_stride = source.stride(0);
  g.width = out.size(1);
  g.out = static_cast<float *>(out.mutable_data_ptr());
  g.out_stride = out.stride(0);
  return g;
}

} // namespace
} // namespace aapo_fast
