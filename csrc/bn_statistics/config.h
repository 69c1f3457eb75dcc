#pragma once

#include <algorithm>
#include <cstdint>

#include "common/cuda_blocks.h"
#include "common/cuda_device.h"

// Blocks and grids of the kernels for statistics. The numbers are guesses: no GPU has measured them yet.

namespace fusedres {

constexpr int kBnPartialsThreads = 256;  // of a block
constexpr int kBnPartialsBlocks = 3;     // blocks per multiprocessor
constexpr int kBnPartialsRows = 4;       // rows that a thread loads at once and averages in registers

// A block is threads / width rows of `width` vectors of channels. With height = threads / width, tile t is rows
// t·height to (t + 1)·height and every tiles·height-th row after each of them.
struct BnPartialsConfig {
  bool vectorised;  // 16 bytes per load, else one value
  unsigned threads;
  unsigned width;
  unsigned channel_blocks;  // blocks that cover a row
  int64_t tiles;            // as many as the device runs at once
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
  bool vectorised;   // 16 bytes per load, else one value
  unsigned block_x;  // vectors of channels
  unsigned block_y;  // tiles side by side
  unsigned grid;
};

// A block reads only 64 bytes of a row, so that many blocks share the work: each block walks over all tiles.
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

// One thread per channel.
inline unsigned channel_threads(const CudaDevice& device) {
  return static_cast<unsigned>(std::min(128, device.max_block_threads));
}

}  // namespace fusedres
