#include "common/isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if FUSEDRES_AMX && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

bool has_amx() {
#if FUSEDRES_AMX && defined(__linux__)
  static const bool found = [] {
    // A process has to ask Linux for the tiles' registers. Threads that exist already get them too.
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kTilesOfBFloat16 = 1u << 22 | 1u << 24;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kTilesOfBFloat16) != kTilesOfBFloat16) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return found && multiplies_bfloat16();
#else
  return false;
#endif
}

}  // namespace fusedres
