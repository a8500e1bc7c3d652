// Sparse gradient rows: entries p >= eps exactly, of the rest (dust) a systematic sample; ops/linear_policy/README.md.
//
// A row is walked twice, to count its entries and to emit them, and most of its tiles are not looked at: a tile is
// opened where its largest entry reaches eps ("heavy"), or, to emit, where the running sum of dust / eps steps. Running
// sums are in fixed point, so they are exact, the walks agree, and dust counts down to 2^-40 of a step.
#pragma once

#include "sweeps.h"

namespace aapo_fast {
namespace {

// Running sums count 2^-40ths. An entry of dust is shorter than one, so they stay below 2^40 V.
constexpr int FRACTION = 40;
constexpr int64_t ONE = int64_t(1) << FRACTION;

inline int64_t whole(int64_t stands) { return stands >> FRACTION; }

// What the two walks share: one row, its tiles, and where the running sum stands.
struct Walk {
  const Block &block;
  const float *x;
  const Tiles tiles;
  const RowTransform transform;
  const RowGradient wanted;
  const float threshold;
  const double units; // what a probability of one counts
  int64_t start, stands;
  bool walkable; // something depends on the row, and its statistics are neither NaN nor infinite

  Walk(const Block &block, const Wanted &every, const Tiles &tiles, const Sample &sample, int64_t row)
      : block(block), x(block.products + row * block.stride), tiles(tiles.of(row)), transform(block, row),
        wanted(every, row), threshold(float(sample.threshold)), units(double(ONE) / threshold) {
    start = stands = int64_t(double(sample.uniforms[row]) * double(ONE));
    const float size = wanted.row_max + wanted.inverse + 1.0f / wanted.inverse;
    walkable = wanted.live() && size - size == 0;
  }

  // Adds dust to the running sum; returns how many times it steps.
  int64_t add(double p) {
    const int64_t before = whole(stands);
    stands += int64_t(p * units);
    return whole(stands) - before;
  }

  // Calls visit(tile, mass, whether it is heavy) for every tile; mass as a probability.
  template <class Visit> AAPO_INLINE void over_tiles(const Visit &visit) {
    for (int64_t first = 0; walkable && first < block.vocab; first += PANEL) {
      const double factor = __builtin_exp(double(tiles.level[first / PANEL]) - wanted.row_max) * wanted.inverse;
      const int64_t end = (least(first + PANEL, block.vocab) + TILE - 1) / TILE;
      for (int64_t tile = first / TILE; tile < end; ++tile) // what will be opened is on its way meanwhile
        if (tiles.peak[tile] * factor >= threshold)
          for (int64_t i = 0; i < TILE; i += 16)
            __builtin_prefetch(x + tile * TILE + i);
      for (int64_t tile = first / TILE; tile < end; ++tile)
        visit(tile, tiles.mass[tile] * factor, tiles.peak[tile] * factor >= threshold);
    }
  }
};

// A tile's probabilities, zero beyond the vocabulary. Of those, entries from `exact_from` on are exact, the rest dust.
struct OpenTile {
  alignas(64) float p[TILE];
  float dust; // sum of the dust
  int64_t num_exact;

  template <bool CAPPED> void read(const Walk &walk, int64_t first, float exact_from) {
    const int64_t held = least(TILE, walk.block.vocab - first);
    Floats sum_of_dust{};
    Bits exact{};
    for (int64_t i = 0; i < TILE; i += WIDTH) {
      if (i >= held) {
        store(p + i, Floats{});
        continue;
      }
      const int64_t n = least(WIDTH, held - i);
      const Logits logits = walk.transform.of<CAPPED>(load(walk.x + first + i, n));
      Floats v = logits.z - walk.wanted.row_max;
      Floats q = exp_and_cut(v) * walk.wanted.inverse;
      if (n < WIDTH)
        q = first_lanes(q, n, 0);
      const auto is_exact = q >= exact_from;
      sum_of_dust += is_exact ? Floats{} : q;
      exact -= (Bits)is_exact;
      store(p + i, q);
    }
    dust = sum(sum_of_dust);
    num_exact = 0;
    for (int64_t lane = 0; lane < WIDTH; ++lane)
      num_exact += exact[lane];
  }

  OpenTile(const Walk &walk, int64_t tile, float exact_from) {
    if (walk.block.softcap != 0)
      read<true>(walk, tile * TILE, exact_from);
    else
      read<false>(walk, tile * TILE, exact_from);
  }
};

constexpr float NONE_EXACT = 2; // no probability reaches it: in a light tile all is dust, whatever rounding says

inline void count_row(Walk &walk, int64_t *count, double *expected) {
  int64_t exact = 0;
  walk.over_tiles([&](int64_t tile, double mass, bool heavy) {
    if (!heavy) {
      walk.add(mass);
      return;
    }
    const OpenTile open(walk, tile, walk.threshold);
    exact += open.num_exact;
    walk.add(open.dust);
  });
  *count = exact + whole(walk.stands) - whole(walk.start);
  *expected = double(exact) + double(walk.stands - walk.start) / double(ONE);
}

// Where the entries of a row go; never beyond what was counted.
struct Writer {
  const Entries &entries;
  int32_t row;
  int64_t slot, end;

  void write(int64_t column, float value) {
    if (slot == end)
      return;
    entries.row[slot] = row;
    entries.column[slot] = int32_t(column);
    entries.value[slot++] = value;
  }
};

// The exact entries of an open tile, and the dust entries in which the running sum steps. It stood at `before` where
// the tile begins and has moved by `length` where it ends. The dust of the tile is walked as a share of its own sum,
// which differs from what the tile was counted with by rounding; no step may be lost in that, so the last dust entry
// takes what is left.
inline void emit_tile(const Walk &walk, const OpenTile &open, int64_t tile, float exact_from, int64_t before,
                      int64_t steps, Writer &writer) {
  constexpr int64_t GROUP = 8; // entries that are passed over together where nothing is in them
  const double dust_a_unit = double(open.dust) / double(walk.stands - before);
  int64_t next = (whole(before) + 1) * ONE;
  double running = 0, until = double(next - before) * dust_a_unit;
  int64_t last_dust = -1;
  const auto emit = [&](int64_t i, float q) {
    const int64_t column = tile * TILE + i;
    const Floats x = all(walk.x[column]);
    const Logits at = walk.block.softcap != 0 ? walk.transform.of<true>(x) : walk.transform.of<false>(x);
    writer.write(column, q * walk.wanted.factor(at.z[0] - walk.wanted.row_max) * at.slope[0]);
  };
  for (int64_t first = 0; first < TILE; first += GROUP) {
    const float *p = open.p + first;
    float most = 0;
    for (int64_t i = 0; i < GROUP; ++i)
      most = p[i] > most ? p[i] : most;
    if (most < exact_from) {
      const float halves[2] = {(p[0] + p[1]) + (p[2] + p[3]), (p[4] + p[5]) + (p[6] + p[7])};
      const double mass = double(halves[0]) + double(halves[1]);
      if (running + mass < until) {
        running += mass;
        last_dust = mass > 0 ? first + GROUP - 1 : last_dust;
        continue;
      }
    }
    for (int64_t i = first; i < first + GROUP; ++i) {
      const float p = open.p[i];
      if (p >= exact_from) {
        emit(i, p);
      } else if (steps > 0 && p > 0) {
        running += p;
        last_dust = i;
        if (running >= until) {
          emit(i, walk.threshold);
          next += ONE;
          until = double(next - before) * dust_a_unit;
          last_dust = -1;
          if (--steps == 0 && open.num_exact == 0)
            return;
        }
      }
    }
  }
  while (last_dust > 0 && open.p[last_dust] <= 0)
    --last_dust;
  if (steps > 0 && last_dust >= 0)
    emit(last_dust, walk.threshold);
}

// The sample in the order of columns.
inline void emit_row(Walk &walk, Writer &writer) {
  walk.over_tiles([&](int64_t tile, double mass, bool heavy) {
    const int64_t before = walk.stands;
    if (heavy) {
      const OpenTile open(walk, tile, walk.threshold);
      const int64_t steps = walk.add(open.dust);
      emit_tile(walk, open, tile, walk.threshold, before, steps, writer);
    } else if (const int64_t steps = walk.add(mass)) {
      emit_tile(walk, OpenTile(walk, tile, NONE_EXACT), tile, NONE_EXACT, before, steps, writer);
    }
  });
  while (writer.slot < writer.end) // a step that found no dust, which takes a rounding error in a million million
    writer.write(0, 0);
}

} // namespace
} // namespace aapo_fast
