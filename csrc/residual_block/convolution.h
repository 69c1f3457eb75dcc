#pragma once

#include <utility>

#include "aten/aten.h"
#include "convolution_method/convolution_method.h"
#include "packed_convolution/packed_convolution.h"

// The convolutions of the passes, forward and backward: this package's own where they were measured to be faster, else
// torch's.
namespace fusedres {

// Whether this package's kernels take a convolution of this weight: of float32, and without groups.
bool takes_own(const aten::Tensor& weight, const aten::ConvolutionParams& params);

// How a convolution of this weight is fastest for an input of this shape.
Method method_for(const aten::Tensor& weight, const aten::ConvolutionParams& params, const aten::Shape& input,
                  Purpose purpose);

// A float32 weight in the order in which packed_convolution reads it.
struct Panels {
  ConvolutionMap map;  // the sizes of the input are those that it was packed for, and others may follow
  bool winograd;
  aten::Tensor data;
};

// Packs a weight for inputs like this; its rows are multiplied by `scale` unless that is null.
Panels pack(const aten::Tensor& weight, const aten::ConvolutionParams& params, const aten::Shape& input,
            const float* scale, int threads);

// What happens to the sums of a packed convolution as they are stored.
struct Epilogue {
  const float* bias;
  const aten::Tensor* shortcut = nullptr;  // is added
  bool relu = false;
  const aten::Tensor* out = nullptr;  // where the result goes; null: a fresh tensor
};

// Returns the result, undefined if it went to `epilogue.out`.
aten::Tensor convolution(const aten::Tensor& x, const Panels& weight, const Epilogue& epilogue, int threads);

// Returns conv(x) + bias. `bias` may be undefined.
aten::Tensor convolution(const aten::Tensor& x, const aten::Tensor& weight, const aten::ConvolutionParams& params,
                         int threads, const aten::Tensor& bias = aten::Tensor());

// What a convolution read: y itself, or with a state relu(BN(y)).
struct ConvolutionInput {
  const aten::Tensor& y;
  const aten::Tensor* state;
  aten::Tensor* room;  // with a state: memory for relu(BN(y)), used again from call to call
};

struct ConvolutionNeeds {
  bool input;
  bool weight;
};

// Returns the gradients of what the convolution read (in channels_last) and of the weight, each undefined unless
// needed.
std::pair<aten::Tensor, aten::Tensor> convolution_backward(const aten::Tensor& grad, const ConvolutionInput& input,
                                                           const aten::Tensor& weight,
                                                           const aten::ConvolutionParams& params,
                                                           ConvolutionNeeds needs, int threads);

}  // namespace fusedres
