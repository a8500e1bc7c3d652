// Which levels were built, and which of them this machine can run.
#include "kernels.h"

namespace aapo_fast {

const char *const LEVEL_NAMES[NUM_LEVELS] = {"plain", "avx2", "avx512"};

extern const Kernels kernels_plain;
#ifdef __x86_64__
extern const Kernels kernels_avx2, kernels_avx512;
#endif

const Kernels *kernels_of(int64_t level) {
  if (level == PLAIN)
    return &kernels_plain;
#ifdef __x86_64__
  if (level == AVX2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return &kernels_avx2;
  if (level == AVX512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return &kernels_avx512;
#endif
  return nullptr;
}

} // namespace aapo_fast
