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

}  // namespace fusedres
