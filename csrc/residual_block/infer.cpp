#include <algorithm>
#include <vector>

#include "common/check.h"
#include "residual_block/convolution.h"
#include "residual_block/residual_block.h"
#include "residual_block/units.h"

namespace fusedres {
namespace {

using aten::Shape;
using aten::Tensor;

// Runs the block on some images with a pass after each convolution, and writes the result to out if it is given.
Tensor infer_in_passes(const Tensor& x, const ResidualBlock& block, const std::vector<UnitTensors>& tensors,
                       const std::vector<Tensor>& states, const Tensor* out) {
  const size_t last = block.last();
  Tensor h;
  for (size_t index = 0; index <= last; ++index) {
    h = convolution(index == 0 ? x : h, tensors[index].conv_weight, block.units[index].convolution, block.threads);
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

// A unit with the scale of its BatchNorm in its packed weight.
struct PackedUnit {
  Panels panels;
  const float* shift;
};

PackedUnit pack_unit(const ConvBn& unit, const UnitTensors& tensors, const Shape& input, const Tensor& state,
                     int threads) {
  const float* scale = static_cast<const float*>(state.data()) + 2 * state.sizes()[1];
  return {pack(tensors.conv_weight, unit.convolution, input, scale, threads), scale + state.sizes()[1]};
}

// Does the same as infer_in_passes with this package's convolutions.
Tensor infer_packed(const Tensor& x, const ResidualBlock& block, const std::vector<PackedUnit>& units,
                    const Tensor* out) {
  const size_t last = block.last();
  const int threads = block.threads;
  Tensor h;
  for (size_t index = 0; index < last; ++index) {
    h = convolution(index == 0 ? x : h, units[index].panels, {units[index].shift, nullptr, true}, threads);
  }
  const Tensor& input = last == 0 ? x : h;
  const PackedUnit& end = units[last];
  if (block.projection) {
    const Tensor projected = convolution(x, units.back().panels, {units.back().shift}, threads);
    return convolution(input, end.panels, {end.shift, &projected, true, out}, threads);
  }
  const int64_t channels = end.panels.map.out_channels;
  if (block.pad_stride == 1 && x.shape().channels == channels) {
    return convolution(input, end.panels, {end.shift, &x, true, out}, threads);
  }
  // A zero-padded shortcut is a pass of its own.
  Tensor y = convolution(input, end.panels, {end.shift}, threads);
  const Tensor identity = aten::empty({4, channels}, y.torch_dtype());
  auto* rows = static_cast<float*>(identity.data());
  std::fill_n(rows, 4 * channels, 0.0f);
  std::fill_n(rows + channels, 2 * channels, 1.0f);
  tail(y, identity, {&x, nullptr, block.pad_stride}, out == nullptr ? y.data() : out->data(), nullptr, threads);
  return y;
}

// The shapes of the units' inputs.
std::vector<Shape> unit_inputs(const Shape& x, const ResidualBlock& block, const std::vector<UnitTensors>& tensors) {
  std::vector<Shape> inputs;
  Shape shape = x;
  for (size_t index = 0; index < block.units.size(); ++index) {
    inputs.push_back(index > block.last() ? x : shape);
    shape = convolved_shape(inputs.back(), tensors[index].conv_weight, block.units[index].convolution);
  }
  return inputs;
}

bool packs(const std::vector<Shape>& inputs, const ResidualBlock& block, const std::vector<UnitTensors>& tensors) {
  for (size_t index = 0; index < block.units.size(); ++index) {
    const Tensor& weight = tensors[index].conv_weight;
    const aten::ConvolutionParams& params = block.units[index].convolution;
    if (!prefers_own(weight, params, convolved_shape(inputs[index], weight, params), kManyPixels)) return false;
  }
  return true;
}

}  // namespace

Tensor residual_block_infer(const Tensor& x, const ResidualBlock& block, const std::vector<UnitTensors>& tensors,
                            int64_t images_at_a_time) {
  for (const ConvBn& unit : block.units) {
    require(!unit.batch_statistics, "residual_block_infer", "batch statistics are not supported");
  }
  std::vector<Tensor> states;
  for (size_t index = 0; index < block.units.size(); ++index) {
    states.push_back(unit_state(nullptr, x.dtype(), block.units[index], tensors[index], block.threads));
  }
  std::vector<PackedUnit> units;
  if (packs(unit_inputs(x.shape(), block, tensors), block, tensors)) {
    Shape part = x.shape();
    part.batch = std::min(part.batch, images_at_a_time);
    const std::vector<Shape> inputs = unit_inputs(part, block, tensors);
    for (size_t index = 0; index < block.units.size(); ++index) {
      units.push_back(pack_unit(block.units[index], tensors[index], inputs[index], states[index], block.threads));
    }
  }
  const auto infer = [&](const Tensor& part, const Tensor* out) {
    return units.empty() ? infer_in_passes(part, block, tensors, states, out) : infer_packed(part, block, units, out);
  };
  const int64_t batch = x.shape().batch;
  if (images_at_a_time >= batch) return infer(x, nullptr);
  Tensor out;
  for (int64_t begin = 0; begin < batch; begin += images_at_a_time) {
    const int64_t count = std::min(images_at_a_time, batch - begin);
    const Tensor part = aten::images(x, begin, count);
    if (begin == 0) {
      // The shape of the result is known after the first part.
      const Tensor first = infer(part, nullptr);
      Shape shape = first.shape();
      shape.batch = batch;
      out = aten::empty_channels_last(shape, first.torch_dtype());
      aten::copy(aten::images(out, 0, count), first);
      continue;
    }
    const Tensor target = aten::images(out, begin, count);
    infer(part, &target);
  }
  return out;
}

}  // namespace fusedres
