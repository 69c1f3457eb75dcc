#include <algorithm>
#include <vector>

#include "common/check.h"
#include "packed_convolution/packed_convolution.h"
#include "residual_block/residual_block.h"
#include "residual_block/units.h"

namespace fusedres {
namespace {

using aten::Shape;
using aten::Tensor;

// Runs the block on some images with torch's convolutions, and writes the result to out if it is given.
Tensor infer_library(const Tensor& x, const ResidualBlock& block, const std::vector<UnitTensors>& tensors,
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

// A unit with the scale of its BatchNorm in its packed weight.
struct PackedUnit {
  ConvolutionMap map;  // but for the sizes of the input
  const Tensor* state;
  Tensor panels;
};

PackedUnit pack(const ConvBn& unit, const UnitTensors& tensors, const Tensor& state, int threads) {
  const int64_t* sizes = tensors.conv_weight.sizes();
  const int64_t* strides = tensors.conv_weight.strides();
  const aten::ConvolutionParams& p = unit.convolution;
  PackedUnit packed{{0,
                     0,
                     0,
                     sizes[1],
                     sizes[0],
                     {sizes[2], sizes[3]},
                     {p.stride[0], p.stride[1]},
                     {p.padding[0], p.padding[1]},
                     {p.dilation[0], p.dilation[1]}},
                    &state,
                    {}};
  packed.panels = aten::empty({packed_size(packed.map)}, aten::torch_dtype(DType::kFloat32));
  const float* scale = static_cast<const float*>(state.data()) + 2 * sizes[0];
  pack_weight({static_cast<const float*>(tensors.conv_weight.data()),
               {strides[0], strides[1], strides[2], strides[3]},
               packed.map,
               scale,
               static_cast<float*>(packed.panels.data()),
               threads});
  return packed;
}

// Returns relu(BN(conv(x)) + shortcut), in out if it is given.
Tensor run(const Tensor& x, const PackedUnit& unit, const Tensor* shortcut, bool relu, const Tensor* out, int threads) {
  const Shape s = x.shape();
  ConvolutionMap map = unit.map;
  map.batch = s.batch;
  map.height = s.height;
  map.width = s.width;
  Tensor result;
  if (out == nullptr) {
    result = aten::empty_channels_last({s.batch, map.out_channels, map.out_size(0), map.out_size(1)}, x.torch_dtype());
    out = &result;
  }
  packed_convolution({static_cast<const float*>(x.data()), map, static_cast<const float*>(unit.panels.data()),
                      static_cast<const float*>(unit.state->data()) + 3 * map.out_channels,
                      shortcut == nullptr ? nullptr : static_cast<const float*>(shortcut->data()), relu,
                      static_cast<float*>(out->data()), threads});
  return result;
}

// Does the same as infer_library with this package's convolutions.
Tensor infer_packed(const Tensor& x, const ResidualBlock& block, const std::vector<PackedUnit>& units,
                    const Tensor* out) {
  const size_t last = block.last();
  Tensor h;
  for (size_t index = 0; index < last; ++index) {
    h = run(index == 0 ? x : h, units[index], nullptr, true, nullptr, block.threads);
  }
  const Tensor& input = last == 0 ? x : h;
  if (block.projection) {
    const Tensor projected = run(x, units.back(), nullptr, false, nullptr, block.threads);
    return run(input, units[last], &projected, true, out, block.threads);
  }
  if (block.pad_stride == 1 && x.shape().channels == units[last].map.out_channels) {
    return run(input, units[last], &x, true, out, block.threads);
  }
  // A zero-padded shortcut is a pass of its own.
  Tensor y = run(input, units[last], nullptr, false, nullptr, block.threads);
  const int64_t channels = units[last].map.out_channels;
  const Tensor identity = aten::empty({4, channels}, y.torch_dtype());
  auto* rows = static_cast<float*>(identity.data());
  std::fill_n(rows, 4 * channels, 0.0f);
  std::fill_n(rows + channels, 2 * channels, 1.0f);
  tail(y, identity, {&x, nullptr, block.pad_stride}, out == nullptr ? y.data() : out->data(), nullptr, block.threads);
  return y;
}

bool packs(const Tensor& x, const ResidualBlock& block) {
  const auto grouped = [](const ConvBn& unit) { return unit.convolution.groups != 1; };
  return x.dtype() == DType::kFloat32 && packed_convolution_is_faster() &&
         std::none_of(block.units.begin(), block.units.end(), grouped);
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
  if (packs(x, block)) {
    for (size_t index = 0; index < block.units.size(); ++index) {
      units.push_back(pack(block.units[index], tensors[index], states[index], block.threads));
    }
  }
  const auto infer = [&](const Tensor& part, const Tensor* out) {
    return units.empty() ? infer_library(part, block, tensors, states, out) : infer_packed(part, block, units, out);
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
