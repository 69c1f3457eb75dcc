#pragma once

#include <algorithm>
#include <cstdint>

#include "common/cuda_device.h"

// Tiles and grids of the Gram matrix. The numbers are guesses: no GPU has measured them yet.

namespace fusedres {

struct GramTilesConfig {
  bool vectorised;  // 16 bytes per load, else one value
  int tile;         // channels along one side of a block's tile of G; a block has twice as many threads
  unsigned panels;  // column blocks of x that a block may hold
  int64_t grid;
};

// The number of tiles on and above the diagonal.
constexpr int64_t gram_tile_pairs(int64_t channels, int tile) {
  const int64_t across = (channels + tile - 1) / tile;
  return across * (across + 1) / 2;
}

// Wide tiles read x less often. They do not pay without tensor cores, as arithmetic takes most of the time then.
inline GramTilesConfig gram_tiles_config(int64_t channels, int64_t splits, int vector, bool aligned,
                                         bool tensor_cores) {
  GramTilesConfig config{};
  config.vectorised = aligned && channels % vector == 0;
  config.tile = config.vectorised && tensor_cores && channels > 64 ? 128 : 64;
  config.panels = channels > config.tile ? 2 : 1;
  config.grid = splits * gram_tile_pairs(channels, config.tile);
  return config;
}

struct GramFinalizeConfig {
  bool vectorised;   // 16 bytes per load, else one value
  unsigned block_x;  // vectors of elements
  unsigned block_y;  // splits side by side
  unsigned grid;
};

inline GramFinalizeConfig gram_finalize_config(int64_t channels, int64_t splits, int vector, bool aligned,
                                               const CudaDevice& device) {
  GramFinalizeConfig config{};
  config.vectorised = aligned && channels % vector == 0;
  config.block_x = 8;
  const unsigned most = static_cast<unsigned>(std::min(256, device.max_block_threads)) / config.block_x;
  config.block_y = 1;
  while (config.block_y < most && config.block_y < splits) config.block_y *= 2;
  const int64_t elements_a_block = config.block_x * (config.vectorised ? vector : 1);
  config.grid = static_cast<unsigned>(((channels + 1) * channels + elements_a_block - 1) / elements_a_block);
  return config;
}

}  // namespace fusedres
