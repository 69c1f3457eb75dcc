#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace fusedres {

// Combines the values of all threads of a block with the same threadIdx.x, as a binary tree over threadIdx.y: the order
// depends on the block's shape alone. Called by every thread of the block; blockDim.y is a power of two. The result is
// valid at threadIdx.y == 0; combine(into, added) adds a value to another.
// scratch: shared memory, [blockDim.y / 2][blockDim.x] values; free again only after another __syncthreads.
template <class Value, class Combine>
__device__ __forceinline__ void reduce_rows(Value& value, Value* scratch, const Combine& combine) {
  Value* mine = scratch + threadIdx.x;
  for (unsigned half = blockDim.y / 2; half > 0; half /= 2) {
    if (threadIdx.y >= half && threadIdx.y < 2 * half) mine[(threadIdx.y - half) * blockDim.x] = value;
    __syncthreads();  // written
    if (threadIdx.y < half) combine(value, mine[threadIdx.y * blockDim.x]);
    __syncthreads();  // read
  }
}

// Bytes of that scratch.
template <class Value>
constexpr size_t reduce_rows_bytes(unsigned block_x, unsigned block_y) {
  return sizeof(Value) * block_x * (block_y / 2);
}

}  // namespace fusedres
