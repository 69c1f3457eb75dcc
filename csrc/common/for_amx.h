// Includes FUSEDRES_KERNEL_FILE once, for processors with AVX-512 and the tile instructions of AMX for bfloat16, in the
// namespace fusedres::amx. There is no include guard; include all standard headers before it, as for for_each_isa.h.

#ifndef FUSEDRES_KERNEL_FILE
#error "define FUSEDRES_KERNEL_FILE before including common/for_amx.h"
#endif

#include <type_traits>
#include <utility>

#include "common/isa.h"

#if FUSEDRES_AMX

#if defined(__clang__)
#pragma clang attribute push(                                                                                 \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")
#endif
#define FUSEDRES_NAMESPACE amx
#define FUSEDRES_LEVEL 3
#define FUSEDRES_LANE_BYTES 64
#include "common/one_isa.inc"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // FUSEDRES_AMX

#undef FUSEDRES_KERNEL_FILE
