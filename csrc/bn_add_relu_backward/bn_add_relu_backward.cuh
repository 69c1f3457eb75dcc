#pragma once

// Backward of BatchNorm and the ReLU after it in one cooperative launch, for tensors that stay in L2 between the steps.
// The steps, their equations and the order of their sums are those of bn_backward/bn_backward.cuh, block by block. A
// block of this grid does the work of several of those blocks, and the grid waits between the steps. Reads grad, the
// gate and x once from memory and once more from L2; writes dx.

#include <cooperative_groups.h>

#include "bn_backward/bn_backward.cuh"

namespace fusedres {

template <class T, int kVector, int kMergeVector, int kBranches>
__global__ void __launch_bounds__(kBnBackwardThreads, kBnBackwardResident)
    bn_add_relu_backward_kernel(const BnBackwardParams p, const BnBackwardConfig config) {
  const int64_t blocks = p.tiles * config.channel_blocks;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x)
    sum_tile<T, kVector, kBranches>(p, block / config.channel_blocks,
                                    block % config.channel_blocks * config.width * kVector, config.width);
  cooperative_groups::this_grid().sync();  // partials
  for (int64_t block = blockIdx.x; block < config.merge_blocks; block += gridDim.x)
    merge_channels<Arithmetic<T>, kMergeVector, kBranches>(p, block * config.merge_width * kMergeVector,
                                                           config.merge_width);
  cooperative_groups::this_grid().sync();  // coefficients
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t first = block / config.channel_blocks * p.tile_rows;
    apply_rows<T, kVector, kBranches>(p, first, min(first + p.tile_rows, p.rows), blockDim.x / config.width,
                                      block % config.channel_blocks * config.width * kVector, config.width);
  }
}

}  // namespace fusedres
