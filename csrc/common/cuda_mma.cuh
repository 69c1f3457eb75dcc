#pragma once

// Matrix products on the tensor cores: mma.sync.m16n8k16 (m16n8k8 for tf32), with sums in float32.
//
// A warp holds its operands in words of 32 bits. A word is two 16-bit values that are neighbours along k, or one tf32
// value. Counted in words, the fragments are the same for all types. With g = lane / 4, t = lane % 4,
//     a[r]: row g + 8·(r % 2), word t + 4·(r / 2) of k      b[r]: word t + 4·r of k, column g
//     c[r]: row g + 8·(r / 2), column 2·t + r % 2

#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda_vector.cuh"

namespace fusedres {

constexpr int kMmaRows = 16, kMmaColumns = 8, kMmaWords = 8;

// Rounds to the nearest tf32, ties away from zero. The result is a word of an operand.
__device__ __forceinline__ uint32_t to_tf32(float value) {
#ifdef FUSEDRES_CUDA_SHIM
  const uint32_t bits = __float_as_uint(value);
  return value == value ? (bits + 0x1000) & 0xffffe000 : bits;
#else
  uint32_t word;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(value));
  return word;
#endif
}

#ifdef FUSEDRES_CUDA_SHIM

// The sum of the products of the values in two words.
template <class T>
float mma_words(uint32_t a, uint32_t b) {
  if constexpr (sizeof(T) == 2) {
    float sum = 0;
    for (int half = 0; half < 2; ++half)
      sum += to_arithmetic(T{static_cast<uint16_t>(a >> 16 * half)}) *
             to_arithmetic(T{static_cast<uint16_t>(b >> 16 * half)});
    return sum;
  } else {
    return __uint_as_float(a & 0xffffe000) * __uint_as_float(b & 0xffffe000);
  }
}

#else

template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define FUSEDRES_MMA(type, shape_and_types)                                                                    \
  template <>                                                                                                  \
  __device__ __forceinline__ void mma<type>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {   \
    asm("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                       \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                   \
  }
FUSEDRES_MMA(BFloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FUSEDRES_MMA(Float16, "m16n8k16.row.col.f32.f16.f16.f32")
FUSEDRES_MMA(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FUSEDRES_MMA

#endif

// sums[i][j] += a[i]·b[j] for kRows by kColumns fragments of a warp. All lanes of the warp must call it. T = float
// means tf32.
template <class T, int kRows, int kColumns>
__device__ __forceinline__ void mma_tile(float (&sums)[kRows][kColumns][4], const uint32_t (&a)[kRows][4],
                                         const uint32_t (&b)[kColumns][2]) {
#ifdef FUSEDRES_CUDA_SHIM
  // Every lane reads the fragments of the other lanes, as the table above places them.
  struct Fragments {
    const uint32_t (*a)[4];
    const uint32_t (*b)[2];
  } const mine{a, b};
  const int group = cuda_shim::lane / 4, thread = cuda_shim::lane % 4;
  cuda_shim::exchange(&mine, [&](const auto& of) {
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kColumns; ++j)
        for (int r = 0; r < 4; ++r)
          for (int word = 0; word < kMmaWords; ++word) {
            const int row = group + 8 * (r / 2), column = 2 * thread + r % 2;
            const uint32_t left = of(row % 8 * 4 + word % 4)->a[i][row / 8 + word / 4 * 2];
            const uint32_t right = of(column * 4 + word % 4)->b[j][word / 4];
            sums[i][j][r] += mma_words<T>(left, right);
          }
    return &mine;
  });
  __syncwarp();  // the fragments must stay alive until here
#else
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) mma<T>(sums[i][j], a[i], b[j]);
  }
#endif
}

}  // namespace fusedres
