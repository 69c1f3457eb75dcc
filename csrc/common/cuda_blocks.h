#pragma once

#include <cstdint>

namespace fusedres {

// The number of threads of a block that stand side by side along `vectors` of channels. It is a power of two and at
// most `most`: the widest one that leaves the fewest threads idle.
inline unsigned block_width(int64_t vectors, unsigned most) {
  unsigned best = 1;
  int64_t fewest = vectors;
  for (unsigned width = 1; width <= most; width *= 2) {
    const int64_t covered = (vectors + width - 1) / width * width;
    const bool less_idle = covered <= fewest || width <= 8;  // narrower blocks would read only parts of a sector
    if (less_idle && width / 2 < vectors) {
      best = width;
      fewest = covered;
    }
  }
  return best;
}

// The number of threads side by side in a block that merges the partials of `tiles` tiles. They read only 64 bytes of a
// row, so that many blocks share the work: each block walks over all tiles. It is wider if there are fewer tiles than
// rows of threads.
inline unsigned merge_block_width(int64_t tiles, unsigned threads) {
  unsigned width = 4;
  while (width < 32 && threads / (2 * width) >= tiles) width *= 2;
  return width;
}

}  // namespace fusedres
