#pragma once

#include <algorithm>
#include <cstdint>

#include "packed_convolution/packed_convolution.h"

namespace fusedres {

// How a convolution's sum over taps and channels is cut into blocks. A block of one panel of weights fits in the second
// cache, and is multiplied by many pixels while it is there. Blocks that fit in the first cache were slower: the sums
// rest in the output more often.
//
// A tap is a position in the kernel. If the input has only a few channels, a tap is a whole row of the kernel instead:
// the pixels that it reads are one run of memory, once the image has its padding.
struct DepthBlocks {
  static constexpr int64_t kDepth = 1024;
  static constexpr int64_t kFewChannels = 16;

  bool row_taps;
  int64_t taps;
  int64_t channels;        // values that one tap reads of a pixel, or of a row of pixels
  int64_t tap_blocks;      // the taps are divided into these,
  int64_t channel_blocks;  // or the channels of each tap into these

  explicit DepthBlocks(const ConvolutionMap& map)
      : row_taps(map.channels < kFewChannels && map.kernel[1] > 1 && map.dilation[1] == 1),
        taps(map.kernel[0] * (row_taps ? 1 : map.kernel[1])),
        channels(map.channels * (row_taps ? map.kernel[1] : 1)) {
    channel_blocks = (channels + kDepth - 1) / kDepth;
    const int64_t taps_per_block = channel_blocks > 1 ? 1 : std::max<int64_t>(kDepth / channels, 1);
    tap_blocks = (taps + taps_per_block - 1) / taps_per_block;
  }

  int64_t depth() const { return taps * channels; }

  struct Block {
    int64_t first_tap, last_tap;  // last: the first one after the block
    int64_t first_channel, last_channel;
    int64_t before;  // depth of the blocks before this one

    int64_t taps() const { return last_tap - first_tap; }
    int64_t channels() const { return last_channel - first_channel; }
    int64_t depth() const { return taps() * channels(); }
  };

  int64_t count() const { return tap_blocks * channel_blocks; }

  Block at(int64_t index) const {
    const int64_t tap = index / channel_blocks, channel = index % channel_blocks;
    Block block{taps * tap / tap_blocks, taps * (tap + 1) / tap_blocks, channels * channel / channel_blocks,
                channels * (channel + 1) / channel_blocks, 0};
    block.before = block.first_tap * channels + block.first_channel * block.taps();
    return block;
  }
};

}  // namespace fusedres
