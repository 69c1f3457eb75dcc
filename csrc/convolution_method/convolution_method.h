#pragma once

#include "common/convolution_map.h"
#include "common/dtype.h"

namespace fusedres {

// What a convolution of this package would be run for.
enum class Purpose : int {
  kFrozen = 0,  // a forward pass whose weight was packed before
  kForward = 1,
  kInputGradient = 2,
  kWeightGradient = 3,
};

enum class Method : int {
  kLibrary = 0,  // oneDNN's convolution
  kOwn = 1,      // packed_convolution; for gradients of weights conv_wgrad
  kProduct = 2,  // torch's product of matrices
};

// How a convolution without groups was measured to be fastest on a processor like this one. The map is that of the
// forward pass. benchmarks/bench_convolution.py measures it.
Method fastest_method(const ConvolutionMap& map, DType dtype, Purpose purpose);

// Whether packed_convolution can run a convolution by Winograd's algorithm: 3x3 taps side by side, and not few
// channels.
bool takes_winograd(const ConvolutionMap& map);

// Whether it can, and was measured to be faster so, with a weight that was packed before or is packed in the same call.
bool winograd_is_faster(const ConvolutionMap& map, bool packed_before);

// The convolution of an output's gradient that gives the gradient of the input, with the weight turned around; the
// stride must be 1.
ConvolutionMap turned(const ConvolutionMap& map);

}  // namespace fusedres
