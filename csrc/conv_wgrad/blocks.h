#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/convolution_map.h"

namespace fusedres {

// The pixels of the output in blocks, in memory order. What a block reads of the gradient and of the input stays in
// cache while all taps and channels are multiplied.
//
// A tap is a position in the kernel. If the input has only a few channels, a tap is a whole row of the kernel instead:
// the pixels that it reads are one run of the packed input.
struct PixelBlocks {
  static constexpr int64_t kPixels = 256;
  static constexpr int64_t kFewChannels = 4;

  ConvolutionMap map;  // a pointwise convolution as one line of all pixels
  int64_t out_height, out_width, pixels;
  bool row_taps;
  int64_t taps;
  int64_t values;  // that a tap reads of one pixel, or of a row of pixels: the columns of its matrix of sums

  explicit PixelBlocks(const ConvolutionMap& given) : map(given), pixels(given.out_pixels()) {
    if (map.is_pointwise()) {
      map.batch = map.height = 1;
      map.width = pixels;
    }
    out_height = map.out_size(0);
    out_width = map.out_size(1);
    row_taps = map.channels < kFewChannels && map.kernel[1] > 1 && map.dilation[1] == 1;
    taps = map.kernel[0] * (row_taps ? 1 : map.kernel[1]);
    values = map.channels * (row_taps ? map.kernel[1] : 1);
  }

  int64_t count() const { return (pixels + kPixels - 1) / kPixels; }
};

// What one block reads of the input: for each image, some lines from a first column on, between their padding. All
// lines of a block are equally long.
struct BlockLines {
  struct Image {
    int64_t index;
    int64_t first, lines;  // of the input; may lie outside of the image
    int64_t before;        // packed pixels before those of this image
  };

  // Neighbouring pixels of one line of the output.
  struct Run {
    int64_t count;
    int64_t output;       // the first one, counted from the begin of the block
    int64_t input;        // the packed pixel that the first tap reads for it
    int64_t row, column;  // of the first one, in its image
  };

  int64_t begin, end;            // pixels of the output
  int64_t first_column, length;  // of the lines of the input; may begin and end outside of the image
  bool one_line;                 // all pixels are in one line of the output
  int64_t packed;                // number of packed pixels
  std::vector<Image> images;
  std::vector<Run> runs;

  BlockLines(const PixelBlocks& blocks, int64_t block) {
    const ConvolutionMap& map = blocks.map;
    begin = block * PixelBlocks::kPixels;
    end = std::min(blocks.pixels, begin + PixelBlocks::kPixels);
    const int64_t width = blocks.out_width, height = blocks.out_height;
    one_line = begin / width == (end - 1) / width;
    const int64_t first = one_line ? begin % width : 0;
    const int64_t last = one_line ? (end - 1) % width : width - 1;
    first_column = first * map.stride[1] - map.padding[1];
    length = (last - first) * map.stride[1] + (map.kernel[1] - 1) * map.dilation[1] + 1;
    packed = 0;
    for (int64_t pixel = begin; pixel < end;) {
      const int64_t line = pixel / width, index = line / height, row = line % height;
      const int64_t last_row = std::min(height - 1, (end - 1) / width - index * height);
      const int64_t lines = (last_row - row) * map.stride[0] + (map.kernel[0] - 1) * map.dilation[0] + 1;
      images.push_back({index, row * map.stride[0] - map.padding[0], lines, packed});
      for (int64_t y = row; y <= last_row; ++y) {
        const int64_t column = pixel % width, next = std::min(end, (pixel / width + 1) * width);
        const int64_t input = packed + (y - row) * map.stride[0] * length + (column - first) * map.stride[1];
        runs.push_back({next - pixel, pixel - begin, input, y, column});
        pixel = next;
      }
      packed += lines * length;
    }
  }

  // The runs of the pixels for which a tap is inside of the image: what is outside must not meet an infinite gradient.
  std::vector<Run> inside(const PixelBlocks& blocks, int64_t tap) const {
    const ConvolutionMap& map = blocks.map;
    const int64_t line = blocks.row_taps ? tap : tap / map.kernel[1];
    const int64_t place = blocks.row_taps ? 0 : tap % map.kernel[1];
    const int64_t shift = place * map.dilation[1] - map.padding[1], stride = map.stride[1];
    std::vector<Run> found;
    for (Run run : runs) {
      const int64_t y = run.row * map.stride[0] + line * map.dilation[0] - map.padding[0];
      if (y < 0 || y >= map.height) continue;
      if (!blocks.row_taps) {
        const int64_t first = std::max(run.column, shift < 0 ? (-shift + stride - 1) / stride : 0);
        const int64_t room = map.width - shift;  // columns x with x·stride < room are inside
        const int64_t last = std::min(run.column + run.count, room > 0 ? (room + stride - 1) / stride : 0);
        if (first >= last) continue;
        run.output += first - run.column;
        run.input += (first - run.column) * stride;
        run.count = last - first;
      }
      found.push_back(run);
    }
    return found;
  }
};

// How the sums are divided into tasks: by parts of the pixels, out channels and columns.
struct WgradTasks {
  int64_t splits;
  int64_t rows, row_groups;        // out channels of a group
  int64_t columns, column_groups;  // of the sums of one tap

  static constexpr int64_t kSums = 65536;  // of a task, so that they stay in the second cache
  static constexpr int64_t kMost = 256;    // out channels or columns of a task

  // The number of splits must not depend on the threads, or results would.
  static int64_t splits_of(const PixelBlocks& blocks) {
    constexpr int64_t kTasks = 64, kSide = 64, kBlocks = 4;
    const auto groups = [](int64_t size) { return (size + kSide - 1) / kSide; };
    const int64_t wanted = kTasks / (groups(blocks.map.out_channels) * groups(blocks.values));
    return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(blocks.count() / kBlocks, 1));
  }

  // Groups are multiples of a tile's sides, but for the last ones. `sums` is how many there are for an out channel and
  // a column.
  WgradTasks(const PixelBlocks& blocks, int64_t sums, int64_t tile_rows, int64_t tile_columns, int threads)
      : splits(splits_of(blocks)) {
    const auto rounded = [](int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; };
    const auto groups = [](int64_t size, int64_t group) { return (size + group - 1) / group; };
    const int64_t out_channels = blocks.map.out_channels;
    int64_t most_rows = kMost, most_columns = kMost;
    // A packed value of the gradient is read once for each column and tap, one of the input once for each row, and for
    // the taps that reach it.
    const int64_t ratio = blocks.map.stride[0] * blocks.map.stride[1];
    while (most_rows * most_columns * sums > kSums) {
      if (most_rows >= ratio * most_columns && most_rows > 2 * tile_rows)
        most_rows /= 2;
      else if (most_columns > tile_columns)
        most_columns /= 2;
      else
        break;
    }
    for (;;) {
      row_groups = groups(out_channels, most_rows);
      column_groups = groups(blocks.values, most_columns);
      if (splits * row_groups * column_groups >= 4 * threads) break;
      if (most_rows >= most_columns && most_rows > 2 * tile_rows)
        most_rows /= 2;
      else if (most_columns > tile_columns)
        most_columns /= 2;
      else
        break;
    }
    rows = rounded(groups(out_channels, row_groups), tile_rows);
    columns = rounded(groups(blocks.values, column_groups), tile_columns);
    row_groups = groups(out_channels, rows);
    column_groups = groups(blocks.values, columns);
  }

  int64_t groups() const { return row_groups * column_groups; }
  int64_t count() const { return splits * groups(); }
};

// What a task sums: a split, and the first out channel and the first column of its group.
struct WgradTask {
  int64_t split, row, column;

  WgradTask(const WgradTasks& tasks, int64_t task)
      : split(task / tasks.groups()),
        row(task / tasks.column_groups % tasks.row_groups * tasks.rows),
        column(task % tasks.column_groups * tasks.columns) {}
};

}  // namespace fusedres
