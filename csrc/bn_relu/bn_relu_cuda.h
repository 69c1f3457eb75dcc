#pragma once

#include "bn_relu/bn_relu.h"

namespace fusedres {

// bn_relu on the GPU; threads is not read.
void cuda_bn_relu(const BnReluParams& params, void* stream);

}  // namespace fusedres
