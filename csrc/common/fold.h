#pragma once

#include <cstdint>

namespace fusedres {

// Channels that a kernel computes at once (kLanes of lanes.inc).
constexpr int64_t kBlockChannels = 16;

// How many rows a pass should take for one row of so many times the channels, with vectors of channels repeated: blocks
// of lanes are whole then, and a row has some. With 8 channels the passes of a tail took 5 to 10 times as long as with
// 16, as each block was copied to a buffer and back. Returns 1 where no number of rows does that.
inline int64_t rows_at_once(int64_t rows, int64_t channels, int64_t least_channels) {
  if (channels <= 0 || (channels % kBlockChannels == 0 && channels >= least_channels)) return 1;
  int64_t found = 1;
  for (int64_t count = 1; count <= 4 * kBlockChannels; ++count) {
    if (rows % count != 0 || count * channels % kBlockChannels != 0) continue;
    found = count;
    if (count * channels >= least_channels) break;
  }
  return found;
}

}  // namespace fusedres
