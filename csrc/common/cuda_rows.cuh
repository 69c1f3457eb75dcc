#pragma once

#include <cuda_runtime.h>

#include "common/cuda_index.cuh"
#include "common/cuda_rows.h"
#include "common/cuda_vector.cuh"

namespace fusedres {

// The share of the calling thread.
template <int kVector>
__device__ __forceinline__ RowShare row_share(const RowGrid& grid, int64_t rows) {
  return row_share(grid, blockIdx.x * blockDim.x + threadIdx.x, rows, kVector);
}

// BatchNorm's affine map of kVector channels: z = scale·x + shift.
template <class A, int kVector>
struct Affine {
  Lanes<A, kVector> scale;
  Lanes<A, kVector> shift;
};

// Loads the map of channels c to c + kVector from a [4, channels] state.
template <int kVector, class A>
__device__ __forceinline__ Affine<A, kVector> load_affine(const A* state, int64_t channels, int64_t c) {
  return {load<kVector>(state + 2 * channels + c), load<kVector>(state + 3 * channels + c)};
}

// Rounds once, so that backward computes the same sign as forward.
template <class A, int kVector>
__device__ __forceinline__ Lanes<A, kVector> apply(const Affine<A, kVector>& map, const Lanes<A, kVector>& x) {
  Lanes<A, kVector> z;
#pragma unroll
  for (int i = 0; i < kVector; ++i) z[i] = fma(map.scale[i], x[i], map.shift[i]);
  return z;
}

// Returns max(z, 0), and NaN where z is NaN.
template <class A, int kVector>
__device__ __forceinline__ Lanes<A, kVector> relu(Lanes<A, kVector> z) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) z[i] = z[i] <= 0 ? 0 : z[i];
  return z;
}

}  // namespace fusedres
