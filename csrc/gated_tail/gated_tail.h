#pragma once

#include "common/activation.h"
#include "common/dtype.h"
#include "common/gate.h"
#include "common/row_map.h"

namespace fusedres {

// One of the two terms of a residual sum: factor ⊙ σ(logits) ⊙ x, with x normalised by its state.
struct TailTerm {
  const void* x = nullptr;       // [rows, channels]; null: there is no such term
  const void* state = nullptr;   // [4, channels] arithmetic type: mean, invstd, scale, shift; null: x as it is
  const void* factor = nullptr;  // [1 or batch, channels] arithmetic type; null: 1
  bool per_sample = false;       // factor has a row for each sample
  const void* logits = nullptr;  // [rows, channels]; null: no such gate
  // Only for the gradients:
  // [1 or batch, 4, channels] arithmetic type: a, c1, μ, k; null: x is not normalised.
  const void* coefficients = nullptr;
  bool own_coefficients = false;  // coefficients has rows for each sample, as some factor has
  void* grad_x = nullptr;         // [rows, channels]; null: not needed
  void* grad_logits = nullptr;    // [rows, channels]; null: not needed
};

// out = act(branch + shortcut), or act(branch's x) in the branch if before_add.
struct GatedTailParams {
  DType dtype;
  int64_t batch;
  int64_t pixels;  // rows of a sample
  int64_t channels;
  TailTerm branch;
  TailTerm shortcut;
  Activation activation;
  bool before_add;
  const void* slope;  // [channels] arithmetic type, of a leaky ReLU
  bool coupled;       // the shortcut's gate is 1 - σ(logits of the branch)
  int threads;

  int64_t rows() const { return batch * pixels; }
  bool per_sample() const { return branch.per_sample || shortcut.per_sample; }
  int64_t groups() const { return per_sample() ? batch : 1; }  // rows of one group have the same factors
};

// The pixels and the channels of the shortcut that the forward reads: all of them, or every stride-th pixel, with zeros
// in the channels that the shortcut lacks.
struct TailShortcut {
  RowMap map;
  int64_t channels;  // 0: there is no shortcut
};

struct GatedTailResults {
  void* out;      // [rows, channels]; may be the branch's x
  uint8_t* mask;  // [rows, ceil(channels / 8)], bit set where the ReLU or leaky ReLU passes the gradient; may be null
};

struct GatedTailGradient {
  const void* grad;             // [rows, channels], of out
  const void* mask;             // that of the forward; null: the activation's argument is computed again
  const void* added = nullptr;  // [rows, channels], is added to the branch's grad_x; null: nothing is
};

// The rows of the sums below.
constexpr int kTailSums = 6;

void gated_tail(const GatedTailParams& params, const GatedTailResults& results);

// sums[groups][kTailSums][channels], arithmetic type. With q and p the gradients of the normalised x of the branch and
// of the shortcut, without factors, and x̂ = (x - mean)·invstd, or x itself without a state:
//   Σq, Σq·x̂, Σp·x̂ of the shortcut, Σp, Σ of the gradient of factor if the activation is before the add, and Σ of the
//   gradient of slope, without the branch's factor if the activation is before the add.
// The third and fourth are 0 without a shortcut, the last two where they are not wanted.
void gated_tail_reduce(const GatedTailParams& params, const GatedTailGradient& gradient, bool slope_wanted, void* sums);

// With d = factor⊙q, or factor⊙p: grad_x = a·(d - c1 - (x - μ)·k), where k = c1 = 0 gives a·d whatever x is.
void gated_tail_apply(const GatedTailParams& params, const GatedTailGradient& gradient);

}  // namespace fusedres
