#pragma once

#include <algorithm>
#include <cstdint>

#include "common/cuda_blocks.h"
#include "common/cuda_device.h"

// Blocks and grids of the statistics' kernels. Guesses: no GPU has measured them yet.

namespace fusedres {

constexpr int kBnPartialsThreads = 256;  // of a block
constexpr int kBnPartialsBlocks = 3;     // of a multiprocessor
constexpr int kBnPartialsRows = 4;       // of a thread, under way at once and averaged in registers

// A block is threads / width rows of `width` vectors of channels; tile t is rows t·height to (t + 1)·height and every
// tiles·height-th after them.
struct BnPartialsConfig {
  bool vectorised;  // 16 bytes a load, else one value
  unsigned threads;
  unsigned width;
  unsigned channel_blocks;  // that cover a row
  int64_t tiles;            // as many as run at once
};

template <class T>
BnPartialsConfig bn_partials_config(int64_t rows, int64_t channels, bool aligned, const CudaDevice& device) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  BnPartialsConfig config{};
  config.vectorised = aligned && channels % kVector == 0;
  config.threads = static_cast<unsigned>(std::min(kBnPartialsThreads, device.max_block_threads));
  const int64_t vectors = config.vectorised ? channels / kVector : channels;
  config.width = block_width(vectors, 32);
  config.channel_blocks = static_cast<unsigned>((vectors + config.width - 1) / config.width);
  const int64_t height = config.threads / config.width;
  const int64_t most = std::max<int64_t>(1, device.multiprocessors * kBnPartialsBlocks / config.channel_blocks);
  config.tiles = std::min((rows + height - 1) / height, most);
  return config;
}

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
