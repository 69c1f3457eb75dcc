#pragma once

#include <cstdint>

#include "common/convolution_map.h"

namespace fusedres {

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

// Whether packed_convolution and conv_wgrad were measured to be faster than oneDNN on processors like this one. With
// AVX-512 they have not been compared yet.
bool own_convolutions_are_faster();

// From how many pixels of the output on that holds where the weight is packed at every call, and for gradients. Below,
// packing takes longer than it saves.
constexpr int64_t kManyPixels = 48;
constexpr int64_t kManyPixelsBackward = 100;

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
