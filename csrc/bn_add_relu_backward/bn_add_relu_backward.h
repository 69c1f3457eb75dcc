#pragma once

#include "common/bn_branch.h"
#include "common/dtype.h"
#include "common/gate.h"

namespace fusedres {

struct BnAddReluBackwardParams {
  const void* grad;  // [rows, channels]
  DType dtype;
  int64_t rows;
  int64_t channels;
  Gate gate;
  BnBranch branch;
  BnBranch shortcut;  // the projection's branch; shortcut.x may be null
  void* sums;         // [3, channels] arithmetic type: Σd, Σd·x̂, Σd·x̂ of the shortcut
  int threads;
  const void* added = nullptr;  // [rows, channels], is added to the branch's grad_x; null: nothing is
};

// Computes the sums above per channel, in one pass over both branches. d is the gradient that passes the ReLU.
void bn_add_relu_backward_reduce(const BnAddReluBackwardParams& params);

// grad_x = scale·(d - Σd/M - x̂·Σd·x̂/M) with batch statistics, scale·d without, for both branches in one pass.
void bn_add_relu_backward_elementwise(const BnAddReluBackwardParams& params);

}  // namespace fusedres
