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

// Whether packed_convolution and conv_wgrad were measured to be faster than oneDNN on processors like this one. With
// AVX-512 they have not been compared yet.
bool own_convolutions_are_faster();

// From how many pixels of the output on that holds where the weight is packed at every call, and for gradients. Below,
// packing takes longer than it saves.
constexpr int64_t kManyPixels = 48;
constexpr int64_t kManyPixelsBackward = 100;

// Whether packed_convolution can run a convolution by Winograd's algorithm: 3x3 taps side by side, and not few
// channels.
bool takes_winograd(const ConvolutionMap& map);

// Whether it can, and was measured to be faster so, with a weight that was packed before or is packed in the same call.
bool winograd_is_faster(const ConvolutionMap& map, bool packed_before);

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
