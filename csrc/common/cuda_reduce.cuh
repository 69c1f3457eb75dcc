#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace fusedres {

// The place of a thread in its block, when the block is seen as [height][width].
struct BlockPlace {
  unsigned x, y, width, height;
};

// The place in a one-dimensional block with `width` threads side by side. width divides the number of threads.
__device__ __forceinline__ BlockPlace place_in_block(unsigned width) {
  return {threadIdx.x % width, threadIdx.x / width, width, blockDim.x / width};
}

// Combines the values of all threads of a block that have the same place.x, as a binary tree over place.y. The order
// depends only on the shape of the block. Every thread of the block must call it, and the height must be a power of
// two. The result is valid at place.y == 0. combine(into, added) adds one value to another. scratch is shared memory of
// [height / 2][width] values, which may be used again after the return.
template <class Value, class Combine>
__device__ __forceinline__ void reduce_rows(Value& value, Value* scratch, const Combine& combine,
                                            const BlockPlace& place) {
  Value* mine = scratch + place.x;
  for (unsigned half = place.height / 2; half > 0; half /= 2) {
    if (place.y >= half && place.y < 2 * half) mine[(place.y - half) * place.width] = value;
    __syncthreads();  // written
    if (place.y < half) combine(value, mine[place.y * place.width]);
    __syncthreads();  // read
  }
}

// Does the same in a block with the shape of blockDim.
template <class Value, class Combine>
__device__ __forceinline__ void reduce_rows(Value& value, Value* scratch, const Combine& combine) {
  reduce_rows(value, scratch, combine, BlockPlace{threadIdx.x, threadIdx.y, blockDim.x, blockDim.y});
}

// The size of that scratch memory in bytes.
template <class Value>
constexpr size_t reduce_rows_bytes(unsigned block_x, unsigned block_y) {
  return sizeof(Value) * block_x * (block_y / 2);
}

}  // namespace fusedres
