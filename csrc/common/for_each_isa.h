// Includes FUSEDRES_KERNEL_FILE once for each instruction set. There is no include guard, as the .cpp of every kernel
// includes this file once. Include all standard headers before it, so that no shared code is compiled for a special
// instruction set.

#ifndef FUSEDRES_KERNEL_FILE
#error "define FUSEDRES_KERNEL_FILE before including common/for_each_isa.h"
#endif

#include <type_traits>
#include <utility>

#define FUSEDRES_NAMESPACE portable
#define FUSEDRES_LEVEL 0
#define FUSEDRES_LANE_BYTES 16
#include "common/one_isa.inc"

#if FUSEDRES_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define FUSEDRES_NAMESPACE avx2
#define FUSEDRES_LEVEL 1
#define FUSEDRES_LANE_BYTES 32
#include "common/one_isa.inc"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define FUSEDRES_NAMESPACE avx512
#define FUSEDRES_LEVEL 2
#define FUSEDRES_LANE_BYTES 64
#include "common/one_isa.inc"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // FUSEDRES_X86

#undef FUSEDRES_KERNEL_FILE
