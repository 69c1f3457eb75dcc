#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/gate.h"

// The CUDA launches of this folder for C++. No CUDA header is needed: streams are void*.

namespace fusedres {

// One of the raw convolution outputs that are added before a ReLU. A is the arithmetic type of the activations.
struct BnBackwardBranch {
  const void* x;      // [rows, channels]; may be null in apply if it is not needed
  const void* state;  // [4, channels] of A: mean, invstd, scale, shift
  bool batch_statistics;
  void* coefficients;  // [4, channels] of A: a, c1, mean, k; null in apply: a is state's scale, c1 = k = 0
  void* grad_x;        // [rows, channels]; may be x, or grad
};

// One launch for each of the three steps, or one cooperative launch for all. The results are the same, bit by bit.
enum class BnBackwardLaunches : int { kChosen = 0, kSeparate = 1, kFused = 2 };

struct BnBackwardParams {
  DType dtype;   // of grad, x, the ReLU's output and grad_x
  int64_t rows;  // in coefficients, only what the sums are divided by
  int64_t channels;
  const void* grad;
  Gate gate;  // kRecompute: of the first branch, which must be the only one
  int branches;
  BnBackwardBranch branch[2];
  int64_t tile_rows;  // rows that each partial sums
  int64_t tiles;
  void* partials;  // [tiles, 1 + branches, channels] of A: Σd, Σd·x̂ of each branch
  void* sums;      // [1 + branches, channels] of A

  // Only read by bn_add_relu_backward.
  bool with_sums;  // compute the sums even if the gradients do not need them
  BnBackwardLaunches launches;
};

// Reads grad, the gate, x and state; writes partials.
void cuda_bn_backward_reduce(const BnBackwardParams& params, void* stream);

// Reads partials and state; writes sums and coefficients. dtype may be that of A.
void cuda_bn_backward_coefficients(const BnBackwardParams& params, void* stream);

// Reads grad, the gate, x and coefficients; writes grad_x.
void cuda_bn_backward_apply(const BnBackwardParams& params, void* stream);

}  // namespace fusedres
