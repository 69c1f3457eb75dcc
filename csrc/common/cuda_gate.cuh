#pragma once

#include "common/cuda_index.cuh"
#include "common/cuda_vector.cuh"
#include "common/gate.h"

namespace fusedres {

// Packed bits of a ReLU, [rows, ceil(channels / 8)] bytes, lowest bit first: those of channels c to c + kVector of a
// row (c a multiple of kVector, kVector 1, 2, 4 or 8) are in one byte.
__device__ __forceinline__ int64_t bits_byte(int64_t row, int64_t channels, int64_t c) {
  return element(row, (channels + 7) / 8, c / 8);
}

template <int kVector>
__device__ __forceinline__ unsigned load_bits(const uint8_t* bits, int64_t row, int64_t channels, int64_t c) {
  static_assert(8 % kVector == 0, "a vector's bits lie in one byte");
  return bits[bits_byte(row, channels, c)] >> (c % 8);
}

// value where the gate of this row is open, NOT (gate <= 0), else 0. kRecompute has no memory: see z_gated.
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

// value where z, the ReLU's input, is open.
template <class A, int kVector>
__device__ __forceinline__ Lanes<A, kVector> z_gated(const Lanes<A, kVector>& z, Lanes<A, kVector> value) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) value[i] = z[i] <= 0 ? 0 : value[i];
  return value;
}

}  // namespace fusedres
