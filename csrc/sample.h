// Sparse gradient rows: entries p >= eps exactly, of the rest (dust) a systematic sample; ops/linear_policy/README.md.
//
// A row is walked once, a stretch of tiles at a time, and most of its tiles are not looked at. First those whose largest
// entry reaches eps ("heavy") are opened, for their exact entries and the sum of their dust. Then the running sum of
// dust / eps is known at every tile's end, and tiles in which it steps are opened for the entries that it steps in. Both
// are listed before the first is opened, so that they are on their way from memory meanwhile.
#pragma once

#include "sweeps.h"

namespace aapo_fast {
namespace {

// Running sums count 2^-40ths of a step, so they are exact. An entry of dust is shorter than a step: they stay below
// 2^40 V, and the sum of a tile below 2^46.
constexpr int FRACTION = 40;
constexpr int64_t ONE = int64_t(1) << FRACTION;
constexpr double LONGEST = 2.0 * TILE * ONE; // no tile's dust is as long
constexpr int64_t TILES_A_PANEL = PANEL / TILE;
constexpr int64_t STRETCH = 160 * TILES_A_PANEL; // tiles that are listed together: of most vocabularies all
constexpr int64_t AHEAD = 16;                    // tiles that are fetched before they are opened
constexpr int64_t SUMS_AHEAD = 512;              // tiles whose sums are

inline int64_t whole(int64_t stands) { return stands >> FRACTION; }

// Where the entries of a row go, and how many there are; never more than fit.
struct Writer {
  int32_t *column;
  float *p;
  int64_t capacity, count = 0;

  void write(int64_t at, float probability) {
    if (count == capacity)
      return;
    column[count] = int32_t(at);
    p[count++] = probability;
  }
};

// One row, and where its running sum stands.
struct Walk {
  const float *x;
  const int64_t vocab;
  const bool capped;
  const Tiles tiles;
  const RowTransform transform;
  const float row_max, inverse; // p_v = exp(z_v - row_max) inverse
  const bool live;
  const float threshold;
  const double units; // what a probability of one counts
  int64_t stands, num_exact = 0;
  Writer writer;

  Walk(const Block &block, const Chances &chances, const Tiles &tiles, const Sample &sample, const Found &found,
       int64_t row)
      : x(block.products + row * block.stride), vocab(block.vocab), capped(block.softcap != 0), tiles(tiles.of(row)),
        transform(block, row), row_max(chances.row_max[row]), inverse(1.0f / chances.total[row]),
        live(chances.live[row]), threshold(float(sample.threshold)), units(double(ONE) / threshold),
        stands(int64_t(double(sample.uniforms[row]) * double(ONE))),
        writer{found.column + row * found.capacity, found.p + row * found.capacity, found.capacity} {}

  int64_t num_tiles() const { return (vocab + TILE - 1) / TILE; }

  // Something can depend on the row, and its statistics are neither NaN nor infinite.
  bool walkable() const {
    const float size = row_max + inverse + 1.0f / inverse;
    return live && size - size == 0;
  }

  void prefetch(int64_t tile) const {
    for (int64_t i = 0; i < TILE; i += LINE)
      __builtin_prefetch(x + tile * TILE + i);
  }
};

// A tile's probabilities, zero beyond the vocabulary.
struct OpenTile {
  alignas(64) float p[TILE];
  uint64_t exact = 0; // bit i: the i-th reaches eps
  float dust = 0;     // sum of the others

  template <bool CAPPED, bool HEAVY> AAPO_INLINE void read(const Walk &walk, const float *x) {
    Floats sum_of_dust{};
    for (int64_t i = 0; i < TILE; i += WIDTH) {
      Floats shifted = walk.transform.of<CAPPED>(load(x + i)).z - walk.row_max;
      const Floats q = exp_and_cut(shifted) * walk.inverse;
      store(p + i, q);
      if constexpr (HEAVY) {
        const auto is_exact = q >= walk.threshold;
        exact |= uint64_t(lanes_of((Bits)is_exact)) << i;
        sum_of_dust += is_exact ? Floats{} : q;
      }
    }
    if constexpr (HEAVY)
      dust = sum(sum_of_dust);
  }

  OpenTile(const Walk &walk, int64_t tile, bool heavy) {
    const float *x = walk.x + tile * TILE;
    float last[TILE];
    if ((tile + 1) * TILE > walk.vocab) {
      for (int64_t i = 0; i < TILE; ++i)
        last[i] = tile * TILE + i < walk.vocab ? x[i] : LEFT_OUT;
      x = last;
    }
    if (walk.capped)
      heavy ? read<true, true>(walk, x) : read<true, false>(walk, x);
    else
      heavy ? read<false, true>(walk, x) : read<false, false>(walk, x);
  }
};

// The dust entries of one tile in which the running sum steps. It stands at `before` where the tile begins and is longer
// by `length` where it ends.
//
// The dust of the tile is walked as a share of its own sum, which differs from `length` by rounding; no step may be lost
// in that, so what is beyond the last entry is the last entry's.
inline void sample_tile(Walk &walk, int64_t tile, bool heavy, int64_t before, int64_t length) {
  constexpr int64_t GROUPS = TILE / WIDTH;
  OpenTile open(walk, tile, heavy);
  for (; open.exact != 0; open.exact &= open.exact - 1)
    open.p[__builtin_ctzll(open.exact)] = 0;
  Floats running[GROUPS]; // sums up to and with each entry
  float total = 0;
  for (int64_t group = 0; group < GROUPS; ++group) {
    running[group] = running_sum(load(open.p + group * WIDTH)) + total;
    total = running[group][WIDTH - 1];
  }
  int64_t after = -1; // the entry of the last step
  for (int64_t step = whole(before) + 1; step <= whole(before + length); ++step) {
    // The entry with which the sum gets there: by counting, since no branch could be predicted.
    const float until = float(double(step * ONE - before) / double(length)) * total;
    int64_t i = 0;
    for (int64_t group = 0; group < GROUPS; ++group)
      i += __builtin_popcount(lanes_of((Bits)(running[group] < until)));
    i = least(i, TILE - 1);
    while (i > 0 && open.p[i] <= 0)
      --i;
    i = i > after ? i : after + 1;
    if (i < TILE && open.p[i] > 0)
      walk.writer.write(tile * TILE + i, walk.threshold);
    after = i;
  }
}

// Consecutive tiles of a row, whole panels of them.
struct Stretch {
  Walk &walk;
  const int64_t first, end;
  alignas(64) int64_t length[STRETCH]; // dust of each tile
  alignas(64) int64_t before[STRETCH]; // where the running sum stands at its beginning
  uint64_t heavy[STRETCH / 64] = {}, steps[STRETCH / 64] = {}; // a bit for each tile

  Stretch(Walk &walk, int64_t first, int64_t end) : walk(walk), first(first), end(end) {}

  // Lengths of light tiles, and which are heavy.
  void measure() {
    alignas(64) float shares[WIDTH]; // of WIDTH panels, what one in the sums of sweep 1 is as a probability
    for (int64_t panel = first; panel < end; panel += TILES_A_PANEL) {
      const int64_t number = panel / TILES_A_PANEL; // a stretch begins at a multiple of WIDTH
      if (number % WIDTH == 0) {
        const Floats level = load(walk.tiles.level + number, least(WIDTH, (end - panel - 1) / TILES_A_PANEL + 1));
        store(shares, exp(level - walk.row_max) * walk.inverse);
      }
      const float share = shares[number % WIDTH];
      const double units = share * walk.units;
      const Floats reaches = all(walk.threshold / share);
      const int64_t stop = least(panel + TILES_A_PANEL, end);
      for (int64_t tile = panel; tile < stop; tile += WIDTH) {
        const int64_t n = least(WIDTH, stop - tile), at = tile - first;
        fetch_ahead(walk.tiles.mass, tile, SUMS_AHEAD);
        fetch_ahead(walk.tiles.peak, tile, SUMS_AHEAD);
        alignas(64) float mass[WIDTH];
        store(mass, load(walk.tiles.mass + tile, n));
        for (int64_t i = 0; i < WIDTH; i += LONGS) { // beyond the last tile there is room, and no length
          const Doubles dust = load_doubles(mass + i) * units;
          store(length + at + i, to_longs(dust < LONGEST ? dust : all(LONGEST))); // of heavy tiles measured later
        }
        heavy[at / 64] |= uint64_t(lanes_of((Bits)(load(walk.tiles.peak + tile, n) >= reaches))) << at % 64;
      }
    }
  }

  // Exact entries, and the lengths of heavy tiles.
  void keep_exact() {
    over(heavy, [this](int64_t tile) {
      const OpenTile open(walk, tile, true);
      walk.num_exact += __builtin_popcountll(open.exact);
      for (uint64_t exact = open.exact; exact != 0; exact &= exact - 1) {
        const int64_t at = __builtin_ctzll(exact);
        walk.writer.write(tile * TILE + at, open.p[at]);
      }
      length[tile - first] = int64_t(double(open.dust) * walk.units);
    });
  }

  // Dust entries.
  void keep_sample() {
    Longs stands = all(walk.stands);
    for (int64_t i = 0; i < end - first; i += LONGS) {
      const Longs own = load(length + i), sums = running_sum(own), after = stands + sums, from = after - own;
      store(before + i, from);
      steps[i / 64] |= uint64_t(lanes_of((LongBits)((from ^ after) >= ONE))) << i % 64;
      stands += all(sums[LONGS - 1]);
    }
    walk.stands = stands[0];
    over(steps, [this](int64_t tile) {
      const int64_t i = tile - first;
      sample_tile(walk, tile, heavy[i / 64] >> i % 64 & 1, before[i], length[i]);
    });
  }

  // Calls visit(tile) where a bit is set, while tiles that come soon are on their way from memory.
  template <class Visit> AAPO_INLINE void over(const uint64_t *set, const Visit &visit) const {
    int32_t tiles[STRETCH + AHEAD];
    int64_t count = 0;
    for (int64_t word = 0; word < STRETCH / 64; ++word)
      for (uint64_t bits = set[word]; bits != 0; bits &= bits - 1)
        tiles[count++] = int32_t(first + word * 64 + __builtin_ctzll(bits));
    for (int64_t i = -AHEAD; i < count; ++i) {
      if (i + AHEAD < count)
        walk.prefetch(tiles[i + AHEAD]);
      if (i >= 0)
        visit(tiles[i]);
    }
  }
};

inline void sample_row(const Block &block, const Chances &chances, const Tiles &tiles, const Sample &sample,
                       const Found &found, int64_t row) {
  Walk walk(block, chances, tiles, sample, found, row);
  const int64_t begun = walk.stands;
  for (int64_t first = 0; walk.walkable() && first < walk.num_tiles(); first += STRETCH) {
    Stretch stretch(walk, first, least(first + STRETCH, walk.num_tiles()));
    stretch.measure();
    stretch.keep_exact();
    stretch.keep_sample();
  }
  found.counts[row] = walk.writer.count;
  found.means[row] = double(walk.num_exact) + double(walk.stands - begun) / double(ONE);
}

// --- what the loss wants of them -------------------------------------------------------------------------------------

template <bool CAPPED>
void to_gradient(const float *x, const RowTransform &transform, const RowGradient &wanted, const int32_t *column,
                 const float *p, float *value, int64_t count) {
  for (int64_t first = 0; first < count; first += WIDTH) {
    const int64_t n = least(WIDTH, count - first);
    alignas(64) float products[WIDTH] = {};
    if (CAPPED || wanted.b != 0) // else nothing depends on them, and they are no longer in a cache
      for (int64_t lane = 0; lane < n; ++lane)
        products[lane] = x[column[first + lane]];
    const Logits at = transform.of<CAPPED>(load(products));
    store(value + first, load(p + first, n) * wanted.factor(at.z - wanted.row_max) * at.slope, n);
  }
}

inline void pack_row(const Block &block, const Wanted &wanted, const Found &found, const Packed &packed, int64_t row) {
  const int64_t first = packed.starts[row], count = packed.starts[row + 1] - first;
  const int32_t *column = found.column + row * found.capacity;
  for (int64_t e = 0; e < count; ++e) {
    packed.row[first + e] = int32_t(row);
    packed.column[first + e] = column[e];
  }
  const auto of = block.softcap != 0 ? to_gradient<true> : to_gradient<false>;
  of(block.products + row * block.stride, RowTransform(block, row), RowGradient(wanted, row), column,
     found.p + row * found.capacity, packed.value + first, count);
}

} // namespace
} // namespace aapo_fast
