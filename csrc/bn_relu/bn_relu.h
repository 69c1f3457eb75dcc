#pragma once

#include "common/dtype.h"
#include "common/row_map.h"

namespace fusedres {

struct BnReluParams {
  const void* x;  // [batch, height, width, channels] of map
  DType dtype;
  RowMap map;
  int64_t channels;
  const void* state;  // [4, channels] arithmetic type: mean, invstd, scale, shift; null: no affine and no ReLU
  const void* pivot;  // [channels] arithmetic type, subtracted last; may be null
  void* out;          // [map.out_rows(), channels]; may be x where the stride is 1
  int threads;
};

// out = relu(scale·x + shift) - pivot, for every stride-th pixel.
void bn_relu(const BnReluParams& params);

}  // namespace fusedres
