#include "common/isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace fusedres {

Isa best_isa() {
#if FUSEDRES_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

Isa current_isa() {
  static const Isa isa = [] {
    const Isa best = best_isa();
    const char* wanted = std::getenv("FUSEDRES_ISA");
    if (wanted == nullptr) return best;
    for (Isa candidate : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512})
      if (std::strcmp(wanted, isa_name(candidate)) == 0 && candidate < best) return candidate;
    return best;
  }();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}

bool multiplies_bfloat16() {
#if FUSEDRES_X86
  static const bool found = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") != 0;
  }();
  return found && current_isa() == Isa::kAvx512;
#else
  return false;
#endif
}

}  // namespace fusedres
