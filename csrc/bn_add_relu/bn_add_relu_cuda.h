#pragma once

#include "bn_add_relu/bn_add_relu.h"

namespace fusedres {

// bn_add_relu on the GPU; threads is not read.
void cuda_bn_add_relu(const BnAddReluParams& params, void* stream);

}  // namespace fusedres
