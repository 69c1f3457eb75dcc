#include "residual_block/convolution.h"

#include <algorithm>

#include "conv_wgrad/conv_wgrad.h"
#include "residual_block/launch.h"
#include "residual_block/product.h"

namespace fusedres {
namespace {

using aten::ConvolutionParams;
using aten::Shape;
using aten::Tensor;

ConvolutionMap weight_map(const Tensor& weight, const ConvolutionParams& p) {
  const int64_t* sizes = weight.sizes();
  return {0,
          0,
          0,
          sizes[1],
          sizes[0],
          {sizes[2], sizes[3]},
          {p.stride[0], p.stride[1]},
          {p.padding[0], p.padding[1]},
          {p.dilation[0], p.dilation[1]}};
}

ConvolutionMap with_input(ConvolutionMap map, const Shape& input) {
  map.batch = input.batch;
  map.height = input.height;
  map.width = input.width;
  return map;
}

WeightStrides strides_of(const Tensor& weight) {
  const int64_t* strides = weight.strides();
  return {strides[0], strides[1], strides[2], strides[3]};
}

Panels packed(const float* weight, const WeightStrides& strides, const ConvolutionMap& map, const float* scale,
              int threads) {
  const bool winograd = winograd_is_faster(map, false);
  Panels panels{map, winograd, aten::empty({packed_size(map, winograd)}, aten::torch_dtype(DType::kFloat32))};
  pack_weight({weight, strides, map, scale, static_cast<float*>(panels.data.data()), threads, winograd});
  return panels;
}

Tensor zeros(int64_t count) {
  Tensor result = aten::empty({count}, aten::torch_dtype(DType::kFloat32));
  std::fill_n(static_cast<float*>(result.data()), count, 0.0f);
  return result;
}

bool is_dense(const Tensor& weight) {
  return weight.is_contiguous() || weight.is_channels_last();
}

// Whether the gradient of the input is a convolution of grad, with the weight turned around.
bool turns(const ConvolutionParams& params, const Tensor& weight) {
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t covered = params.dilation[axis] * (weight.sizes()[2 + axis] - 1);
    if (params.stride[axis] != 1 || params.padding[axis] > covered) return false;
  }
  return true;
}

Tensor own_input_gradient(const Tensor& grad, const Shape& input, const Tensor& weight, const ConvolutionParams& params,
                          int threads) {
  const ConvolutionMap map = with_input(weight_map(weight, params), input);
  const WeightStrides strides = strides_of(weight);
  const ConvolutionMap back = turned(map);
  const float* last = static_cast<const float*>(weight.data()) + (map.kernel[0] - 1) * strides.row +
                      (map.kernel[1] - 1) * strides.column;
  const Panels panels =
      packed(last, {strides.channel, strides.out_channel, -strides.row, -strides.column}, back, nullptr, threads);
  const Tensor bias = zeros(back.out_channels);
  return convolution(grad, panels, {static_cast<const float*>(bias.data())}, threads);
}

Tensor own_weight_gradient(const Tensor& grad, const ConvolutionInput& input, const Tensor& weight,
                           const ConvolutionParams& params, int threads) {
  const ConvolutionMap map = with_input(weight_map(weight, params), input.y.shape());
  const DType dtype = grad.dtype(), sums_dtype = state_dtype(dtype);
  Tensor result = aten::empty_like(weight);
  // One sum in the order of channels_last is the gradient itself.
  const int64_t splits = conv_wgrad_splits(map);
  const bool direct = splits == 1 && dtype == sums_dtype && result.is_channels_last();
  const int64_t size = map.out_channels * map.channels * map.kernel[0] * map.kernel[1];
  const Tensor partials = direct ? Tensor() : aten::empty({splits, size}, aten::torch_dtype(sums_dtype));
  void* const sums = direct ? result.data() : partials.data();
  conv_wgrad({dtype, grad.data(), nullptr, nullptr, nullptr, input.y.data(),
              input.state == nullptr ? nullptr : input.state->data(), map, sums, threads});
  if (!direct) conv_wgrad_finalize({sums_dtype, sums, splits, map, dtype, result.data(), strides_of(result), threads});
  return result;
}

}  // namespace

bool takes_own(const Tensor& weight, const ConvolutionParams& params) {
  return weight.dtype() == DType::kFloat32 && params.groups == 1;
}

Method method_for(const Tensor& weight, const ConvolutionParams& params, const Shape& input, Purpose purpose) {
  if (params.groups != 1) return Method::kLibrary;
  return fastest_method(with_input(weight_map(weight, params), input), weight.dtype(), purpose);
}

Panels pack(const Tensor& weight, const ConvolutionParams& params, const Shape& input, const float* scale,
            int threads) {
  const ConvolutionMap map = with_input(weight_map(weight, params), input);
  return packed(static_cast<const float*>(weight.data()), strides_of(weight), map, scale, threads);
}

Tensor convolution(const Tensor& x, const Panels& weight, const Epilogue& epilogue, int threads) {
  const ConvolutionMap map = with_input(weight.map, x.shape());
  Tensor result;
  if (epilogue.out == nullptr) {
    result =
        aten::empty_channels_last({map.batch, map.out_channels, map.out_size(0), map.out_size(1)}, x.torch_dtype());
  }
  const Tensor& out = epilogue.out == nullptr ? result : *epilogue.out;
  const Tensor* shortcut = epilogue.shortcut;
  packed_convolution({static_cast<const float*>(x.data()), map, static_cast<const float*>(weight.data.data()),
                      epilogue.bias, shortcut == nullptr ? nullptr : static_cast<const float*>(shortcut->data()),
                      epilogue.relu, static_cast<float*>(out.data()), threads, weight.winograd});
  return result;
}

Tensor convolution(const Tensor& x, const Tensor& weight, const ConvolutionParams& params, int threads,
                   const Tensor& bias) {
  const Method method = method_for(weight, params, x.shape(), Purpose::kForward);
  if (method == Method::kProduct && !bias.defined() && weight.is_matrix()) return product(x, weight);
  if (method != Method::kOwn) return aten::convolution(x, weight, params, bias);
  const Tensor none = bias.defined() ? Tensor() : zeros(weight.sizes()[0]);
  const auto* start = static_cast<const float*>(bias.defined() ? bias.data() : none.data());
  return convolution(x, pack(weight, params, x.shape(), nullptr, threads), {start}, threads);
}

std::pair<Tensor, Tensor> convolution_backward(const Tensor& grad, const ConvolutionInput& input, const Tensor& weight,
                                               const ConvolutionParams& params, ConvolutionNeeds needs, int threads) {
  const Shape shape = input.y.shape();
  Tensor grad_weight, grad_input;
  if (needs.input) {
    const Method method = method_for(weight, params, shape, Purpose::kInputGradient);
    if (method == Method::kOwn && turns(params, weight)) {
      grad_input = own_input_gradient(grad, shape, weight, params, threads);
    } else if (method == Method::kProduct && weight.is_matrix()) {
      grad_input = product_input_gradient(grad, weight);
    }
  }
  const Method method =
      needs.weight && is_dense(weight) ? method_for(weight, params, shape, Purpose::kWeightGradient) : Method::kLibrary;
  if (method == Method::kOwn) {
    grad_weight = own_weight_gradient(grad, input, weight, params, threads);
    needs.weight = false;
  }
  needs.input = needs.input && !grad_input.defined();
  const Tensor* source = &input.y;  // of which only the shape is read if the weight's gradient is not needed
  if (needs.weight && input.state != nullptr) {
    *input.room = bn_relu_of(input.y, *input.state, std::move(*input.room), threads);
    source = input.room;
  }
  if (method == Method::kProduct) {
    grad_weight =
        product_weight_gradient(grad, *source, weight, with_input(weight_map(weight, params), shape), threads);
    needs.weight = false;
  }
  auto found = aten::convolution_backward(grad, *source, weight, params, needs.input, needs.weight);
  return {needs.input ? std::move(found.first) : std::move(grad_input),
          needs.weight ? std::move(found.second) : std::move(grad_weight)};
}

}  // namespace fusedres
