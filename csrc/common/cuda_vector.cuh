#pragma once

// Storage types on the device: conversion to and from the arithmetic type, and loads and stores of 16 bytes.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/channel_vector.h"
#include "common/dtype.h"

namespace fusedres {

// The arithmetic type of T: double for double, else float.
template <class T>
using Arithmetic = typename Accumulate<T>::type;

// The number of values of T in 16 bytes.
template <class T>
constexpr int kVectorOf = 16 / static_cast<int>(sizeof(T));

// Values of kVector neighbouring channels in the arithmetic type.
template <class A, int kVector>
struct Lanes {
  A values[kVector];

  __device__ A& operator[](int i) { return values[i]; }
  __device__ const A& operator[](int i) const { return values[i]; }
};

__device__ __forceinline__ double to_arithmetic(double value) {
  return value;
}
__device__ __forceinline__ float to_arithmetic(float value) {
  return value;
}
__device__ __forceinline__ float to_arithmetic(BFloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
__device__ __forceinline__ float to_arithmetic(Float16 value) {
  return __half2float(__ushort_as_half(value.bits));
}

// Rounds to nearest even and keeps NaN.
template <class T>
__device__ __forceinline__ T to_storage(Arithmetic<T> value) {
  if constexpr (sizeof(T) > 2) return value;
}
template <>
__device__ __forceinline__ BFloat16 to_storage<BFloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
template <>
__device__ __forceinline__ Float16 to_storage<Float16>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}

// kVector values in their storage type. Values that wait in registers take fewer registers in this form.
template <class T, int kVector>
struct Packed {
  T values[kVector];
};

// Loads kVector values from `source`. Unless kVector is 1, source is aligned to 16 bytes, and the values fill whole
// words of 16 bytes.
template <int kVector, class T>
__device__ __forceinline__ Packed<T, kVector> load_packed(const T* source) {
  Packed<T, kVector> packed;
  if constexpr (kVector == 1) {
    packed.values[0] = *source;
  } else {
    constexpr int kEach = kVectorOf<T>;
    static_assert(kVector % kEach == 0, "a vector is whole 16-byte words");
#pragma unroll
    for (int word = 0; word < kVector / kEach; ++word) {
      const uint4 bits = reinterpret_cast<const uint4*>(source)[word];
      __builtin_memcpy(packed.values + word * kEach, &bits, sizeof(bits));
    }
  }
  return packed;
}

template <class T, int kVector>
__device__ __forceinline__ Lanes<Arithmetic<T>, kVector> unpack(const Packed<T, kVector>& packed) {
  Lanes<Arithmetic<T>, kVector> lanes;
#pragma unroll
  for (int i = 0; i < kVector; ++i) lanes[i] = to_arithmetic(packed.values[i]);
  return lanes;
}

template <int kVector, class T>
__device__ __forceinline__ Lanes<Arithmetic<T>, kVector> load(const T* source) {
  return unpack(load_packed<kVector>(source));
}

// The inverse of load.
template <class T, int kVector>
__device__ __forceinline__ void store(T* target, const Lanes<Arithmetic<T>, kVector>& lanes) {
  if constexpr (kVector == 1) {
    *target = to_storage<T>(lanes[0]);
  } else {
    constexpr int kEach = kVectorOf<T>;
    static_assert(kVector % kEach == 0, "a vector is whole 16-byte words");
#pragma unroll
    for (int word = 0; word < kVector / kEach; ++word) {
      T values[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) values[i] = to_storage<T>(lanes[word * kEach + i]);
      uint4 bits;
      __builtin_memcpy(&bits, values, sizeof(bits));
      // not an assignment, which nvcc turns into four stores in some kernels
      __stwb(reinterpret_cast<uint4*>(target) + word, bits);
    }
  }
}

// Value c of a per-channel vector of any dtype, or `otherwise` if there is no vector.
template <class A>
__device__ __forceinline__ A load_channel(const ChannelVector& vector, int64_t c, A otherwise) {
  if (vector.data == nullptr) return otherwise;
  switch (vector.dtype) {
    case DType::kFloat64:
      return static_cast<A>(static_cast<const double*>(vector.data)[c]);
    case DType::kBFloat16:
      return to_arithmetic(static_cast<const BFloat16*>(vector.data)[c]);
    case DType::kFloat16:
      return to_arithmetic(static_cast<const Float16*>(vector.data)[c]);
    default:
      return static_cast<const float*>(vector.data)[c];
  }
}

template <class A>
__device__ __forceinline__ void store_channel(const ChannelVector& vector, int64_t c, A value) {
  switch (vector.dtype) {
    case DType::kFloat64:
      static_cast<double*>(vector.data)[c] = value;
      break;
    case DType::kBFloat16:
      static_cast<BFloat16*>(vector.data)[c] = to_storage<BFloat16>(static_cast<float>(value));
      break;
    case DType::kFloat16:
      static_cast<Float16*>(vector.data)[c] = to_storage<Float16>(static_cast<float>(value));
      break;
    default:
      static_cast<float*>(vector.data)[c] = static_cast<float>(value);
  }
}

}  // namespace fusedres
