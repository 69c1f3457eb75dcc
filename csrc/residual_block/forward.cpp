#include <algorithm>
#include <utility>

#include "bn_add_relu/bn_add_relu.h"
#include "bn_statistics/bn_statistics.h"
#include "common/check.h"
#include "residual_block/launch.h"
#include "residual_block/residual_block.h"

namespace fusedres {
namespace {

using aten::Shape;
using aten::Tensor;

// The (4, C) state of a unit's BatchNorm: from y, or from the running statistics.
Tensor unit_state(const Tensor* y, DType dtype, const ConvBn& unit, const UnitTensors& tensors, int threads) {
  const int64_t channels = tensors.conv_weight.sizes()[0];
  Tensor state = aten::empty({4, channels}, aten::torch_dtype(state_dtype(dtype)));
  BnStatisticsParams params{};
  params.dtype = dtype;
  params.channels = channels;
  params.state = state.data();
  params.weight = tensors.weight.vector();
  params.bias = tensors.bias.vector();
  params.eps = unit.eps;
  params.threads = threads;
  if (unit.update || !unit.batch_statistics) {
    params.running_mean = tensors.running_mean.vector();
    params.running_var = tensors.running_var.vector();
  }
  if (!unit.batch_statistics) {
    bn_frozen(params);
    return state;
  }
  if (unit.update) params.num_batches_tracked = static_cast<int64_t*>(tensors.num_batches_tracked.data());
  params.x = y->data();
  params.rows = y->shape().rows();
  params.cumulative = unit.cumulative;
  params.momentum = unit.momentum;
  bn_statistics(params);
  return state;
}

struct Shortcut {
  const Tensor* tensor;
  const Tensor* state;  // null where it is not normalised
  int64_t stride;
};

void tail(const Tensor& y, const Tensor& state, const Shortcut& shortcut, void* out, void* mask, int threads) {
  const Shape source = shortcut.tensor->shape();
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

// The raw convolution of a projection. A strided 1x1 reads every stride-th pixel: taken out before.
Tensor project(const Tensor& x, const ConvBn& unit, const Tensor& weight, int threads) {
  if (!subsamples(unit)) return aten::convolution(x, weight, unit.convolution);
  const Tensor source = subsampled(x, unit.convolution.stride[0], threads);
  return aten::convolution(source, weight, dense(unit.convolution));
}

// The block on some images, into out where given.
Tensor infer(const Tensor& x, const ResidualBlock& block, const std::vector<UnitTensors>& tensors,
             const std::vector<Tensor>& states, const Tensor* out) {
  const size_t last = block.last();
  Tensor h;
  for (size_t index = 0; index <= last; ++index) {
    h = aten::convolution(index == 0 ? x : h, tensors[index].conv_weight, block.units[index].convolution);
    if (index < last) bn_relu_(h, states[index], block.threads);
  }
  Tensor projected;
  Shortcut shortcut{&x, nullptr, block.pad_stride};
  if (block.projection) {
    projected = project(x, block.units.back(), tensors.back().conv_weight, block.threads);
    shortcut = {&projected, &states.back(), 1};
  }
  tail(h, states[last], shortcut, out == nullptr ? h.data() : out->data(), nullptr, block.threads);
  return h;
}

}  // namespace

bool serves(const Tensor& x, const std::vector<UnitTensors>& tensors) {
  if (!x.has_dtype() || !x.is_channels_last()) return false;
  for (const UnitTensors& unit : tensors) {
    if (unit.conv_weight.torch_dtype() != x.torch_dtype()) return false;
  }
  return true;
}

ResidualBlockForward residual_block_forward(const Tensor& x, const ResidualBlock& block,
                                            const std::vector<UnitTensors>& tensors) {
  const DType dtype = x.dtype();
  const size_t last = block.last();
  ResidualBlockForward result;
  Tensor h;
  for (size_t index = 0; index <= last; ++index) {
    const ConvBn& unit = block.units[index];
    Tensor y = aten::convolution(index == 0 ? x : h, tensors[index].conv_weight, unit.convolution);
    Tensor state = unit_state(&y, dtype, unit, tensors[index], block.threads);
    h = index < last ? bn_relu_of(y, state, std::move(h), block.threads) : Tensor();
    result.outputs.push_back(std::move(y));
    result.states.push_back(std::move(state));
  }
  Shortcut shortcut{&x, nullptr, block.pad_stride};
  if (block.projection) {
    const ConvBn& unit = block.units.back();
    Tensor y = project(x, unit, tensors.back().conv_weight, block.threads);
    result.states.push_back(unit_state(&y, dtype, unit, tensors.back(), block.threads));
    result.outputs.push_back(std::move(y));
    shortcut = {&result.outputs.back(), &result.states.back(), 1};
  }
  const Tensor& y = result.outputs[last];
  const Shape shape = y.shape();
  result.out = aten::empty_channels_last(shape, y.torch_dtype());
  result.mask = aten::empty({shape.batch, shape.height, shape.width, (shape.channels + 7) / 8}, aten::torch_uint8());
  tail(y, result.states[last], shortcut, result.out.data(), result.mask.data(), block.threads);
  return result;
}

Tensor residual_block_infer(const Tensor& x, const ResidualBlock& block, const std::vector<UnitTensors>& tensors,
                            int64_t images_at_a_time) {
  for (const ConvBn& unit : block.units) {
    require(!unit.batch_statistics, "residual_block_infer", "batch statistics");
  }
  std::vector<Tensor> states;
  for (size_t index = 0; index < block.units.size(); ++index) {
    states.push_back(unit_state(nullptr, x.dtype(), block.units[index], tensors[index], block.threads));
  }
  const int64_t batch = x.shape().batch;
  if (images_at_a_time >= batch) return infer(x, block, tensors, states, nullptr);
  Tensor out;
  for (int64_t begin = 0; begin < batch; begin += images_at_a_time) {
    const int64_t count = std::min(images_at_a_time, batch - begin);
    const Tensor part = aten::images(x, begin, count);
    if (begin == 0) {
      // The shape of the result is known behind the first part.
      const Tensor first = infer(part, block, tensors, states, nullptr);
      Shape shape = first.shape();
      shape.batch = batch;
      out = aten::empty_channels_last(shape, first.torch_dtype());
      aten::copy(aten::images(out, 0, count), first);
      continue;
    }
    const Tensor target = aten::images(out, begin, count);
    infer(part, block, tensors, states, &target);
  }
  return out;
}

}  // namespace fusedres
