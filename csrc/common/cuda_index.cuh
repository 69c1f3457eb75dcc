#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fusedres {

// Of all threads along x, in 64 bits: tensors may have more than 2^31 elements.
__device__ __forceinline__ int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ int64_t thread_count() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

// Element (row, c) of a dense [rows, channels] tensor.
__device__ __forceinline__ int64_t element(int64_t row, int64_t channels, int64_t c) {
  return row * channels + c;
}

}  // namespace fusedres
