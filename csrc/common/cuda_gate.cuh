#pragma once

#include "common/cuda_index.cuh"
#include "common/cuda_vector.cuh"
#include "common/gate.h"

namespace fusedres {

// The index of the byte with the packed bits of a ReLU for channels c to c + kVector of a row. The bits are [rows,
// ceil(channels / 8)] bytes, lowest bit first. c is a multiple of kVector, and kVector is 1, 2, 4 or 8.
__device__ __forceinline__ int64_t bits_byte(int64_t row, int64_t channels, int64_t c) {
  return element(row, (channels + 7) / 8, c / 8);
}

template <int kVector>
__device__ __forceinline__ unsigned load_bits(const uint8_t* bits, int64_t row, int64_t channels, int64_t c) {
  static_assert(8 % kVector == 0, "the bits of a vector must be in one byte");
  return bits[bits_byte(row, channels, c)] >> (c % 8);
}

// Returns value where the gate of this row is open, NOT (gate <= 0), else 0. A recomputed gate is not in memory: see
// z_gated.
template <GateKind kKind, class T, int kVector>
__device__ __forceinline__ Lanes<Arithmetic<T>, kVector> gated(const Gate& gate, int64_t row, int64_t channels,
                                                               int64_t c, Lanes<Arithmetic<T>, kVector> value) {
  if constexpr (kKind == GateKind::kBits) {
    const unsigned bits = load_bits<kVector>(static_cast<const uint8_t*>(gate.data), row, channels, c);
#pragma unroll
    for (int i = 0; i < kVector; ++i) value[i] = bits >> i & 1 ? value[i] : 0;
  }
  if constexpr (kKind == GateKind::kOutput) {
    const auto output = load<kVector>(static_cast<const T*>(gate.data) + element(row, channels, c));
#pragma unroll
    for (int i = 0; i < kVector; ++i) value[i] = output[i] <= 0 ? 0 : value[i];
  }
  return value;
}

// Returns value where the ReLU is open for its input z, else 0.
template <class A, int kVector>
__device__ __forceinline__ Lanes<A, kVector> z_gated(const Lanes<A, kVector>& z, Lanes<A, kVector> value) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) value[i] = z[i] <= 0 ? 0 : value[i];
  return value;
}

}  // namespace fusedres
