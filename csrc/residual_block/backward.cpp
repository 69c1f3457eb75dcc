#include <algorithm>
#include <initializer_list>
#include <utility>

#include "bn_add_relu_backward/bn_add_relu_backward.h"
#include "one_pass/one_pass.h"
#include "relu_backward/relu_backward.h"
#include "residual_block/convolution.h"
#include "residual_block/launch.h"
#include "residual_block/residual_block.h"
#include "residual_block/units.h"
#include "shortcut_grad/shortcut_grad.h"

namespace fusedres {
namespace {

using aten::Shape;
using aten::Tensor;

constexpr size_t kUnitParams = 3;  // conv weight, BN weight, BN bias

class Backward {
 public:
  Backward(const ResidualBlock& block, ResidualBlockBackward& saved)
      : block_(block), saved_(saved), grads_(saved.needs.size()), rounded_(block.units.size()) {}

  std::vector<Tensor> run() {
    const size_t last = block_.last();
    Tensor grad_projection;
    for (size_t index = last; index < block_.units.size(); ++index) {
      if (block_.recomputes(index)) saved_.outputs[index] = recompute(index);
    }
    const bool one_pass = block_.one_pass_last || block_.one_pass_projection;
    Tensor grad = one_pass ? tail_one_pass(&grad_projection) : tail(&grad_projection);
    Tensor shortcut;
    if (block_.projection) shortcut = projection(std::move(grad_projection));
    Tensor room;
    // If the last unit is one-pass, grad is already the gradient of its input.
    for (size_t index = block_.one_pass_last ? last : last + 1; index-- > 0;) {
      if (!needs_first(index + 1)) return std::move(grads_);
      if (index < last) through_norm(index, grad, GateKind::kRecompute);
      grad = convolution(index, block_.units[index].convolution, grad, input(index, &room), needs_first(index));
      if (index == last && read_.defined()) room = std::move(read_);
    }
    if (!needs_first(0)) return std::move(grads_);
    if (!block_.projection) {
      add_shortcut(grad, saved_.grad_out, {GateKind::kBits, saved_.mask.data()}, block_.pad_stride);
    } else {
      const ConvBn& unit = block_.units.back();
      const int64_t stride = block_.one_pass_projection || subsamples(unit) ? unit.convolution.stride[0] : 1;
      add_shortcut(grad, shortcut, {GateKind::kNone, nullptr}, stride);
    }
    grads_[0] = std::move(grad);
    return std::move(grads_);
  }

 private:
  static size_t slot(size_t index) { return 1 + kUnitParams * index; }

  // Whether the gradient of x, or of a parameter of the branch's first `units` units, is needed.
  bool needs_first(size_t units) const {
    for (size_t i = 0; i < slot(units); ++i) {
      if (saved_.needs[i]) return true;
    }
    return false;
  }

  bool needs_sums(size_t index) const { return saved_.needs[slot(index) + 1] || saved_.needs[slot(index) + 2]; }

  // Rows: Σd, Σd·x̂, Σd·x̂ of the projection.
  Tensor empty_sums(size_t index) const {
    return aten::empty({3, saved_.states[index].sizes()[1]}, saved_.states[index].torch_dtype());
  }

  // Sets the gradients of BatchNorm's weight (row `dot` of the sums, Σd·x̂) and of its bias (sum, Σd).
  void set_norm_grads(size_t index, const Tensor& sums, int64_t dot, Tensor sum) {
    if (saved_.needs[slot(index) + 1]) set_grad(slot(index) + 1, aten::row(sums, dot));
    if (saved_.needs[slot(index) + 2]) set_grad(slot(index) + 2, std::move(sum));
  }

  // Sets the gradient of a parameter, in its dtype. A BatchNorm without this parameter has no dtype for it.
  void set_grad(size_t slot, Tensor grad) {
    const Tensor& parameter = saved_.params[slot - 1];
    grads_[slot] = parameter.defined() ? aten::in_dtype(std::move(grad), parameter.torch_dtype()) : std::move(grad);
  }

  // The weight of a unit's convolution, rounded to the dtype of x.
  const Tensor& weight(size_t index) {
    const Tensor& given = saved_.params[kUnitParams * index];
    const int32_t dtype = saved_.x.torch_dtype();
    if (given.torch_dtype() == dtype) return given;
    if (!rounded_[index].defined()) rounded_[index] = aten::converted(given, dtype);
    return rounded_[index];
  }

  // Returns the raw output of the last unit or of the projection once more.
  Tensor recompute(size_t index) {
    const ConvBn& unit = block_.units[index];
    if (index > block_.last()) return project(saved_.x, unit, weight(index), block_.threads);
    if (index == 0) return fusedres::convolution(saved_.x, weight(index), unit.convolution, block_.threads);
    read_ = bn_relu_of(saved_.outputs[index - 1], saved_.states[index - 1], Tensor(), block_.threads);
    return fusedres::convolution(read_, weight(index), unit.convolution, block_.threads);
  }

  // What a unit of the branch reads. What recompute() has formed is not formed again.
  ConvolutionInput input(size_t index, Tensor* room) const {
    if (index == 0) return {saved_.x, nullptr, room};
    if (index == block_.last() && read_.defined()) return {read_, nullptr, room};
    return {saved_.outputs[index - 1], &saved_.states[index - 1], room};
  }

  // A branch that enters the last ReLU. Its gradient overwrites the raw output if that is donated or was recomputed.
  BnBranch branch(size_t index, Tensor* grad) {
    Tensor& y = saved_.outputs[index];
    const void* x = y.data();
    *grad = saved_.donated || block_.recomputes(index) ? std::move(y) : aten::empty_like(y);
    return {x, saved_.states[index].data(), grad->data(), block_.units[index].batch_statistics};
  }

  // Gradient of the block's output → gradients of the raw outputs of the last unit and of the projection.
  Tensor tail(Tensor* grad_projection) {
    const size_t last = block_.last();
    const size_t end = block_.units.size() - 1;
    const Shape shape = saved_.grad_out.shape();
    const Tensor sums = empty_sums(last);
    Tensor grad;
    BnAddReluBackwardParams params{};
    params.grad = saved_.grad_out.data();
    params.dtype = saved_.grad_out.dtype();
    params.rows = shape.rows();
    params.channels = shape.channels;
    params.gate = {GateKind::kBits, saved_.mask.data()};
    params.branch = branch(last, &grad);
    if (block_.projection) params.shortcut = branch(end, grad_projection);
    params.sums = sums.data();
    params.threads = block_.threads;
    const bool wanted = needs_sums(last) || needs_sums(end);
    if (wanted || params.branch.batch_statistics || params.shortcut.batch_statistics) {
      bn_add_relu_backward_reduce(params);
    }
    bn_add_relu_backward_elementwise(params);
    set_norm_grads(last, sums, 1, aten::row(sums, 0));
    if (block_.projection) set_norm_grads(end, sums, 2, aten::clone(aten::row(sums, 0)));  // must not share memory
    return grad;
  }

  // Does the same with one-pass units. The gradient of a one-pass unit is that of its input, and undefined if it is not
  // needed.
  Tensor tail_one_pass(Tensor* grad_projection) {
    const size_t last = block_.last();
    const Shape shape = saved_.grad_out.shape();
    Tensor d = aten::empty_like(saved_.grad_out);
    const Tensor sum = aten::empty({shape.channels}, saved_.states[last].torch_dtype());
    relu_backward({saved_.grad_out.data(),
                   saved_.grad_out.dtype(),
                   shape.rows(),
                   shape.channels,
                   {GateKind::kBits, saved_.mask.data()},
                   d.data(),
                   sum.data(),
                   block_.threads});
    Tensor grad;
    if (block_.one_pass_last) {
      grad =
          one_pass(last, d, sum, saved_.outputs[last - 1], &saved_.states[last - 1], 1, saved_.last, needs_first(last));
    }
    if (block_.one_pass_projection) {
      const int64_t stride = block_.units.back().convolution.stride[0];
      *grad_projection = one_pass(last + 1, d, sum, saved_.x, nullptr, stride, saved_.projection, needs_first(0));
    }
    // An ordinary branch comes last and overwrites d with its own gradient: d is no longer read then.
    if (!block_.one_pass_last) {
      through_norm(last, d, GateKind::kNone);
      return d;
    }
    if (block_.projection && !block_.one_pass_projection) {
      through_norm(last + 1, d, GateKind::kNone);
      *grad_projection = std::move(d);
    }
    return grad;
  }

  // Returns the gradient of a one-pass unit's input, which is relu(BN(h)) of every stride-th pixel (h itself without a
  // state).
  Tensor one_pass(size_t index, const Tensor& d, const Tensor& sum, const Tensor& h, const Tensor* h_state,
                  int64_t stride, const OnePass& saved, bool needs_input) {
    if (!(needs_input || saved_.needs[slot(index)] || needs_sums(index))) return Tensor();
    const ConvBn& unit = block_.units[index];
    const aten::ConvolutionParams params = dense(unit.convolution);
    const Tensor& weight = saved_.params[kUnitParams * index];
    const int64_t channels = weight.sizes()[0], inputs = weight.sizes()[1];
    const int32_t dtype = weight.torch_dtype();
    const Tensor z = aten::empty_channels_last(subsampled_shape(h, stride), h.torch_dtype());
    bn_relu_into(h, h_state, &saved.pivot, stride, z.data(), block_.threads);

    OnePassGradsParams grads{};
    grads.dtype = d.dtype();
    grads.rows = z.shape().rows();
    grads.channels = channels;
    grads.in_channels = inputs;
    grads.weight = weight.data();
    grads.state = saved_.states[index].data();
    grads.threads = block_.threads;
    const Tensor scaled = aten::empty({channels, inputs, 1, 1}, dtype);
    one_pass_scale(grads, scaled.data());
    auto [grad_z, cross] = convolution_backward(d, {z, nullptr, nullptr}, scaled, params,
                                                {needs_input, inputs > kOnePassNarrow}, block_.threads);

    Tensor grad_conv = aten::empty({channels, inputs, 1, 1}, dtype);
    Tensor grad_weight = aten::empty({channels}, dtype);
    const Tensor quadratic = needs_input ? aten::empty({inputs, inputs, 1, 1}, dtype) : Tensor();
    const Tensor constant = needs_input ? aten::empty({inputs}, dtype) : Tensor();
    grads.cross = cross.data();
    grads.d = d.data();
    grads.z = z.data();
    grads.sum_d = sum.data();
    grads.projected = saved.projected.data();
    grads.total = static_cast<const double*>(saved.total.data());
    grads.grad_conv = grad_conv.data();
    grads.grad_weight = grad_weight.data();
    grads.quadratic = quadratic.data();
    grads.constant = constant.data();
    one_pass_grads(grads);
    if (needs_input) {
      const Tensor correction = fusedres::convolution(z, quadratic, params, block_.threads, constant);
      add_shortcut(grad_z, correction, {GateKind::kNone, nullptr}, 1);
    }

    if (saved_.needs[slot(index)]) grads_[slot(index)] = std::move(grad_conv);
    if (saved_.needs[slot(index) + 1]) grads_[slot(index) + 1] = std::move(grad_weight);
    if (saved_.needs[slot(index) + 2]) grads_[slot(index) + 2] = aten::clone(sum);  // the other branch may use sum too
    return std::move(grad_z);
  }

  // Gradient of BatchNorm's output (or of the ReLU after it) → gradient of its input, in place.
  void through_norm(size_t index, const Tensor& grad, GateKind gate) {
    const Tensor& y = saved_.outputs[index];
    const Shape shape = y.shape();
    const Tensor sums = empty_sums(index);
    BnAddReluBackwardParams params{};
    params.grad = grad.data();
    params.dtype = grad.dtype();
    params.rows = shape.rows();
    params.channels = shape.channels;
    params.gate = {gate, nullptr};
    params.branch = {y.data(), saved_.states[index].data(), grad.data(), block_.units[index].batch_statistics};
    params.sums = sums.data();
    params.threads = block_.threads;
    if (needs_sums(index) || params.branch.batch_statistics) bn_add_relu_backward_reduce(params);
    bn_add_relu_backward_elementwise(params);
    set_norm_grads(index, sums, 1, aten::row(sums, 0));
  }

  // Returns the gradient of the input if needed, and writes that of the weight to its slot.
  Tensor convolution(size_t index, const aten::ConvolutionParams& params, const Tensor& grad,
                     const ConvolutionInput& input, bool need_input) {
    const ConvolutionNeeds needs{need_input, saved_.needs[slot(index)]};
    auto [grad_input, grad_weight] = convolution_backward(grad, input, weight(index), params, needs, block_.threads);
    if (needs.weight) set_grad(slot(index), std::move(grad_weight));
    return std::move(grad_input);
  }

  // Returns the gradient that the projection sends to the pixels of x that it reads.
  Tensor projection(Tensor grad) {
    const ConvBn& unit = block_.units.back();
    const size_t index = block_.units.size() - 1;
    if (block_.one_pass_projection) return grad;
    if (!subsamples(unit)) {
      return convolution(index, unit.convolution, grad, {saved_.x, nullptr, nullptr}, saved_.needs[0]);
    }
    const Tensor source = subsampled(saved_.x, unit.convolution.stride[0], block_.threads);
    return convolution(index, dense(unit.convolution), grad, {source, nullptr, nullptr}, saved_.needs[0]);
  }

  void add_shortcut(const Tensor& grad_x, const Tensor& grad, Gate gate, int64_t stride) const {
    const Shape s = grad_x.shape();
    shortcut_grad({grad_x.data(),
                   grad_x.dtype(),
                   {s.batch, s.height, s.width, stride},
                   s.channels,
                   grad.data(),
                   grad.shape().channels,
                   gate,
                   block_.threads});
  }

  const ResidualBlock& block_;
  ResidualBlockBackward& saved_;
  std::vector<Tensor> grads_;
  std::vector<Tensor> rounded_;  // weights
  Tensor read_;                  // by a last convolution that ran again
};

}  // namespace

namespace {

bool matches(const Tensor& tensor, int32_t dtype, std::initializer_list<int64_t> sizes) {
  if (!tensor.defined() || tensor.torch_dtype() != dtype) return false;
  if (tensor.dim() != static_cast<int64_t>(sizes.size())) return false;
  return std::equal(sizes.begin(), sizes.end(), tensor.sizes()) && tensor.is_contiguous() && tensor.in_memory();
}

// Whether the passes accept the saved tensors of a unit with an input of shape `input`. Writes the shape of its output
// to `output`.
bool serves_unit(const ResidualBlock& block, const ResidualBlockBackward& saved, size_t index, const Shape& input,
                 Shape* output) {
  const int32_t dtype = saved.x.torch_dtype();
  const int32_t state = aten::torch_dtype(state_dtype(saved.x.dtype()));
  const ConvBn& unit = block.units[index];
  const Tensor& weight = saved.params[kUnitParams * index];
  if (!is_sound(unit)) return false;
  // Parameters have the dtype of x or, if that has 16 bits, may have float32, which is then the dtype of the state too.
  const auto fits = [&](int32_t found) { return found == dtype || found == state; };
  if (!weight.defined() || !fits(weight.torch_dtype()) || weight.dim() != 4 || !weight.in_memory()) return false;
  const int64_t channels = weight.sizes()[0];
  if (unit.pixelwise && (weight.sizes()[2] != 1 || weight.sizes()[3] != 1)) return false;
  if (weight.sizes()[1] * unit.convolution.groups != input.channels) return false;
  *output = convolved_shape(input, weight, unit.convolution);
  if (block.one_pass(index)) {
    const OnePass& one_pass = index == block.last() ? saved.last : saved.projection;
    if (saved.x.dtype() != DType::kFloat32 || !weight.is_matrix()) return false;
    if (!matches(one_pass.pivot, state, {input.channels})) return false;
    if (!matches(one_pass.total, aten::torch_dtype(DType::kFloat64), {input.channels})) return false;
    if (!matches(one_pass.projected, state, {channels, input.channels})) return false;
  } else if (!block.recomputes(index)) {
    const Tensor& y = saved.outputs[index];
    if (!y.defined() || y.torch_dtype() != dtype || !y.is_channels_last() || !y.in_memory()) return false;
    if (!(y.shape() == *output)) return false;
  }
  if (!matches(saved.states[index], state, {4, channels})) return false;
  for (size_t i = 1; i < kUnitParams; ++i) {
    const Tensor& vector = saved.params[kUnitParams * index + i];
    if (vector.defined() && !matches(vector, state, {channels}) && !matches(vector, dtype, {channels})) return false;
  }
  return true;
}

}  // namespace

bool serves(const ResidualBlock& block, const ResidualBlockBackward& saved) {
  for (const Tensor* tensor : {&saved.x, &saved.grad_out}) {
    if (!tensor->has_dtype() || tensor->dim() != 4 || !tensor->in_memory()) return false;
  }
  if (saved.grad_out.torch_dtype() != saved.x.torch_dtype()) return false;
  const Shape out = saved.grad_out.shape();
  const int64_t bytes = (out.channels + 7) / 8;
  if (!matches(saved.mask, aten::torch_uint8(), {out.batch, out.height, out.width, bytes})) return false;
  Shape shape = saved.x.shape();
  for (size_t index = 0; index < block.units.size(); ++index) {
    if (!serves_unit(block, saved, index, index > block.last() ? saved.x.shape() : shape, &shape)) return false;
    if (index >= block.last() && !(shape == out)) return false;
  }
  return true;
}

std::vector<Tensor> residual_block_backward(const ResidualBlock& block, ResidualBlockBackward& saved) {
  saved.grad_out = aten::to_channels_last(std::move(saved.grad_out));
  saved.x = aten::to_channels_last(std::move(saved.x));
  return Backward(block, saved).run();
}

}  // namespace fusedres
