#pragma once

#include "aten/aten.h"
#include "bn_add_relu/bn_add_relu.h"
#include "bn_statistics/bn_statistics.h"
#include "residual_block/convolution.h"
#include "residual_block/launch.h"
#include "residual_block/residual_block.h"

// What the passes of training and of inference share: BatchNorm's state, the projection, the tail.
namespace fusedres {

// Rounds the convolutions' weights to the dtype of x.
inline void round_weights(const aten::Tensor& x, std::vector<UnitTensors>& tensors) {
  for (UnitTensors& unit : tensors) unit.conv_weight = aten::in_dtype(std::move(unit.conv_weight), x.torch_dtype());
}

// The BatchNorm of a unit, without its data. It uses batch statistics, or the running statistics as constants.
inline BnStatisticsParams norm_params(DType dtype, const ConvBn& unit, const UnitTensors& tensors,
                                      const aten::Tensor& state, int threads) {
  BnStatisticsParams params{};
  params.dtype = dtype;
  params.channels = tensors.conv_weight.sizes()[0];
  params.state = state.data();
  params.norm.weight = tensors.weight.vector();
  params.norm.bias = tensors.bias.vector();
  params.norm.eps = unit.eps;
  params.threads = threads;
  if (unit.update || !unit.batch_statistics) {
    params.norm.running_mean = tensors.running_mean.vector();
    params.norm.running_var = tensors.running_var.vector();
  }
  if (unit.batch_statistics && unit.update) {
    params.norm.num_batches_tracked = static_cast<int64_t*>(tensors.num_batches_tracked.data());
  }
  params.norm.cumulative = unit.cumulative;
  params.norm.momentum = unit.momentum;
  return params;
}

inline aten::Tensor empty_state(DType dtype, const UnitTensors& tensors) {
  return aten::empty({4, tensors.conv_weight.sizes()[0]}, aten::torch_dtype(state_dtype(dtype)));
}

// Returns the (4, C) state of a unit's BatchNorm, computed from y or from the running statistics.
inline aten::Tensor unit_state(const aten::Tensor* y, DType dtype, const ConvBn& unit, const UnitTensors& tensors,
                               int threads) {
  aten::Tensor state = empty_state(dtype, tensors);
  BnStatisticsParams params = norm_params(dtype, unit, tensors, state, threads);
  if (!unit.batch_statistics) {
    bn_frozen(params);
    return state;
  }
  params.x = y->data();
  params.rows = y->shape().rows();
  bn_statistics(params);
  return state;
}

// Returns the raw convolution of a projection. A strided 1x1 convolution reads every stride-th pixel: these are
// extracted first.
inline aten::Tensor project(const aten::Tensor& x, const ConvBn& unit, const aten::Tensor& weight, int threads) {
  if (!subsamples(unit)) return convolution(x, weight, unit.convolution, threads);
  const aten::Tensor source = subsampled(x, unit.convolution.stride[0], threads);
  return convolution(source, weight, dense(unit.convolution), threads);
}

struct Shortcut {
  const aten::Tensor* tensor;
  const aten::Tensor* state;  // null if it is not normalised
  int64_t stride;
};

inline void tail(const aten::Tensor& y, const aten::Tensor& state, const Shortcut& shortcut, void* out, void* mask,
                 int threads) {
  const aten::Shape source = shortcut.tensor->shape();
  bn_add_relu({y.data(),
               y.dtype(),
               y.shape().channels,
               state.data(),
               shortcut.tensor->data(),
               {source.batch, source.height, source.width, shortcut.stride},
               source.channels,
               shortcut.state == nullptr ? nullptr : shortcut.state->data(),
               out,
               static_cast<uint8_t*>(mask),
               threads});
}

}  // namespace fusedres
