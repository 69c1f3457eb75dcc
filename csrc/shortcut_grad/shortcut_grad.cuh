#pragma once

// The shortcut's share of the input gradient on the GPU.
//
//     grad_x[n, p·stride, q·stride, c] += d[m, c]      d = grad where the gate is open, else 0; m = (n, p, q)
//
// A thread owns kVector channels of grad_x of every step-th row (common/cuda_rows.h). Reads those channels of grad and
// the gate once. Reads and writes every stride-th pixel of grad_x once.

#include "common/cuda_gate.cuh"
#include "common/cuda_rows.cuh"
#include "shortcut_grad/config.h"
#include "shortcut_grad/shortcut_grad.h"

namespace fusedres {

template <class T, int kVector, GateKind kGate>
__global__ void __launch_bounds__(kRowThreads, kShortcutGradBlocks)
    shortcut_grad_kernel(const ShortcutGradParams p, const SourceRows source, const int64_t rows, const RowGrid grid) {
  const RowShare share = row_share<kVector>(grid, rows);
  const int64_t c = share.c, step = grid.step;
  const T* grad = static_cast<const T*>(p.grad) + c;
  T* grad_x = static_cast<T*>(p.grad_x) + c;

  for_rows<kShortcutGradRows>(share.row, rows, step, [&](auto count, int64_t row) {
    Lanes<Arithmetic<T>, kVector> d[count];
    Packed<T, kVector> into[count];
    T* target[count];
#pragma unroll
    for (int r = 0; r < count; ++r) {
      target[r] = grad_x + element(source(row + r * step), p.x_channels, 0);
      d[r] = load<kVector>(grad + element(row + r * step, p.channels, 0));
      into[r] = load_packed<kVector>(target[r]);
    }
#pragma unroll
    for (int r = 0; r < count; ++r) d[r] = gated<kGate, T>(p.gate, row + r * step, p.channels, c, d[r]);
#pragma unroll
    for (int r = 0; r < count; ++r) {
      auto total = unpack(into[r]);
#pragma unroll
      for (int i = 0; i < kVector; ++i) total[i] += d[r][i];
      store(target[r], total);
    }
  });
}

}  // namespace fusedres
