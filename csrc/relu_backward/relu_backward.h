#pragma once

#include "common/dtype.h"
#include "common/gate.h"

namespace fusedres {

struct ReluBackwardParams {
  const void* grad;  // [rows, channels]
  DType dtype;
  int64_t rows;
  int64_t channels;
  Gate gate;   // kBits or kOutput
  void* d;     // [rows, channels]
  void* sums;  // [channels] arithmetic type
  int threads;
};

// Computes d, which is grad where the gate is open, else 0, and its column sums.
void relu_backward(const ReluBackwardParams& params);

}  // namespace fusedres
