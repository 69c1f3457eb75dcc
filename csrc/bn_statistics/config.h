#pragma once

#include <algorithm>
#include <cstdint>

#include "common/cuda_device.h"

// Blocks and grids of the statistics' kernels. Guesses: no GPU has measured them yet.

namespace fusedres {

struct BnFinalizeConfig {
  bool vectorised;   // 16 bytes a load, else one value
  unsigned block_x;  // vectors of channels
  unsigned block_y;  // tiles side by side
  unsigned grid;
};

// 64 bytes of a row a block: few channels have few blocks, and what a block does alone is walk over the tiles.
inline BnFinalizeConfig bn_finalize_config(int64_t tiles, int64_t channels, int itemsize, bool aligned,
                                           const CudaDevice& device) {
  const int vector = 16 / itemsize;
  BnFinalizeConfig config{};
  config.vectorised = aligned && channels % vector == 0;
  config.block_x = config.vectorised ? 4 : 16;
  const unsigned most = static_cast<unsigned>(std::min(256, device.max_block_threads)) / config.block_x;
  config.block_y = 1;
  while (config.block_y < most && config.block_y < tiles) config.block_y *= 2;
  const int64_t channels_a_block = config.block_x * (config.vectorised ? vector : 1);
  config.grid = static_cast<unsigned>((channels + channels_a_block - 1) / channels_a_block);
  return config;
}

// One channel a thread.
inline unsigned channel_threads(const CudaDevice& device) {
  return static_cast<unsigned>(std::min(128, device.max_block_threads));
}

}  // namespace fusedres
