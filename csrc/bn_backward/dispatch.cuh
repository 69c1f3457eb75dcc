#pragma once

#include "bn_backward/bn_backward_cuda.h"
#include "common/check.h"
#include "common/cuda_launch.cuh"
#include "common/cuda_vector.cuh"

namespace fusedres {

// The kernel's template arguments.
template <class Storage, int kLanes, int kCount>
struct BnBackwardKind {
  using T = Storage;
  using A = Arithmetic<T>;
  static constexpr int kVector = kLanes;
  static constexpr int kMergeVector = kLanes == 1 ? 1 : kVectorOf<A>;  // of values of A
  static constexpr int kBranches = kCount;
};

// Whether rows are whole vectors of `lanes` channels that can be accessed by 16 bytes. Null pointers are not used.
inline bool is_vectorised(const BnBackwardParams& p, int lanes) {
  bool vectorised = p.channels % lanes == 0 && is_aligned(p.grad) && is_aligned(p.partials) && is_aligned(p.sums);
  if (p.gate.kind == GateKind::kOutput) vectorised = vectorised && is_aligned(p.gate.data);
  for (int b = 0; b < p.branches; ++b) {
    const BnBackwardBranch& branch = p.branch[b];
    vectorised = vectorised && is_aligned(branch.x) && is_aligned(branch.state) && is_aligned(branch.coefficients) &&
                 is_aligned(branch.grad_x);
  }
  return vectorised;
}

// Calls function(BnBackwardKind).
template <class Function>
void dispatch_bn_backward(const BnBackwardParams& p, const Function& function) {
  dispatch_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kVector = kVectorOf<T>;
    const bool vectorised = is_vectorised(p, kVector);
    if (p.branches == 1) {
      if (vectorised)
        function(BnBackwardKind<T, kVector, 1>{});
      else
        function(BnBackwardKind<T, 1, 1>{});
    } else {
      if (vectorised)
        function(BnBackwardKind<T, kVector, 2>{});
      else
        function(BnBackwardKind<T, 1, 2>{});
    }
  });
}

}  // namespace fusedres
