#pragma once

#include <cstdint>

#include "common/convolution_map.h"

namespace fusedres {

struct PackWeightParams {
  const float* weight;
  WeightStrides strides;
  ConvolutionMap map;  // only the sizes of the weight and the dilation are read
  const float* scale;  // [out_channels], multiplied into the weight; may be null
  float* panels;       // packed_size(map, winograd) elements
  int threads;
  bool winograd;  // for packed_convolution by Winograd's algorithm
};

// The number of elements of a packed weight. It depends on the instruction set.
int64_t packed_size(const ConvolutionMap& map, bool winograd);

// Lays a weight out in the order in which packed_convolution reads it.
void pack_weight(const PackWeightParams& params);

struct PackedConvolutionParams {
  const float* x;  // [batch, height, width, channels]
  ConvolutionMap map;
  const float* panels;    // from pack_weight
  const float* bias;      // [out_channels]
  const float* shortcut;  // like out, and not the same memory; may be null
  bool relu;
  float* out;  // [batch, out height, out width, out_channels]
  int threads;
  bool winograd;  // how the weight was packed
};

// out = relu(conv(x, weight) + bias + shortcut), without the ReLU if `relu` is false.
void packed_convolution(const PackedConvolutionParams& params);

}  // namespace fusedres
