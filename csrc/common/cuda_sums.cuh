#pragma once

#include <cstdint>

#include "common/cuda_index.cuh"
#include "common/cuda_reduce.cuh"
#include "common/cuda_vector.cuh"

namespace fusedres {

// kSums sums for each of kVector channels.
template <class A, int kVector, int kSums>
struct Sums {
  Lanes<A, kVector> of[kSums];
};

template <class A, int kVector, int kSums>
__device__ __forceinline__ Sums<A, kVector, kSums> no_sums() {
  Sums<A, kVector, kSums> none;
#pragma unroll
  for (int s = 0; s < kSums; ++s) none.of[s] = {};
  return none;
}

template <class A, int kVector, int kSums>
__device__ __forceinline__ void add(Sums<A, kVector, kSums>& into, const Sums<A, kVector, kSums>& added) {
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) into.of[s][i] += added.of[s][i];
  }
}

// Stores sums as [kSums][channels]: row s holds sum s of every channel.
template <class A, int kVector, int kSums>
__device__ __forceinline__ void store_sums(A* target, int64_t channels, int64_t c,
                                           const Sums<A, kVector, kSums>& sums) {
#pragma unroll
  for (int s = 0; s < kSums; ++s) store(target + s * channels + c, sums.of[s]);
}

// The second stage of a sum over rows. The whole block sums the partials, [tiles][kSums][channels], of its channels
// from c on: thread row y sums tiles y, y + height, …, then the thread rows are summed as a tree. The result is valid
// at place.y == 0. c may be outside the channels.
template <int kVector, int kSums, class A>
__device__ __forceinline__ Sums<A, kVector, kSums> merge_partials(const A* partials, int64_t tiles, int64_t channels,
                                                                  int64_t c, const BlockPlace& place,
                                                                  Sums<A, kVector, kSums>* scratch) {
  auto sums = no_sums<A, kVector, kSums>();
  if (c < channels) {
#pragma unroll 4
    for (int64_t tile = place.y; tile < tiles; tile += place.height) {
      Sums<A, kVector, kSums> added;
#pragma unroll
      for (int s = 0; s < kSums; ++s) added.of[s] = load<kVector>(partials + (tile * kSums + s) * channels + c);
      add(sums, added);
    }
  }
  reduce_rows(sums, scratch, add<A, kVector, kSums>, place);
  return sums;
}

}  // namespace fusedres
