#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/gate.h"

// The CUDA launches of this folder as C++ sees them: no CUDA header, streams as void*.

namespace fusedres {

// One of the raw convolution outputs that meet in a ReLU. A is the arithmetic type of the activations.
struct BnBackwardBranch {
  const void* x;      // [rows, channels]; null in apply where nothing needs it
  const void* state;  // [4, channels] of A: mean, invstd, scale, shift
  bool batch_statistics;
  void* coefficients;  // [4, channels] of A: a, c1, mean, k; null in apply: a is state's scale, c1 = k = 0
  void* grad_x;        // [rows, channels]; may be x, or grad
};

// The three steps in launches of their own, or all in one cooperative launch: the same bits.
enum class BnBackwardLaunches : int { kChosen = 0, kSeparate = 1, kFused = 2 };

struct BnBackwardParams {
  DType dtype;  // of grad, x, the ReLU's output and grad_x
  int64_t rows;
  int64_t channels;
  const void* grad;
  Gate gate;  // kRecompute: of the first branch, and there is no other
  int branches;
  BnBackwardBranch branch[2];
  int64_t count;      // that sums are divided by
  int64_t tile_rows;  // that a partial sums
  int64_t tiles;
  void* partials;  // [tiles, 1 + branches, channels] of A: Σd, Σd·x̂ of each branch
  void* sums;      // [1 + branches, channels] of A

  // Of bn_add_relu_backward alone.
  bool with_sums;  // even where the gradients need none
  BnBackwardLaunches launches;
};

// Reads grad, the gate, x and state; writes partials.
void cuda_bn_backward_reduce(const BnBackwardParams& params, void* stream);

// Reads partials and state; writes sums and coefficients. dtype may be A's.
void cuda_bn_backward_coefficients(const BnBackwardParams& params, void* stream);

// Reads grad, the gate, x and coefficients; writes grad_x.
void cuda_bn_backward_apply(const BnBackwardParams& params, void* stream);

}  // namespace fusedres
