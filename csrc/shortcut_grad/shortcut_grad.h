#pragma once

#include "common/dtype.h"
#include "common/gate.h"
#include "common/row_map.h"

namespace fusedres {

struct ShortcutGradParams {
  void* grad_x;  // [batch, height, width, x_channels] of map, updated in place
  DType dtype;
  RowMap map;
  int64_t x_channels;
  const void* grad;  // [map.out_rows(), channels]
  int64_t channels;  // at least x_channels
  Gate gate;         // kNone, kBits or kOutput, over grad's channels
  int threads;
};

// grad_x[n, p·stride, q·stride, c] += d[n, p, q, c] for c < x_channels, where d is the gradient that passes the gate.
// This is the transpose of an identity, subsampled or zero-padded shortcut, added to the gradient of the branch.
void shortcut_grad(const ShortcutGradParams& params);

}  // namespace fusedres
