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
};

// Of a weight, in elements.
struct WeightStrides {
  int64_t out_channel;
  int64_t channel;
  int64_t row;
  int64_t column;
};

struct PackWeightParams {
  const float* weight;
  WeightStrides strides;
  ConvolutionMap map;  // only the sizes of the weight and the dilation are read
  const float* scale;  // [out_channels], multiplied into the weight; may be null
  float* panels;       // packed_size(map) elements
  int threads;
};

// The number of elements of a packed weight. It depends on the instruction set.
int64_t packed_size(const ConvolutionMap& map);

// Lays a weight out in the order in which packed_convolution reads it.
void pack_weight(const PackWeightParams& params);

// Whether packed_convolution was measured to be faster than oneDNN on processors like this one. With AVX-512 the two
// have not been compared yet.
bool packed_convolution_is_faster();

struct PackedConvolutionParams {
  const float* x;  // [batch, height, width, channels]
  ConvolutionMap map;
  const float* panels;    // from pack_weight
  const float* bias;      // [out_channels]
  const float* shortcut;  // like out, and not the same memory; may be null
  bool relu;
  float* out;  // [batch, out height, out width, out_channels]
  int threads;
};

// out = relu(conv(x, weight) + bias + shortcut), without the ReLU if `relu` is false.
void packed_convolution(const PackedConvolutionParams& params);

}  // namespace fusedres
