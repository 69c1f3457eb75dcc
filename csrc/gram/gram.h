#pragma once

#include "common/dtype.h"
#include "common/row_map.h"

namespace fusedres {

struct GramParams {
  const void* x;  // [batch, height, width, channels] of map
  DType dtype;
  RowMap map;
  int64_t channels;
  const void* state;  // [4, channels] arithmetic type: mean, invstd, scale, shift; null: no affine and no ReLU
  void* out;          // [map.out_rows(), channels]: z - pivot
  void* pivot;        // [channels] arithmetic type: the average of the first rows of z
  double* sum;        // [channels]: Σ(z - pivot)
  double* gram;       // [channels, channels]: Σ(z - pivot)(z - pivot)ᵀ
  int threads;
};

// Computes z = relu(scale·x + shift) for every stride-th pixel, centred on a pivot, with its column sums and Gram
// matrix. The batch statistics of any 1x1 convolution of z follow from them before the convolution runs.
void gram(const GramParams& params);

}  // namespace fusedres
