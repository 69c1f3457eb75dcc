#pragma once

#include "bn_backward/bn_backward_cuda.h"

// The CUDA launches of this folder for C++. No CUDA header is needed: streams are void*.

namespace fusedres {

// Writes grad_x of each branch, and the sums if with_sums is set or a branch has batch statistics. Partials and
// coefficients are scratch memory.
void cuda_bn_add_relu_backward(const BnBackwardParams& params, void* stream);

}  // namespace fusedres
