// Includes FUSEDRES_KERNEL_FILE once for each instruction set. There is no include guard, as the .cpp of every kernel
// includes this file once. Include all standard headers before it, so that no shared code is compiled for a special
// instruction set.

#ifndef FUSEDRES_KERNEL_FILE
#error "define FUSEDRES_KERNEL_FILE before including common/for_each_isa.h"
#endif

#include <type_traits>
#include <utility>

#define FUSEDRES_LANE_BYTES 16
#define FUSEDRES_HAS_AVX2 0
#define FUSEDRES_HAS_AVX512 0
namespace fusedres::portable {
namespace {
#include "common/lanes.inc"
#include "common/walks.inc"
#include FUSEDRES_KERNEL_FILE
}  // namespace
}  // namespace fusedres::portable
#undef FUSEDRES_LANE_BYTES
#undef FUSEDRES_HAS_AVX2
#undef FUSEDRES_HAS_AVX512

#if FUSEDRES_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define FUSEDRES_LANE_BYTES 32
#define FUSEDRES_HAS_AVX2 1
#define FUSEDRES_HAS_AVX512 0
namespace fusedres::avx2 {
namespace {
#include "common/lanes.inc"
#include "common/walks.inc"
#include FUSEDRES_KERNEL_FILE
}  // namespace
}  // namespace fusedres::avx2
#undef FUSEDRES_LANE_BYTES
#undef FUSEDRES_HAS_AVX2
#undef FUSEDRES_HAS_AVX512
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
#define FUSEDRES_LANE_BYTES 64
#define FUSEDRES_HAS_AVX2 1
#define FUSEDRES_HAS_AVX512 1
namespace fusedres::avx512 {
namespace {
#include "common/lanes.inc"
#include "common/walks.inc"
#include FUSEDRES_KERNEL_FILE
}  // namespace
}  // namespace fusedres::avx512
#undef FUSEDRES_LANE_BYTES
#undef FUSEDRES_HAS_AVX2
#undef FUSEDRES_HAS_AVX512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // FUSEDRES_X86

#undef FUSEDRES_KERNEL_FILE
