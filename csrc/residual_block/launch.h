#pragma once

#include "aten/aten.h"
#include "bn_relu/bn_relu.h"
#include "residual_block/residual_block.h"

// Launches that the forward and the backward passes share.
namespace fusedres {

inline DType state_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// Whether a projection's input is subsampled before a dense 1x1 convolution.
inline bool subsamples(const ConvBn& unit) {
  return unit.pixelwise && (unit.convolution.stride[0] != 1 || unit.convolution.stride[1] != 1);
}

inline aten::ConvolutionParams dense(aten::ConvolutionParams params) {
  params.stride[0] = params.stride[1] = 1;
  return params;
}

// The shape of a convolution's output.
inline aten::Shape convolved_shape(const aten::Shape& x, const aten::Tensor& weight,
                                   const aten::ConvolutionParams& params) {
  const int64_t* kernel = weight.sizes();
  const int64_t in[2] = {x.height, x.width};
  int64_t out[2];
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t covered = params.dilation[axis] * (kernel[2 + axis] - 1) + 1;
    out[axis] = (in[axis] + 2 * params.padding[axis] - covered) / params.stride[axis] + 1;
  }
  return {x.batch, kernel[0], out[0], out[1]};
}

inline aten::Shape subsampled_shape(const aten::Tensor& x, int64_t stride) {
  const aten::Shape s = x.shape();
  return {s.batch, s.channels, (s.height + stride - 1) / stride, (s.width + stride - 1) / stride};
}

// Computes relu(BN(x)) - pivot for every stride-th pixel. Without a state BN and ReLU are left out.
inline void bn_relu_into(const aten::Tensor& x, const aten::Tensor* state, const aten::Tensor* pivot, int64_t stride,
                         void* out, int threads) {
  const aten::Shape s = x.shape();
  bn_relu({x.data(),
           x.dtype(),
           {s.batch, s.height, s.width, stride},
           s.channels,
           state == nullptr ? nullptr : state->data(),
           pivot == nullptr ? nullptr : pivot->data(),
           out,
           threads});
}

// Returns relu(BN(x)), in the memory of `room` if that has the shape of x.
inline aten::Tensor bn_relu_of(const aten::Tensor& x, const aten::Tensor& state, aten::Tensor room, int threads) {
  const aten::Shape s = x.shape();
  if (!room.defined() || !(room.shape() == s)) room = aten::Tensor();
  if (!room.defined()) room = aten::empty_like(x);
  bn_relu_into(x, &state, nullptr, 1, room.data(), threads);
  return room;
}

// Returns every stride-th pixel of x.
inline aten::Tensor subsampled(const aten::Tensor& x, int64_t stride, int threads) {
  aten::Tensor out = aten::empty_channels_last(subsampled_shape(x, stride), x.torch_dtype());
  bn_relu_into(x, nullptr, nullptr, stride, out.data(), threads);
  return out;
}

inline void bn_relu_(const aten::Tensor& x, const aten::Tensor& state, int threads) {
  bn_relu_into(x, &state, nullptr, 1, x.data(), threads);
}

}  // namespace fusedres
