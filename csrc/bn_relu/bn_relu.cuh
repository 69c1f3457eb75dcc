#pragma once

// BatchNorm's affine map and ReLU on the GPU.
//
//     out[m, c] = relu(scale[c]·x[m, c] + shift[c]) − pivot[c]                        (Ioffe and Szegedy 2015)
//
// m runs over every stride-th pixel. A thread owns kVector channels of every step-th row (common/cuda_rows.h) and keeps
// their coefficients in registers. Reads the used pixels of x once and writes out once.

#include "bn_relu/bn_relu.h"
#include "bn_relu/config.h"
#include "common/cuda_index.cuh"
#include "common/cuda_rows.cuh"

namespace fusedres {

template <class T, int kVector, bool kStrided>
__global__ void __launch_bounds__(kRowThreads, kBnReluBlocks)
    bn_relu_kernel(const BnReluParams p, const SourceRows source, const int64_t rows, const RowGrid grid) {
  using A = Arithmetic<T>;
  const RowShare share = row_share<kVector>(grid, rows);
  const int64_t c = share.c, step = grid.step;
  if (share.row >= rows) return;
  const T* x = static_cast<const T*>(p.x) + c;
  T* out = static_cast<T*>(p.out) + c;
  const bool normalise = p.state != nullptr;
  Affine<A, kVector> map{};
  Lanes<A, kVector> pivot{};
  if (normalise) map = load_affine<kVector>(static_cast<const A*>(p.state), p.channels, c);
  if (p.pivot != nullptr) pivot = load<kVector>(static_cast<const A*>(p.pivot) + c);

  for_rows<kBnReluRows>(share.row, rows, step, [&](auto count, int64_t row) {
    Packed<T, kVector> loaded[count];
#pragma unroll
    for (int r = 0; r < count; ++r) {
      const int64_t m = row + r * step;
      loaded[r] = load_packed<kVector>(x + element(kStrided ? source(m) : m, p.channels, 0));
    }
#pragma unroll
    for (int r = 0; r < count; ++r) {
      auto z = unpack(loaded[r]);
      if (normalise) z = relu(apply(map, z));
#pragma unroll
      for (int i = 0; i < kVector; ++i) z[i] -= pivot[i];
      store(out + element(row + r * step, p.channels, 0), z);
    }
  });
}

}  // namespace fusedres
