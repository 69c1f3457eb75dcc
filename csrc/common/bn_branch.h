#pragma once

namespace fusedres {

// One normalised branch that enters a ReLU, as backward sees it: z = scale·x + shift.
struct BnBranch {
  const void* x = nullptr;        // [rows, channels]; null: no such branch
  const void* state = nullptr;    // [4, channels] arithmetic type: mean, invstd, scale, shift
  void* grad_x = nullptr;         // [rows, channels]; may be the gradient itself, or x (in place)
  bool batch_statistics = false;  // false: mean and invstd are constants
};

}  // namespace fusedres
