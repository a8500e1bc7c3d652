// Drives every kernel of every level over sizes with remainders, in buffers that end where the data ends, and compares
// with plain loops in double precision. Made to be run under the sanitizers: `make sanitize`.
//
// The level "wide" is the source of avx512 at its width, in whatever instructions the compiler has: so that width is
// driven on machines without AVX-512 too.
#include "../blocks.h"
#include "../entries.h"
#include "../kernels.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

namespace aapo_fast {

extern const Kernels kernels_wide;

namespace {

int num_checks = 0;
const char *where = "";

void expect(bool holds, const char *what, double found, double wanted) {
  ++num_checks;
  if (!holds) {
    std::fprintf(stderr, "%s: %s: found %.9g, wanted %.9g\n", where, what, found, wanted);
    std::exit(1);
  }
}

void expect_near(double found, double wanted, double size, const char *what) {
  const double gap = std::abs(found - wanted);
  expect(gap <= 3e-6 * size, what, found, wanted);
}

std::mt19937 generator(0);

double normal() { return std::normal_distribution<double>()(generator); }

// Statistics in double precision: of the whole row, and of all columns but the target.
struct Truth {
  std::vector<double> z, slope, p;
  double row_max = -1e300, total = 0, weighted = 0;
  double max_of_rest = -1e34, rest = 0, weighted_rest = 0;

  Truth(const Block &b, int64_t row) {
    for (int64_t v = 0; v < b.vocab; ++v) {
      const double x = double(b.scale) * b.products[row * b.stride + v], t = b.temperature[row], c = b.softcap;
      z.push_back(c != 0 ? c * std::tanh(x / c) / t : x / t);
      slope.push_back((c != 0 ? 1 - std::tanh(x / c) * std::tanh(x / c) : 1) * b.scale / t);
      row_max = std::max(row_max, z.back());
    }
    for (double v : z) {
      total += std::exp(v - row_max);
      weighted += std::exp(v - row_max) * (v - row_max);
    }
    for (double v : z)
      p.push_back(std::exp(v - row_max) / total);
    for (int64_t v = 0; v < b.vocab; ++v)
      max_of_rest = v == b.targets[row] ? max_of_rest : std::max(max_of_rest, z[size_t(v)]);
    for (int64_t v = 0; v < b.vocab; ++v)
      if (v != b.targets[row]) {
        rest += std::exp(z[size_t(v)] - max_of_rest);
        weighted_rest += std::exp(z[size_t(v)] - max_of_rest) * (z[size_t(v)] - max_of_rest);
      }
  }

  double entropy() const { return std::log(total) - weighted / total; }
};

struct Case {
  int64_t num_rows, vocab, stride, offset;
  float softcap;
  bool every_coefficient;
};

void sweeps(const Kernels &k, const Case &c) {
  const int64_t n = c.num_rows;
  // Exactly as long as needed: what is read or written beyond is an error of the address sanitizer.
  std::vector<float> memory(size_t(c.offset + (n - 1) * c.stride + c.vocab));
  for (float &x : memory)
    x = float(4 * normal());
  std::vector<float> temperature, a, b, g, uniforms;
  std::vector<int64_t> targets;
  for (int64_t row = 0; row < n; ++row) {
    temperature.push_back(0.5f + float(row % 3));
    a.push_back(row % 4 == 3 ? 0 : float(normal()));
    b.push_back(c.every_coefficient ? a.back() * 0.5f : 0);
    g.push_back(c.every_coefficient ? a.back() * 0.25f : 0);
    uniforms.push_back(std::uniform_real_distribution<float>()(generator) * 0.999f);
    targets.push_back(row % 3 == 2 ? -1 : int64_t(generator() % size_t(c.vocab)));
  }
  const Block block{memory.data() + c.offset, c.stride,           n,    c.vocab,
                    targets.data(),           temperature.data(), 0.8f, c.softcap};
  const int64_t num_tiles = (c.vocab + TILE - 1) / TILE, num_panels = (c.vocab + PANEL - 1) / PANEL;
  const int64_t kept = 2 * num_tiles + num_panels;
  std::vector<float> memory_of_tiles(size_t(n * kept)), said(size_t(4 * n));
  const Partials partials{&said[0], &said[size_t(n)], &said[size_t(2 * n)], &said[size_t(3 * n)]};
  float *mass = memory_of_tiles.data();
  const Tiles tiles{mass, mass + num_tiles, mass + 2 * num_tiles, kept};
  const std::vector<float> given = memory;
  std::vector<Truth> truth;
  std::vector<float> entropy, row_max, total;
  for (int64_t row = 0; row < n; ++row) {
    const Truth &t = truth.emplace_back(block, row);
    entropy.push_back(float(t.entropy()));
    row_max.push_back(float(t.row_max));
    total.push_back(float(t.total));
  }
  k.statistics(block, partials, tiles, 0, n);
  for (int64_t row = 0; row < n; ++row) {
    const Truth &t = truth[size_t(row)];
    expect_near(partials.row_max[row], t.max_of_rest, 1 + std::abs(t.max_of_rest), "row_max");
    expect_near(partials.total[row], t.rest, t.rest, "total");
    expect_near(partials.weighted[row], t.weighted_rest, 1 + std::abs(t.weighted_rest), "weighted");
    if (targets[size_t(row)] >= 0)
      expect_near(partials.target[row], t.z[size_t(targets[size_t(row)])], 1 + std::abs(t.row_max), "target");
  }
  const Wanted wanted{row_max.data(), total.data(), entropy.data(), a.data(), b.data(), g.data()};
  const std::unique_ptr<bool[]> live(new bool[size_t(n)]);
  for (int64_t row = 0; row < n; ++row)
    live[size_t(row)] = a[size_t(row)] != 0;
  const Chances chances{row_max.data(), total.data(), live.get()};
  const auto gradient = [&](int64_t row, int64_t v, bool all = true) {
    const Truth &t = truth[size_t(row)];
    const double by_a = a[size_t(row)];
    const double by_b = all ? b[size_t(row)] : 0, by_c = all ? g[size_t(row)] : 0;
    const double p = t.p[size_t(v)], log_p = t.z[size_t(v)] - t.row_max - std::log(t.total);
    const double d = -by_a * p - by_b * p * (log_p + t.entropy()) + by_c * p;
    return v == targets[size_t(row)] ? 0 : d * t.slope[size_t(v)];
  };

  for (const double threshold : {1.0, 0.25, 1.0 / 64, 1e-4, 1e-7}) {
    std::vector<int64_t> starts(size_t(n + 1));
    std::vector<double> means(static_cast<size_t>(n));
    const Sample sample{uniforms.data(), threshold};
    const int64_t capacity = std::min(c.vocab, int64_t(1 / threshold) + 2);
    std::vector<int32_t> found_columns(size_t(n * capacity));
    std::vector<float> found_p(size_t(n * capacity));
    const Found found{found_columns.data(), found_p.data(), capacity, starts.data() + 1, means.data()};
    k.sample(block, chances, tiles, sample, found, 0, n);
    for (int64_t row = 0; row < n; ++row) {
      expect(double(starts[size_t(row) + 1]) <= 1 / threshold + 1, "entries", double(starts[size_t(row) + 1]), 0);
      double mean = 0;
      for (int64_t v = 0; v < c.vocab && a[size_t(row)] != 0; ++v)
        if (v != targets[size_t(row)])
          mean += std::min(1.0, truth[size_t(row)].p[size_t(v)] / threshold);
      expect(std::abs(mean - double(starts[size_t(row) + 1])) < 1.001, "entries", double(starts[size_t(row) + 1]), mean);
      expect(std::abs(mean - means[size_t(row)]) <= 1e-5 * (1 + mean), "entries in the mean", means[size_t(row)], mean);
      starts[size_t(row) + 1] += starts[size_t(row)];
    }
    const size_t count = size_t(starts.back());
    std::vector<int32_t> rows(count, -1), columns(count, -1);
    std::vector<float> values(count);
    k.pack(block, wanted, found, {starts.data(), rows.data(), columns.data(), values.data()}, 0, n);
    for (size_t e = 0; e < count; ++e)
      expect(rows[e] >= 0 && rows[e] < n && columns[e] >= 0 && columns[e] < c.vocab, "entry", columns[e], 0);
    if (threshold <= 1e-7) { // all entries are exact, or as good as
      std::vector<double> dense(size_t(n * c.vocab));
      for (size_t e = 0; e < count; ++e)
        dense[size_t(rows[e] * c.vocab + columns[e])] += values[e];
      for (int64_t row = 0; row < n; ++row)
        for (int64_t v = 0; v < c.vocab; ++v)
          expect_near(dense[size_t(row * c.vocab + v)], gradient(row, v), 3, "sparse gradient");
    }
  }

  k.gradient(block, wanted, 0, n);
  for (int64_t row = 0; row < n; ++row)
    for (int64_t v = 0; v < c.vocab; ++v)
      expect_near(block.products[row * c.stride + v], gradient(row, v), 3, "gradient");
  memory = given;
  for (const double most : {0.0, double(c.vocab)}) { // all rows dense, but for those without weight, and all sparse
    const int64_t block_rows = 2, num_blocks = (n + 1) / 2, capacity = c.vocab;
    std::vector<int64_t> counts(static_cast<size_t>(n)), is_dense(static_cast<size_t>(num_blocks), -1);
    std::vector<double> means(static_cast<size_t>(n));
    std::vector<int32_t> columns(size_t(n * capacity));
    std::vector<float> p(size_t(n * capacity)), own_tiles(size_t(std::min(n, block_rows) * kept));
    const Found found{columns.data(), p.data(), capacity, counts.data(), means.data()};
    const Tiles room{own_tiles.data(), own_tiles.data() + num_tiles, own_tiles.data() + 2 * num_tiles, kept};
    sweep_sparsely(k, block, live.get(), partials, room, {uniforms.data(), 1e-7}, {block_rows, most, is_dense.data()},
                   found, [](int64_t rows, const auto &work) { work(0, rows); });
    for (int64_t row = 0; row < n; ++row) {
      const bool dense = is_dense[size_t(row / block_rows)] == 1;
      const Truth &t = truth[size_t(row)];
      expect(most != 0 || dense || a[size_t(row)] == 0 || c.vocab - (targets[size_t(row)] >= 0) == 0, "a row left sparse",
             double(row), 0);
      expect(!dense || (most == 0 && counts[size_t(row)] == 0), "entries of a dense row", double(counts[size_t(row)]), 0);
      expect_near(partials.total[row], t.rest, t.rest, "total of a panel");
      std::vector<double> made(size_t(c.vocab));
      for (int64_t e = 0; e < counts[size_t(row)]; ++e)
        made[size_t(columns[size_t(row * capacity + e)])] += p[size_t(row * capacity + e)];
      for (int64_t v = 0; v < c.vocab && !dense; ++v) // a threshold of 1e-7 leaves no dust
        expect_near(made[size_t(v)], v == targets[size_t(row)] || a[size_t(row)] == 0 ? 0 : t.p[size_t(v)], 1,
                    "probabilities of a panel");
    }
    // The same bits from a panel that was swept before.
    for (int64_t row = 0; row < n; ++row)
      join_target(partials, row, row_max.data(), total.data());
    std::vector<int64_t> counts_apart(static_cast<size_t>(n)), is_dense_apart(static_cast<size_t>(num_blocks), -1);
    std::vector<int32_t> columns_apart(columns.size());
    std::vector<float> p_apart(p.size());
    const Found apart{columns_apart.data(), p_apart.data(), capacity, counts_apart.data(), means.data()};
    sample_sparsely(k, block, chances, tiles, {uniforms.data(), 1e-7}, {block_rows, most, is_dense_apart.data()}, apart,
                    [](int64_t rows, const auto &work) { work(0, rows); });
    expect(is_dense_apart == is_dense && counts_apart == counts, "the choice of a panel swept before", 0, 0);
    for (int64_t row = 0; row < n; ++row)
      for (int64_t e = row * capacity; e < row * capacity + counts[size_t(row)]; ++e)
        expect(columns_apart[size_t(e)] == columns[size_t(e)] && p_apart[size_t(e)] == p[size_t(e)],
               "an entry of a panel swept before", p_apart[size_t(e)], p[size_t(e)]);
    memory = given;
  }
  k.both_sweeps(block, a.data(), partials, 0, n);
  for (int64_t row = 0; row < n; ++row)
    for (int64_t v = 0; v < c.vocab; ++v)
      expect_near(block.products[row * c.stride + v], gradient(row, v, false), 3, "gradient of both sweeps");
  for (int64_t row = 0; row + 1 < n; ++row)
    for (int64_t i = c.vocab; i < c.stride; ++i)
      expect(block.products[row * c.stride + i] == given[size_t(c.offset + row * c.stride + i)], "padding", 0, 0);
}

uint16_t narrowed(float x, Type type) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (type == Type::BF16)
    return uint16_t(bits >> 16);
  // Exact halves of small integers only.
  const int exponent = x == 0 ? 0 : std::ilogb(x) + 15;
  return uint16_t((bits >> 31) << 15 | uint32_t(exponent) << 10 | (x == 0 ? 0 : (bits >> 13 & 0x3ff)));
}

void products(const Kernels &k, int64_t width, Type type) {
  const int64_t num_segments = 12, num_sources = 7, stride = width + 2;
  std::vector<float> wide(size_t((num_sources - 1) * stride + width));
  for (float &x : wide)
    x = float(int(generator() % 9)) - 4;
  std::vector<uint16_t> narrow;
  for (float x : wide)
    narrow.push_back(narrowed(x, type));
  std::vector<int32_t> segment, index;
  std::vector<float> value;
  for (int e = 0; e < 23; ++e) {
    segment.push_back(int32_t(2 + generator() % 4 * 2)); // between empty ones, and several of these at either end
    index.push_back(int32_t(generator() % 7));
    value.push_back(float(int(generator() % 5)) / 4);
  }
  const Segments s = sorted(segment.data(), index.data(), value.data(), 23, num_segments);
  std::vector<float> out(size_t((num_segments - 1) * stride + width), 1);
  const void *source = type == Type::FP32 ? static_cast<const void *>(wide.data()) : narrow.data();
  const Gather g{s.starts.data(), s.index.data(), s.value.data(), source, type, stride, width, out.data(), stride};
  const auto cuts = even_cuts(s.starts.data(), num_segments, 9);
  for (size_t part = 0; part + 1 < cuts.size(); ++part)
    k.add_gathered(g, cuts[part], cuts[part + 1]);
  for (int64_t row = 0; row < num_segments; ++row)
    for (int64_t h = 0; h < width; ++h) {
      double sum = 1;
      for (size_t e = 0; e < segment.size(); ++e)
        if (segment[e] == row)
          sum += double(value[e]) * wide[size_t(index[e] * stride + h)];
      expect(out[size_t(row * stride + h)] == sum, "product", out[size_t(row * stride + h)], sum);
    }
}

void exps(const Kernels &k) {
  std::vector<float> x, out;
  for (double v = -110; v <= 0; v += 0.0117)
    x.push_back(float(v));
  const float infinity = std::numeric_limits<float>::infinity();
  x.insert(x.end(), {0, -0.0f, -infinity, -3e38f, -1e-40f});
  out.resize(x.size());
  k.exp(x.data(), out.data(), 0, int64_t(x.size()));
  for (size_t i = 0; i < x.size(); ++i) {
    const double truth = x[i] <= -55 ? 0 : std::exp(double(x[i])); // functions.h, EXP_LOWEST
    expect(std::abs(out[i] - truth) <= truth * 2.4e-7, "exp", out[i], truth);
  }
  const float nan = std::nanf("");
  k.exp(&nan, out.data(), 0, 1);
  expect(std::isnan(out[0]), "exp of NaN", out[0], nan);
}

void drive(const char *name, const Kernels &k) {
  where = name;
  for (const int64_t vocab : {1, 2, 3, 7, 8, 15, 16, 17, 63, 64, 65, 130, 1023, 1024, 1025, 2500})
    for (const int variant : {0, 1, 2, 3})
      sweeps(k,
             {1 + vocab % 5, vocab, vocab + 3 * (variant % 2), variant, variant < 2 ? 0.0f : 5.0f, variant % 3 == 1});
  // More panels than a vector has lanes, twice as many, and more tiles than are listed at a time.
  for (const int64_t vocab : {9 * PANEL + 1, 33 * PANEL - 70, 161 * PANEL + 65})
    sweeps(k, {2, vocab, vocab + 1, 1, vocab % 2 == 0 ? 5.0f : 0.0f, true});
  for (const Type type : {Type::FP32, Type::BF16, Type::FP16})
    for (const int64_t width : {0, 1, 5, 8, 16, 17, 31, 32, 64, 100})
      products(k, width, type);
  exps(k);
}

} // namespace
} // namespace aapo_fast

int main() {
  using namespace aapo_fast;
  std::string names;
  for (int64_t level = 0; level < NUM_LEVELS; ++level)
    if (const Kernels *k = kernels_of(level)) {
      drive(LEVEL_NAMES[level], *k);
      names += std::string(LEVEL_NAMES[level]) + ", ";
    }
  drive("wide", kernels_wide);
  std::printf("%d checks passed: %swide\n", num_checks, names.c_str());
}
