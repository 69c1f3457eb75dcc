#pragma once

#include <cstdint>

#include "common/convolution_map.h"
#include "common/dtype.h"

namespace fusedres {

struct ConvWgradParams {
  DType dtype;
  const void* grad;          // [out pixels, out_channels]
  const uint8_t* gate;       // packed bits of grad, only with y; may be null
  const void* y;             // like grad; null: grad is the gradient of the convolution's output itself
  const void* coefficients;  // [4, out_channels] arithmetic type: a, c1, mean, k, with y
  const void* input;         // [batch, height, width, channels]
  const void* input_state;   // [4, channels] arithmetic type; null: the input is read as it is
  ConvolutionMap map;
  void* partials;  // [conv_wgrad_splits(map), out_channels, kernel rows, kernel columns, channels] arithmetic type
  int threads;
};

// How many sums over parts of the pixels conv_wgrad leaves. It depends only on the problem.
int64_t conv_wgrad_splits(const ConvolutionMap& map);

// partials[s][k][r][c'][c] = Σ dy[pixel][k]·h[pixel at tap (r, c')][c] over the pixels of split s, with
// dy = a·(d - c1 - (y - mean)·k), d = grad where the gate is open, and h = relu(scale·input + shift), both rounded to
// the dtype.
void conv_wgrad(const ConvWgradParams& params);

struct ConvWgradFinalizeParams {
  DType partials_dtype;
  const void* partials;  // [splits, out_channels, kernel rows, kernel columns, channels]
  int64_t splits;
  ConvolutionMap map;  // only the sizes of the weight are read
  DType dtype;
  void* grad_weight;
  WeightStrides strides;  // of grad_weight
  int threads;
};

// grad_weight = Σ partials over the splits, in order, rounded once.
void conv_wgrad_finalize(const ConvWgradFinalizeParams& params);

}  // namespace fusedres
