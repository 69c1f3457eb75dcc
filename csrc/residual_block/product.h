#pragma once

#include "aten/aten.h"
#include "common/convolution_map.h"

// Convolutions without groups as products of matrices with a row for each pixel of the output, in channels_last.
namespace fusedres {

// The forward pass of a convolution that reads one pixel for each pixel of its output; the weight is a dense matrix.
aten::Tensor product(const aten::Tensor& x, const aten::Tensor& weight);

// The gradient of its input.
aten::Tensor product_input_gradient(const aten::Tensor& grad, const aten::Tensor& weight);

// The gradient of any convolution's weight, in the layout of the weight, which must be dense. What the taps read is
// gathered first, unless each reads one pixel.
aten::Tensor product_weight_gradient(const aten::Tensor& grad, const aten::Tensor& x, const aten::Tensor& weight,
                                     const ConvolutionMap& map, int threads);

}  // namespace fusedres
