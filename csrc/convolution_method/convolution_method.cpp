#include "convolution_method/convolution_method.h"

#include <utility>

#include "common/isa.h"
#include "packed_convolution/blocks.h"

namespace fusedres {
namespace {

// With fewer pixels of the output, packing the weight at every call takes longer than it saves.
constexpr int64_t kFewPixels = 48;
constexpr int64_t kFewPixelsBackward = 100;

// On smaller images most taps are outside, and packed_convolution multiplies by their zeros.
bool is_covered(const ConvolutionMap& map) {
  return map.out_size(0) >= map.kernel[0] && map.out_size(1) >= map.kernel[1];
}

bool has_many_pixels(const ConvolutionMap& map, Purpose purpose) {
  if (purpose == Purpose::kFrozen) return true;
  return map.out_pixels() >= (purpose == Purpose::kForward ? kFewPixels : kFewPixelsBackward);
}

// With AVX-512, oneDNN's products are as fast as the processor allows. Winograd's algorithm is faster because it needs
// fewer of them. oneDNN's gradients of 3x3 weights run at half of that speed; those of 1x1 weights do not, but need
// relu(BN(y)) in memory, which conv_wgrad computes on load.
bool is_faster_with_avx512(const ConvolutionMap& map, Purpose purpose) {
  switch (purpose) {
    case Purpose::kFrozen:
    case Purpose::kForward:
      return winograd_is_faster(map, purpose == Purpose::kFrozen);
    case Purpose::kInputGradient:
      return ConvolutionMap::both(map.stride, 1) && winograd_is_faster(turned(map), false);
    case Purpose::kWeightGradient:
      return map.channels >= DepthBlocks::kFewChannels;
  }
  return false;
}

// Whether this package's kernel is faster than oneDNN's in float32.
bool own_is_faster(const ConvolutionMap& map, Purpose purpose) {
  if (current_isa() == Isa::kPortable || !is_covered(map) || !has_many_pixels(map, purpose)) return false;
  return current_isa() == Isa::kAvx2 || is_faster_with_avx512(map, purpose);
}

// The same in bfloat16. With AMX, oneDNN's gradients of weights run at a fraction of the processor's rate.
bool own_is_faster_in_bfloat16(const ConvolutionMap& map, Purpose purpose) {
  return purpose == Purpose::kWeightGradient && has_amx() && map.out_pixels() > 0;
}

// Whether a product of matrices is faster than oneDNN's convolution in bfloat16. It needs no reordered weight, which
// shows if the weight is large and the pixels are few, and with AMX, where products take less time, for most weights.
// oneDNN's gradients of weights are slow.
bool product_is_faster(const ConvolutionMap& map, Purpose purpose) {
  constexpr int64_t kManyRows = 8192, kWeightsARow = 640, kWeightsAGatheredRow = 100, kManyWeights = 128 * 256;
  const int64_t rows = map.out_pixels(), weights = map.channels * map.out_channels;
  if (!multiplies_bfloat16() || !is_covered(map) || rows == 0 || purpose == Purpose::kFrozen) return false;
  if (purpose != Purpose::kWeightGradient) {
    return map.is_pointwise() && weights >= (has_amx() ? kManyWeights : kWeightsARow * rows);
  }
  return map.is_pointwise() ? rows <= kManyRows : weights >= kWeightsAGatheredRow * rows;
}

}  // namespace

Method fastest_method(const ConvolutionMap& map, DType dtype, Purpose purpose) {
  if (dtype == DType::kFloat32 && own_is_faster(map, purpose)) return Method::kOwn;
  if (dtype == DType::kBFloat16 && own_is_faster_in_bfloat16(map, purpose)) return Method::kOwn;
  if (dtype == DType::kBFloat16 && product_is_faster(map, purpose)) return Method::kProduct;
  return Method::kLibrary;
}

bool takes_winograd(const ConvolutionMap& map) {
  return map.is_dense_3x3() && map.channels >= DepthBlocks::kFewChannels;
}

bool winograd_is_faster(const ConvolutionMap& map, bool packed_before) {
  if (!takes_winograd(map) || current_isa() == Isa::kPortable) return false;
  // In products of the weight's channels: nine for a pixel, and for a tile sixteen and some to transform it.
  constexpr int64_t kTile = 18, kPacking = 1200, kStreaming = 100;
  return 9 * map.out_pixels() - kTile * map.out_tiles() > (packed_before ? kStreaming : kPacking);
}

ConvolutionMap turned(const ConvolutionMap& map) {
  ConvolutionMap result = map;
  result.height = map.out_size(0);
  result.width = map.out_size(1);
  std::swap(result.channels, result.out_channels);
  for (int axis = 0; axis < 2; ++axis) {
    result.padding[axis] = map.dilation[axis] * (map.kernel[axis] - 1) - map.padding[axis];
  }
  return result;
}

}  // namespace fusedres
