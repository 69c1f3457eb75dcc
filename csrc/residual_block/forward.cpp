#include <cstring>
#include <utility>
#include <vector>

#include "gram/gram.h"
#include "one_pass/one_pass.h"
#include "residual_block/launch.h"
#include "residual_block/residual_block.h"
#include "residual_block/units.h"

namespace fusedres {
namespace {

using aten::Shape;
using aten::Tensor;

// Returns the raw convolution of a one-pass unit. Its input is relu(BN(h)) of every stride-th pixel (h itself without a
// state), centred.
Tensor one_pass(const Tensor& h, const Tensor* h_state, int64_t stride, const ConvBn& unit, const UnitTensors& tensors,
                int threads, Tensor* state, OnePass* saved) {
  const DType dtype = h.dtype();
  const int32_t arithmetic = aten::torch_dtype(state_dtype(dtype)), wide = aten::torch_dtype(DType::kFloat64);
  const Shape source = h.shape();
  const Tensor z = aten::empty_channels_last(subsampled_shape(h, stride), h.torch_dtype());
  const Tensor matrix = aten::empty({source.channels, source.channels}, wide);
  saved->pivot = aten::empty({source.channels}, arithmetic);
  saved->total = aten::empty({source.channels}, wide);
  gram({h.data(),
        dtype,
        {source.batch, source.height, source.width, stride},
        source.channels,
        h_state == nullptr ? nullptr : h_state->data(),
        z.data(),
        saved->pivot.data(),
        static_cast<double*>(saved->total.data()),
        static_cast<double*>(matrix.data()),
        threads});
  *state = empty_state(dtype, tensors);
  saved->projected = aten::empty({tensors.conv_weight.sizes()[0], source.channels}, arithmetic);
  BnStatisticsParams norm = norm_params(dtype, unit, tensors, *state, threads);
  norm.rows = z.shape().rows();
  one_pass_statistics({norm, tensors.conv_weight.data(), source.channels, saved->pivot.data(),
                       static_cast<const double*>(saved->total.data()), static_cast<const double*>(matrix.data()),
                       saved->projected.data()});
  return convolution(z, tensors.conv_weight, dense(unit.convolution), threads);
}

// Restores the running statistics if a forward fails half-way.
class KeptStatistics {
 public:
  KeptStatistics(const ResidualBlock& block, const std::vector<UnitTensors>& tensors) {
    for (size_t index = 0; index < tensors.size(); ++index) {
      if (!block.units[index].update) continue;
      const UnitTensors& unit = tensors[index];
      for (const Tensor* tensor : {&unit.running_mean, &unit.running_var, &unit.num_batches_tracked}) {
        if (!tensor->defined()) continue;
        const auto* bytes = static_cast<const char*>(tensor->data());
        kept_.push_back({tensor->data(), {bytes, bytes + tensor->bytes()}});
      }
    }
  }
  KeptStatistics(const KeptStatistics&) = delete;
  KeptStatistics& operator=(const KeptStatistics&) = delete;
  ~KeptStatistics() {
    for (const Kept& kept : kept_) std::memcpy(kept.address, kept.bytes.data(), kept.bytes.size());
  }

  void release() { kept_.clear(); }

 private:
  struct Kept {
    void* address;
    std::vector<char> bytes;
  };
  std::vector<Kept> kept_;
};

}  // namespace

namespace {

// Whether the passes accept the tensors of a unit with an input of shape `input`. Writes the shape of its output to
// `output`. The weight and all tensors of a BatchNorm must have the dtype of the input, or float32 if that has 16 bits.
bool serves_unit(const ConvBn& unit, const UnitTensors& tensors, int32_t dtype, const Shape& input, Shape* output) {
  const Tensor& weight = tensors.conv_weight;
  if (!is_sound(unit)) return false;
  const bool wide = dtype == aten::torch_dtype(DType::kFloat32) || dtype == aten::torch_dtype(DType::kFloat64);
  const auto fits = [&](int32_t found) {
    return found == dtype || (!wide && found == aten::torch_dtype(DType::kFloat32));
  };
  if (!weight.defined() || !fits(weight.torch_dtype()) || weight.dim() != 4 || !weight.in_memory()) return false;
  const int64_t channels = weight.sizes()[0];
  if (unit.pixelwise && (weight.sizes()[2] != 1 || weight.sizes()[3] != 1)) return false;
  if (weight.sizes()[1] * unit.convolution.groups != input.channels || channels % unit.convolution.groups != 0) {
    return false;
  }
  *output = convolved_shape(input, weight, unit.convolution);
  if (output->height < 1 || output->width < 1 || (unit.batch_statistics && output->rows() <= 1)) return false;
  int32_t norm = -1;
  for (const Tensor* vector : {&tensors.weight, &tensors.bias, &tensors.running_mean, &tensors.running_var}) {
    if (!vector->defined()) continue;
    const int32_t found = vector->torch_dtype();
    if ((norm != -1 && found != norm) || !vector->is_vector(channels) || !vector->in_memory()) return false;
    norm = found;
  }
  if (norm != -1 && !fits(norm)) return false;
  const Tensor& batches = tensors.num_batches_tracked;
  if (batches.defined() && (batches.torch_dtype() != aten::torch_int64() || batches.dim() != 0)) return false;
  return batches.in_memory();
}

}  // namespace

bool serves(const Tensor& x, const ResidualBlock& block, const std::vector<UnitTensors>& tensors) {
  if (!x.has_dtype() || !x.is_channels_last() || !x.in_memory()) return false;
  const Shape start = x.shape();
  Shape shape = start, end = start, reached = start;
  for (size_t index = 0; index < tensors.size(); ++index) {
    const bool projection = index > block.last();
    if (!serves_unit(block.units[index], tensors[index], x.torch_dtype(), projection ? start : shape, &shape)) {
      return false;
    }
    if (block.one_pass(index) && (x.dtype() != DType::kFloat32 || !tensors[index].conv_weight.is_matrix())) {
      return false;
    }
    (projection ? reached : end) = shape;
  }
  if (block.projection) return reached == end;
  const int64_t stride = block.pad_stride;
  return start.batch == end.batch && (start.height + stride - 1) / stride == end.height &&
         (start.width + stride - 1) / stride == end.width && start.channels <= end.channels;
}

ResidualBlockForward residual_block_forward(const Tensor& x, const ResidualBlock& block,
                                            std::vector<UnitTensors>& tensors) {
  round_weights(x, tensors);
  const DType dtype = x.dtype();
  const size_t last = block.last();
  const int threads = block.threads;
  ResidualBlockForward result;
  KeptStatistics statistics(block, tensors);
  std::vector<Tensor>& outputs = result.outputs;
  std::vector<Tensor>& states = result.states;
  Tensor h, out;  // out: a raw convolution output that is not saved
  for (size_t index = 0; index <= last; ++index) {
    const ConvBn& unit = block.units[index];
    Tensor y, state;
    if (block.one_pass(index)) {
      out = one_pass(outputs[index - 1], &states[index - 1], 1, unit, tensors[index], threads, &state, &result.last);
    } else {
      y = convolution(index == 0 ? x : h, tensors[index].conv_weight, unit.convolution, threads);
      state = unit_state(&y, dtype, unit, tensors[index], threads);
    }
    const bool read = index < last && !block.one_pass(index + 1);
    h = read ? bn_relu_of(y, state, std::move(h), threads) : Tensor();
    if (block.recomputes(index)) out = std::move(y);
    outputs.push_back(std::move(y));
    states.push_back(std::move(state));
  }
  Shortcut shortcut{&x, nullptr, block.pad_stride};
  Tensor projected;
  if (block.projection) {
    const ConvBn& unit = block.units.back();
    Tensor state;
    if (block.one_pass_projection) {
      const int64_t stride = unit.convolution.stride[0];
      projected = one_pass(x, nullptr, stride, unit, tensors.back(), threads, &state, &result.projection);
      outputs.emplace_back();
    } else {
      Tensor y = project(x, unit, tensors.back().conv_weight, threads);
      state = unit_state(&y, dtype, unit, tensors.back(), threads);
      if (block.recompute_projection) projected = std::move(y);
      outputs.push_back(std::move(y));
    }
    states.push_back(std::move(state));
    shortcut = {projected.defined() ? &projected : &outputs.back(), &states.back(), 1};
  }

  const Tensor& y = out.defined() ? out : outputs[last];
  const Shape shape = y.shape();
  result.mask = aten::empty({shape.batch, shape.height, shape.width, (shape.channels + 7) / 8}, aten::torch_uint8());
  // The result takes the memory of a raw output that is not saved, if there is one.
  if (out.defined()) {
    tail(y, states[last], shortcut, y.data(), result.mask.data(), threads);
    result.out = std::move(out);
  } else if (projected.defined()) {
    tail(projected, states.back(), {&y, &states[last], 1}, projected.data(), result.mask.data(), threads);
    result.out = std::move(projected);
  } else {
    result.out = aten::empty_like(y);
    tail(y, states[last], shortcut, result.out.data(), result.mask.data(), threads);
  }
  statistics.release();
  return result;
}

}  // namespace fusedres
