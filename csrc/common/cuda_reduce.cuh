#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace fusedres {

// A thread's place in its block seen as [height][width].
struct BlockPlace {
  unsigned x, y, width, height;
};

// A one-dimensional block, `width` threads side by side; width divides its threads.
__device__ __forceinline__ BlockPlace place_in_block(unsigned width) {
  return {threadIdx.x % width, threadIdx.x / width, width, blockDim.x / width};
}

// Combines the values of all threads of a block with the same place.x, as a binary tree over place.y: the order
// depends on the block's shape alone. Called by every thread of the block; the height is a power of two. The result is
// valid at place.y == 0; combine(into, added) adds a value to another.
// scratch: shared memory, [height / 2][width] values; free again on return.
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

// The same in a block of blockDim's own shape.
template <class Value, class Combine>
__device__ __forceinline__ void reduce_rows(Value& value, Value* scratch, const Combine& combine) {
  reduce_rows(value, scratch, combine, BlockPlace{threadIdx.x, threadIdx.y, blockDim.x, blockDim.y});
}

// Bytes of that scratch.
template <class Value>
constexpr size_t reduce_rows_bytes(unsigned block_x, unsigned block_y) {
  return sizeof(Value) * block_x * (block_y / 2);
}

}  // namespace fusedres
