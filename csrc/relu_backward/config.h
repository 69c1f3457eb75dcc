#pragma once

#include <algorithm>
#include <cstdint>

#include "common/cuda_blocks.h"
#include "common/cuda_device.h"
#include "relu_backward/relu_backward_cuda.h"

// Blocks and grids of relu_backward. The numbers are guesses: no GPU has measured them yet. The order of the sums
// depends only on the sizes.

namespace fusedres {

constexpr int kReluBackwardThreads = 256;

// A block is threads / width rows of `width` vectors of channels.
struct ReluBackwardConfig {
  unsigned threads;
  unsigned width;
  unsigned channel_blocks;  // blocks that cover a row
  unsigned merge_width;     // width of the blocks that merge partials
  unsigned merge_blocks;
};

// vector: values of an activation that a thread loads at once; merge_vector: of a partial.
inline ReluBackwardConfig relu_backward_config(const ReluBackwardParams& p, int vector, int merge_vector,
                                               const CudaDevice& device) {
  const auto blocks = [&p](int64_t channels_a_block) {
    return static_cast<unsigned>((p.channels + channels_a_block - 1) / channels_a_block);
  };
  ReluBackwardConfig config{};
  config.threads = static_cast<unsigned>(std::min(kReluBackwardThreads, device.max_block_threads));
  config.width = block_width((p.channels + vector - 1) / vector, 32);
  config.channel_blocks = blocks(static_cast<int64_t>(config.width) * vector);
  config.merge_width = merge_block_width(p.tiles, config.threads);
  config.merge_blocks = blocks(static_cast<int64_t>(config.merge_width) * merge_vector);
  return config;
}

}  // namespace fusedres
