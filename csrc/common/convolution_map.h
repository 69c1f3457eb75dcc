#pragma once

#include <cstdint>

namespace fusedres {

// A convolution of a dense NHWC activation, without groups.
struct ConvolutionMap {
  int64_t batch;
  int64_t height;
  int64_t width;
  int64_t channels;
  int64_t out_channels;
  int64_t kernel[2];
  int64_t stride[2];
  int64_t padding[2];
  int64_t dilation[2];

  int64_t out_size(int axis) const {
    const int64_t size = axis == 0 ? height : width;
    return (size + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) / stride[axis] + 1;
  }

  int64_t out_pixels() const { return batch * out_size(0) * out_size(1); }

  // Whether each pixel of the output reads the same pixel of the input and no other.
  bool is_pointwise() const { return both(kernel, 1) && both(stride, 1) && both(padding, 0); }

  // Whether it has 3x3 taps side by side, as Winograd's algorithms need them.
  bool is_dense_3x3() const { return both(kernel, 3) && both(stride, 1) && both(dilation, 1); }

  // The number of 2x2 tiles of the output.
  int64_t out_tiles() const { return batch * ((out_size(0) + 1) / 2) * ((out_size(1) + 1) / 2); }

  // Whether a pair of numbers has this value for both axes.
  static bool both(const int64_t (&pair)[2], int64_t value) { return pair[0] == value && pair[1] == value; }
};

// The products of Winograd's algorithms for a tile of 4x4 pixels and a channel, for 3x3 taps.
constexpr int kWinogradPositions = 16;

// Of a weight, in elements.
struct WeightStrides {
  int64_t out_channel;
  int64_t channel;
  int64_t row;
  int64_t column;
};

}  // namespace fusedres
