#pragma once

#include <cstdint>

#include "common/bn_branch.h"
#include "common/dtype.h"

namespace fusedres {

// The sizes of x, [batch, height, width, channels]. The centre of window (p, q) is pixel (2p, 2q). Its places are
// numbered 0 to 8 in row-major order. Place 9 means that the ReLU of the window is closed: its stored maximum is <= 0.
struct PoolShape {
  int64_t batch;
  int64_t height;
  int64_t width;
  int64_t channels;

  int64_t out_height() const { return (height + 1) / 2; }
  int64_t out_width() const { return (width + 1) / 2; }
  int64_t windows() const { return batch * out_height() * out_width(); }
};

struct BnReluMaxpoolParams {
  const void* x;
  DType dtype;
  PoolShape shape;
  const void* state;  // [4, channels] arithmetic type: mean, invstd, scale, shift
  void* out;          // [windows, channels]
  uint8_t* argmax;    // [windows, channels], the place of the maximum; may be null
  int threads;
};

// out = maxpool3x3, stride 2, padding 1, of relu(scale·x + shift). The first of equal maxima wins, but the last of
// several NaNs.
void bn_relu_maxpool(const BnReluMaxpoolParams& params);

struct BnReluMaxpoolBackwardParams {
  const void* grad;  // [windows, channels]
  DType dtype;
  PoolShape shape;
  const uint8_t* argmax;  // [windows, channels]
  BnBranch branch;        // x, its state, grad_x
  void* sums;             // [2, channels] arithmetic type: Σd, Σd·x̂
  int threads;
};

// Computes the sums above per channel. d is the gradient of scale·x + shift.
void bn_relu_maxpool_backward_reduce(const BnReluMaxpoolBackwardParams& params);

// grad_x = scale·(d - Σd/M - x̂·Σd·x̂/M) with batch statistics, scale·d without.
void bn_relu_maxpool_backward_elementwise(const BnReluMaxpoolBackwardParams& params);

}  // namespace fusedres
