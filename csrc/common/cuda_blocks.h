#pragma once

#include <cstdint>

namespace fusedres {

// Threads of a block side by side along `vectors` of channels: a power of two, at most `most`; the widest of those that
// cover the channels with the fewest threads idle.
inline unsigned block_width(int64_t vectors, unsigned most) {
  unsigned best = 1;
  int64_t fewest = vectors;
  for (unsigned width = 1; width <= most; width *= 2) {
    const int64_t covered = (vectors + width - 1) / width * width;
    const bool less_idle = covered <= fewest || width <= 8;  // narrower ones would read parts of a sector
    if (less_idle && width / 2 < vectors) {
      best = width;
      fewest = covered;
    }
  }
  return best;
}

// Threads side by side of a block that merges partials of so many tiles: 64 bytes of a row, for what a block does alone
// is walk over the tiles; more where the tiles are fewer than its rows of threads.
inline unsigned merge_block_width(int64_t tiles, unsigned threads) {
  unsigned width = 4;
  while (width < 32 && threads / (2 * width) >= tiles) width *= 2;
  return width;
}

}  // namespace fusedres
