#pragma once

// The instruction sets for which the CPU kernels are compiled. The best one that the processor supports is chosen once,
// at run time. Each kernel file is included once for each instruction set, in a namespace of its own (see
// for_each_isa.h). So one source gives portable, AVX2 and AVX-512 code in one binary, without any -march flag.

#if defined(__x86_64__) && defined(__GNUC__)
#define FUSEDRES_X86 1
#include <immintrin.h>
#else
#define FUSEDRES_X86 0
#endif

// Whether the compiler knows AMX.
#if FUSEDRES_X86 && ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define FUSEDRES_AMX 1
#else
#define FUSEDRES_AMX 0
#endif

namespace fusedres {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

Isa best_isa();     // what the processor supports
Isa current_isa();  // best_isa() unless FUSEDRES_ISA=portable|avx2|avx512 asks for a lower one
const char* isa_name(Isa isa);
bool multiplies_bfloat16();  // whether the processor has instructions for products of bfloat16
bool has_amx();              // whether it multiplies tiles of bfloat16, and the operating system lets this process

// Picks the function for the current instruction set.
template <class F>
F* select_isa(F* portable, [[maybe_unused]] F* avx2, [[maybe_unused]] F* avx512) {
#if FUSEDRES_X86
  if (current_isa() == Isa::kAvx512) return avx512;
  if (current_isa() == Isa::kAvx2) return avx2;
#endif
  return portable;
}

}  // namespace fusedres

#if FUSEDRES_X86
#define FUSEDRES_SELECT_ISA(function) ::fusedres::select_isa(&portable::function, &avx2::function, &avx512::function)
#else
#define FUSEDRES_SELECT_ISA(function) (&portable::function)
#endif
