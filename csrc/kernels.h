// The row kernels as every instruction level offers them: plain structs and pointers. PyTorch is not in here, so a
// level compiles in seconds and the sanitizers can drive it alone.
//
// A kernel works on rows [begin, end) of its block, which another thread may share with it: rows are independent.
//
// Letters: C rows of a block, V vocabulary (of this shard), T tiles of a row, E entries, H hidden.
#pragma once

#include <cstdint>

namespace aapo_fast {

constexpr int64_t TILE = 64;    // columns of which sweep 1 keeps the sum, and that are opened together
constexpr int64_t PANEL = 1024; // columns that are swept while their logits are in L1; 16 tiles

// Raw products of C rows and how logits follow from them: z = softcap tanh(scale x / softcap) / temperature.
//
// The target stays out of both sweeps: sweep 1 reads its logit and puts LEFT_OUT in its place, from which all that
// follows is zero there. A block is swept once.
struct Block {
  float *products; // (C, V), rows `stride` apart
  int64_t stride, num_rows, vocab;
  const int64_t *targets;   // (C,), -1 where no column of this shard is the target
  const float *temperature; // (C,)
  float scale;
  float softcap; // 0 for none
};

// What sweep 1 says of a row: of all columns but the target, and the target's logit; each (C,).
struct Partials {
  float *row_max, *total, *weighted, *target;
};

// What sweep 1 keeps for sparse rows: of each tile the sum and the largest of exp(z - level), of each panel that level.
struct Tiles {
  float *mass, *peak, *level; // (C, T), (C, T) and (C, panels), rows `stride` apart; null where nothing is kept
  int64_t stride;

  Tiles of(int64_t row) const {
    return mass == nullptr ? Tiles{} : Tiles{mass + row * stride, peak + row * stride, level + row * stride, 0};
  }
};

// Of whole rows: p_v = exp(z_v - row_max) / total, and whether anything can depend on the row; each (C,).
struct Chances {
  const float *row_max, *total;
  const bool *live;
};

// Statistics of whole rows, and d loss / d each; each (C,).
struct Wanted {
  const float *row_max, *total, *entropy;
  const float *on_logp, *on_entropy, *on_logsumexp; // the last two null where they are zero
};

// The systematic sample of sparse rows.
struct Sample {
  const float *uniforms; // (C,) in [0, 1)
  double threshold;
};

// Room for the sampled entries of C rows: which they are, and their probabilities, p or the threshold.
struct Found {
  int32_t *column; // (C, capacity)
  float *p;        // (C, capacity)
  int64_t capacity;
  int64_t *counts; // (C,) entries of each row
  double *means;   // (C,) and how many they are in the mean over the uniforms
};

// Sparse gradient entries of C rows, one row after the other: those of r at [starts[r], starts[r + 1]).
struct Packed {
  const int64_t *starts;
  int32_t *row, *column;
  float *value;
};

enum class Type { FP32, BF16, FP16 };

// out[s] += sum of value[e] * source[index[e]] over e in [starts[s], starts[s + 1]).
struct Gather {
  const int64_t *starts;
  const int32_t *index;
  const float *value;
  const void *source; // rows of `width` numbers of `type`, `source_stride` apart
  Type type;
  int64_t source_stride, width;
  float *out; // rows `out_stride` apart
  int64_t out_stride;
};

struct Kernels {
  void (*statistics)(const Block &, const Partials &, const Tiles &, int64_t begin, int64_t end);
  // Gradient rows in place of the products.
  void (*gradient)(const Block &, const Wanted &, int64_t begin, int64_t end);
  // Both, for coefficients known beforehand.
  void (*both_sweeps)(const Block &, const float *on_logp, const Partials &, int64_t begin, int64_t end);
  // Which entries a row has depends on its probabilities alone, not on what the loss wants of it.
  void (*sample)(const Block &, const Chances &, const Tiles &, const Sample &, const Found &, int64_t begin,
                 int64_t end);
  // From probabilities to d loss / d product.
  void (*pack)(const Block &, const Wanted &, const Found &, const Packed &, int64_t begin, int64_t end);
  void (*add_gathered)(const Gather &, int64_t begin, int64_t end);
  // Of x <= 0; NaN may become a number.
  void (*exp)(const float *x, float *out, int64_t begin, int64_t end);
};

// --- levels of instructions ------------------------------------------------------------------------------------------

enum Level { PLAIN, AVX2, AVX512, NUM_LEVELS };

extern const char *const LEVEL_NAMES[NUM_LEVELS];

// Null where the level was not built or this machine lacks its instructions.
const Kernels *kernels_of(int64_t level);

} // namespace aapo_fast
