#pragma once

#include "common/bn_branch.h"
#include "common/dtype.h"
#include "common/norm.h"

namespace fusedres {

// The buffer of a dense block: rows (pixels) of `width` channels, of which a layer reads the first ones.
struct DenseBuffer {
  void* data;  // [rows, width]
  DType dtype;
  int64_t rows;
  int64_t width;
};

struct DenseAppendParams {
  DenseBuffer buffer;
  const void* x;  // [rows, channels]
  int64_t channels;
  int64_t first;
  double* moments;  // [width][2], of which the appended channels are written; may be null
  int threads;
};

// Copies x into the buffer's channels from `first` on. The moments are the mean and the sum of squared deviations.
void dense_append(const DenseAppendParams& params);

struct DenseBnReluParams {
  DenseBuffer buffer;
  const void* state;  // [4, channels] arithmetic type: mean, invstd, scale, shift
  int64_t channels;
  void* out;  // [rows, channels]
  int threads;
};

// out = relu(scale·x + shift) of the buffer's first channels.
void dense_bn_relu(const DenseBnReluParams& params);

struct DenseBnReluBackwardParams {
  DenseBuffer buffer;
  const void* grad;  // [rows, channels], of dense_bn_relu's result
  const void* state;
  int64_t channels;
  bool batch_statistics;
  void* grad_x;         // [rows, width], updated in place
  double* corrections;  // [width][2], updated in place with batch statistics
  void* sums;           // [2, channels] arithmetic type: Σd, Σd·x̂
  int threads;
};

// grad_x += scale·d with d = grad where the ReLU is open. The corrections get scale·Σd/M and scale·invstd·Σd·x̂/M.
void dense_bn_relu_backward(const DenseBnReluBackwardParams& params);

struct DenseGradientParams {
  DenseBuffer buffer;
  const void* grad_x;         // [rows, width]
  const double* moments;      // [width][2]; null, as the corrections: the gradient is that of grad_x
  const double* corrections;  // [width][2]
  int64_t first;
  int64_t channels;
  void* out;  // [rows, channels]
  int threads;
};

// out = grad_x - corrections[0] - corrections[1]·(x - mean) of the channels from `first` on.
void dense_gradient(const DenseGradientParams& params);

// The state of a BatchNorm of the buffer's first channels, from their moments; running statistics are updated.
void bn_from_moments(DType dtype, int64_t rows, int64_t channels, const double* moments, void* state, const Norm& norm);

}  // namespace fusedres
