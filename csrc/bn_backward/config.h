#pragma once

#include <algorithm>
#include <cstdint>

#include "bn_backward/bn_backward_cuda.h"
#include "common/cuda_blocks.h"
#include "common/cuda_device.h"

// Blocks and grids of BatchNorm's backward. The numbers are guesses: no GPU has measured them yet. The order of a sum
// depends on the shape of the block and on the tiles. Both depend only on the sizes, so that every device gives the
// same bits.

namespace fusedres {

constexpr int kBnBackwardThreads = 256;
constexpr int kBnBackwardResident = 2;  // at least so many blocks per multiprocessor: 128 registers per thread

// A block is threads / width rows of `width` vectors of channels.
struct BnBackwardConfig {
  unsigned threads;
  unsigned width;
  unsigned channel_blocks;  // blocks that cover a row
  unsigned apply_blocks;    // rows of blocks of the elementwise launch
  unsigned merge_width;     // width of the blocks that merge partials
  unsigned merge_blocks;
};

// vector: values of an activation that a thread loads at once; merge_vector: of a partial.
inline BnBackwardConfig bn_backward_config(const BnBackwardParams& p, int vector, int merge_vector,
                                           const CudaDevice& device) {
  const auto blocks = [&p](int64_t channels_a_block) {
    return static_cast<unsigned>((p.channels + channels_a_block - 1) / channels_a_block);
  };
  BnBackwardConfig config{};
  config.threads = static_cast<unsigned>(std::min(kBnBackwardThreads, device.max_block_threads));
  config.width = block_width((p.channels + vector - 1) / vector, 32);
  config.channel_blocks = blocks(static_cast<int64_t>(config.width) * vector);
  // Eight blocks per multiprocessor are more than it runs at once, so that none is idle while the last blocks run.
  const int64_t wanted = std::max<int64_t>(1, 8ll * device.multiprocessors / config.channel_blocks);
  const int64_t height = config.threads / config.width;
  config.apply_blocks = static_cast<unsigned>(std::min(wanted, (p.rows + height - 1) / height));
  config.merge_width = merge_block_width(p.tiles, config.threads);
  config.merge_blocks = blocks(static_cast<int64_t>(config.merge_width) * merge_vector);
  return config;
}

}  // namespace fusedres
