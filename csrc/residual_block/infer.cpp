#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "common/check.h"
#include "residual_block/convolution.h"
#include "residual_block/residual_block.h"
#include "residual_block/units.h"

namespace fusedres {
namespace {

using aten::Shape;
using aten::Tensor;

// A convolution and its BatchNorm.
struct Unit {
  Tensor state;
  // With this package's convolution: the scale is in the packed weight, and the shift is added as the sums are stored.
  std::optional<Panels> panels;

  const float* shift() const { return static_cast<const float*>(state.data()) + 3 * state.sizes()[1]; }
};

// The tail of a raw convolution y with its state, in out if it is given, else in y.
Tensor finish(Tensor y, const Tensor& state, const Shortcut& shortcut, const Tensor* out, int threads) {
  tail(y, state, shortcut, out == nullptr ? y.data() : out->data(), nullptr, threads);
  return y;
}

Tensor identity_state(const Tensor& y) {
  const int64_t channels = y.shape().channels;
  Tensor state = aten::empty({4, channels}, y.torch_dtype());
  auto* rows = static_cast<float*>(state.data());
  std::fill_n(rows, 4 * channels, 0.0f);
  std::fill_n(rows + channels, 2 * channels, 1.0f);
  return state;
}

// Runs the last convolution, the projection and the tail. The result goes to out if it is given.
Tensor end_block(const Tensor& x, const Tensor& h, const ResidualBlock& block, const std::vector<UnitTensors>& tensors,
                 const std::vector<Unit>& units, const Tensor* out) {
  const int threads = block.threads;
  const Unit& last = units[block.last()];
  if (!last.panels) {
    Tensor y = convolution(h, tensors[block.last()].conv_weight, block.units[block.last()].convolution, threads);
    if (!block.projection) return finish(std::move(y), last.state, {&x, nullptr, block.pad_stride}, out, threads);
    const Tensor projected = project(x, block.units.back(), tensors.back().conv_weight, threads);
    return finish(std::move(y), last.state, {&projected, &units.back().state, 1}, out, threads);
  }
  if (block.projection) {
    const Tensor projected = convolution(x, *units.back().panels, {units.back().shift()}, threads);
    return convolution(h, *last.panels, {last.shift(), &projected, true, out}, threads);
  }
  if (block.pad_stride == 1 && x.shape().channels == last.panels->map.out_channels) {
    return convolution(h, *last.panels, {last.shift(), &x, true, out}, threads);
  }
  Tensor y = convolution(h, *last.panels, {last.shift()}, threads);
  const Tensor identity = identity_state(y);
  return finish(std::move(y), identity, {&x, nullptr, block.pad_stride}, out, threads);
}

// Runs the block on some images, and writes the result to out if it is given.
Tensor infer(const Tensor& x, const ResidualBlock& block, const std::vector<UnitTensors>& tensors,
             const std::vector<Unit>& units, const Tensor* out) {
  const size_t last = block.last();
  Tensor h;
  for (size_t index = 0; index < last; ++index) {
    const Tensor& input = index == 0 ? x : h;
    const Unit& unit = units[index];
    if (unit.panels) {
      h = convolution(input, *unit.panels, {unit.shift(), nullptr, true}, block.threads);
    } else {
      h = convolution(input, tensors[index].conv_weight, block.units[index].convolution, block.threads);
      bn_relu_(h, unit.state, block.threads);
    }
  }
  return end_block(x, last == 0 ? x : h, block, tensors, units, out);
}

// Packs the weights of the convolutions that are faster so, for a batch like x. The projection does as the last
// convolution, whose sums it is added to.
void pack_units(const Tensor& x, const ResidualBlock& block, const std::vector<UnitTensors>& tensors,
                std::vector<Unit>* units) {
  Shape shape = x.shape();
  const auto pack_unit = [&](size_t index, const Shape& input) {
    Unit& unit = (*units)[index];
    const auto* scale = static_cast<const float*>(unit.state.data()) + 2 * unit.state.sizes()[1];
    unit.panels = pack(tensors[index].conv_weight, block.units[index].convolution, input, scale, block.threads);
  };
  for (size_t index = 0; index <= block.last(); ++index) {
    const Tensor& weight = tensors[index].conv_weight;
    const aten::ConvolutionParams& params = block.units[index].convolution;
    const bool follows = index < block.last() || !block.projection ||
                         takes_own(tensors.back().conv_weight, block.units.back().convolution);
    if (follows && method_for(weight, params, shape, Purpose::kForward) == Method::kOwn) pack_unit(index, shape);
    shape = convolved_shape(shape, weight, params);
  }
  if (block.projection && (*units)[block.last()].panels) pack_unit(block.units.size() - 1, x.shape());
}

}  // namespace

Tensor residual_block_infer(const Tensor& x, const ResidualBlock& block, std::vector<UnitTensors>& tensors,
                            int64_t images_at_a_time) {
  round_weights(x, tensors);
  for (const ConvBn& unit : block.units) {
    require(!unit.batch_statistics, "residual_block_infer", "batch statistics are not supported");
  }
  std::vector<Unit> units;
  for (size_t index = 0; index < block.units.size(); ++index) {
    units.push_back({unit_state(nullptr, x.dtype(), block.units[index], tensors[index], block.threads), {}});
  }
  pack_units(x, block, tensors, &units);
  const int64_t batch = x.shape().batch;
  if (images_at_a_time >= batch) return infer(x, block, tensors, units, nullptr);
  Tensor out;
  for (int64_t begin = 0; begin < batch; begin += images_at_a_time) {
    const int64_t count = std::min(images_at_a_time, batch - begin);
    const Tensor part = aten::images(x, begin, count);
    if (begin == 0) {
      // The shape of the result is known after the first part.
      const Tensor first = infer(part, block, tensors, units, nullptr);
      Shape shape = first.shape();
      shape.batch = batch;
      out = aten::empty_channels_last(shape, first.torch_dtype());
      aten::copy(aten::images(out, 0, count), first);
      continue;
    }
    const Tensor target = aten::images(out, begin, count);
    infer(part, block, tensors, units, &target);
  }
  return out;
}

}  // namespace fusedres
