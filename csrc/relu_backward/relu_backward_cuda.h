#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/gate.h"

// The CUDA launches of this folder for C++. No CUDA header is needed: streams are void*.

namespace fusedres {

struct ReluBackwardParams {
  DType dtype;  // of grad, the ReLU's output and d
  int64_t rows;
  int64_t channels;
  const void* grad;
  Gate gate;  // kBits or kOutput
  void* d;
  int64_t tile_rows;  // rows that each partial sums
  int64_t tiles;
  void* partials;  // [tiles, channels], like sums float64 for float64, else float32
  void* sums;      // [channels]
};

void cuda_relu_backward(const ReluBackwardParams& params, void* stream);

}  // namespace fusedres
