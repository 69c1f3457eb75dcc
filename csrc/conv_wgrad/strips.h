#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "conv_wgrad/blocks.h"

namespace fusedres {

// The pixels of the output in strips: some whole lines of an image, or a part of one line. The pixels of a strip are
// the depth of a product of matrices, in order, with an even number for each line and a multiple of kUnit in all.
//
// What a row of the kernel reads for them are as many lines of the input, of which the packed input has each stride-th
// together (a phase). So it is one run of the packed input too.
struct Strips {
  static constexpr int64_t kPixels = 512;  // of a block, about
  static constexpr int64_t kUnit = 32;

  struct Strip {
    int64_t image, line, lines, column, columns;  // of the output
    int64_t depth;                                // packed pixels of the gradient
    int64_t grad, input;                          // packed pixels before those of this strip, in its block
  };

  ConvolutionMap map;
  int64_t lines, columns;       // of a full strip; every line is packed as `columns` pixels
  int64_t down, across;         // strips of an image
  int64_t more;                 // packed lines of a phase, in addition to those of the strip
  std::vector<int64_t> phases;  // first lines of the phases that a row of the kernel reads
  int64_t strips_of_block;

  explicit Strips(const PixelBlocks& blocks) : map(blocks.map) {
    const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    const auto even = [](int64_t a) { return (a + 1) / 2 * 2; };
    across = ceil_div(blocks.out_width, kPixels);
    columns = even(ceil_div(blocks.out_width, across));
    across = ceil_div(blocks.out_width, columns);
    down = across > 1 ? blocks.out_height : ceil_div(blocks.out_height, std::max<int64_t>(kPixels / columns, 1));
    lines = ceil_div(blocks.out_height, down);
    down = ceil_div(blocks.out_height, lines);
    more = (map.kernel[0] - 1) * map.dilation[0] / map.stride[0];
    for (int64_t row = 0; row < map.kernel[0]; ++row) {
      const int64_t phase = row * map.dilation[0] % map.stride[0];
      if (std::find(phases.begin(), phases.end(), phase) == phases.end()) phases.push_back(phase);
    }
    strips_of_block = std::max<int64_t>(kPixels / depth(lines), 1);
  }

  int64_t depth(int64_t some_lines) const { return (some_lines * columns + kUnit - 1) / kUnit * kUnit; }
  int64_t count() const { return (map.batch * down * across + strips_of_block - 1) / strips_of_block; }
  int64_t packed_input(const Strip& strip) const {
    return static_cast<int64_t>(phases.size()) * (strip.lines + more) * columns;
  }

  // Pixels of a line of the input that some neighbouring columns of the output read, with those between.
  int64_t reach(int64_t some_columns) const {
    return (some_columns - 1) * map.stride[1] + (map.kernel[1] - 1) * map.dilation[1] + 1;
  }

  std::vector<Strip> block(int64_t index) const {
    std::vector<Strip> found;
    const int64_t begin = index * strips_of_block;
    const int64_t end = std::min(map.batch * down * across, begin + strips_of_block);
    int64_t grad = 0, input = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t line = i / across % down * lines, column = i % across * columns;
      const int64_t some_lines = std::min(lines, map.out_size(0) - line);
      const int64_t some_columns = std::min(columns, map.out_size(1) - column);
      const Strip strip{i / across / down, line, some_lines, column, some_columns, depth(some_lines), grad, input};
      grad += strip.depth;
      input += packed_input(strip);
      found.push_back(strip);
    }
    return found;
  }

  // Packed pixels from the first one of a strip to the first one that a row of the kernel reads.
  int64_t shift(const Strip& strip, int64_t kernel_row) const {
    const int64_t line = kernel_row * map.dilation[0];
    const int64_t phase = std::find(phases.begin(), phases.end(), line % map.stride[0]) - phases.begin();
    return (phase * (strip.lines + more) + line / map.stride[0]) * columns;
  }
};

}  // namespace fusedres
