#pragma once

#include "bn_backward/bn_backward_cuda.h"

// The CUDA launches of this folder as C++ sees them: no CUDA header, streams as void*.

namespace fusedres {

// Writes grad_x of each branch; and sums, where with_sums is set or a branch has batch statistics. Partials and
// coefficients are scratch.
void cuda_bn_add_relu_backward(const BnBackwardParams& params, void* stream);

}  // namespace fusedres
