#pragma once

// The gradient that passes a ReLU, and its column sums.
//
//     d = grad where NOT (out <= 0), else 0      Σd per channel
//
// Activations are [rows, channels]; a block is seen as rows of `width` vectors of channels, 16 bytes each.
//
// relu_backward_kernel  A block owns a tile of rows: each thread sums its channels of every height-th row, then the
//                       threads are summed as a tree. Reads grad and the gate; writes d and a partial for each tile.
// merge_sums_kernel     A block merges its channels of all partials in a fixed order. Reads them; writes the sums.

#include "common/cuda_gate.cuh"
#include "common/cuda_shared.cuh"
#include "common/cuda_sums.cuh"
#include "relu_backward/config.h"
#include "relu_backward/relu_backward_cuda.h"

namespace fusedres {

template <class T, int kVector, GateKind kKind>
__global__ void __launch_bounds__(kReluBackwardThreads)
    relu_backward_kernel(const ReluBackwardParams p, const ReluBackwardConfig config) {
  using A = Arithmetic<T>;
  const BlockPlace place = place_in_block(config.width);
  const int64_t tile = blockIdx.x / config.channel_blocks;
  const int64_t c = (static_cast<int64_t>(blockIdx.x % config.channel_blocks) * config.width + place.x) * kVector;
  const bool inside = c < p.channels;
  auto sums = no_sums<A, kVector, 1>();
  if (inside) {
    const int64_t first = tile * p.tile_rows;
    const int64_t last = min(first + p.tile_rows, p.rows);
    for_rows<4>(first + place.y, last, place.height, [&](auto count, int64_t row) {
      constexpr int kRows = decltype(count)::value;
      Lanes<A, kVector> d[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        d[r] = load<kVector>(static_cast<const T*>(p.grad) + element(row + r * place.height, p.channels, c));
#pragma unroll
      for (int r = 0; r < kRows; ++r) d[r] = gated<kKind, T>(p.gate, row + r * place.height, p.channels, c, d[r]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        store(static_cast<T*>(p.d) + element(row + r * place.height, p.channels, c), d[r]);
#pragma unroll
        for (int i = 0; i < kVector; ++i) sums.of[0][i] += d[r][i];
      }
    });
  }

  reduce_rows(sums, dynamic_shared<Sums<A, kVector, 1>>(), add<A, kVector, 1>, place);

  if (inside && place.y == 0) store_sums(static_cast<A*>(p.partials) + tile * p.channels, p.channels, c, sums);
}

template <class A, int kVector>
__global__ void __launch_bounds__(kReluBackwardThreads)
    merge_sums_kernel(const ReluBackwardParams p, const ReluBackwardConfig config) {
  const BlockPlace place = place_in_block(config.merge_width);
  const int64_t c = (static_cast<int64_t>(blockIdx.x) * config.merge_width + place.x) * kVector;
  const auto sums = merge_partials<kVector>(static_cast<const A*>(p.partials), p.tiles, p.channels, c, place,
                                            dynamic_shared<Sums<A, kVector, 1>>());
  if (c < p.channels && place.y == 0) store_sums(static_cast<A*>(p.sums), p.channels, c, sums);
}

}  // namespace fusedres
