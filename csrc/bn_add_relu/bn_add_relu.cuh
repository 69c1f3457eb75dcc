#pragma once

// The tail of a residual block on the GPU: BatchNorm's affine map, shortcut, ReLU.
//
//     z[m, c] = scale[c]·x[m, c] + shift[c] + S[m, c]      out = relu(z)      mask = NOT (z <= 0)    (He et al. 2015)
//
// S is the shortcut unchanged, or the shortcut with its own scale and shift, or every stride-th pixel of it with zero
// channels appended. A thread owns 8 channels (one byte of the mask) of every step-th row (common/cuda_rows.h) and
// keeps their coefficients in registers. Reads x and the used pixels of the shortcut once. Writes out and, if wanted,
// one bit per element once.

#include "bn_add_relu/bn_add_relu.h"
#include "bn_add_relu/config.h"
#include "common/cuda_gate.cuh"
#include "common/cuda_rows.cuh"

namespace fusedres {

enum class Shortcut { kPlain, kNormalised, kMapped };

// Loads the owned channels from `source` on: by 16 bytes, or, if kVector is 1, the first `count` channels one by one,
// and 0 for the others.
template <int kVector, class T>
__device__ __forceinline__ Packed<T, kBnAddReluOwned> load_owned(const T* source, int64_t count) {
  if constexpr (kVector > 1) {
    return load_packed<kBnAddReluOwned>(source);
  } else {
    Packed<T, kBnAddReluOwned> owned{};
#pragma unroll
    for (int i = 0; i < kBnAddReluOwned; ++i)
      if (i < count) owned.values[i] = source[i];
    return owned;
  }
}

template <int kVector, class T>
__device__ __forceinline__ void store_owned(T* target, const Lanes<Arithmetic<T>, kBnAddReluOwned>& values,
                                            int64_t count) {
  if constexpr (kVector == 1) {
#pragma unroll
    for (int i = 0; i < kBnAddReluOwned; ++i)
      if (i < count) target[i] = to_storage<T>(values[i]);
  } else {
    store(target, values);
  }
}

template <int kVector, class A>
__device__ __forceinline__ Affine<A, kBnAddReluOwned> load_owned_affine(const void* state, int64_t channels, int64_t c,
                                                                        int64_t count) {
  const A* from = static_cast<const A*>(state) + c;
  return {unpack(load_owned<kVector>(from + 2 * channels, count)),
          unpack(load_owned<kVector>(from + 3 * channels, count))};
}

template <class T, int kVector, Shortcut kShortcut>
__global__ void __launch_bounds__(kRowThreads, kBnAddReluBlocks<T>)
    bn_add_relu_kernel(const BnAddReluParams p, const SourceRows source, const int64_t rows, const RowGrid grid) {
  using A = Arithmetic<T>;
  constexpr int kOwned = kBnAddReluOwned;
  const RowShare share = row_share<kOwned>(grid, rows);
  const int64_t c = share.c, step = grid.step, count = p.channels - c;
  if (share.row >= rows) return;
  const int64_t reached = kShortcut == Shortcut::kMapped ? p.shortcut_channels - c : count;
  const T* x = static_cast<const T*>(p.x) + c;
  const T* shortcut = static_cast<const T*>(p.shortcut) + c;
  T* out = static_cast<T*>(p.out) + c;
  const auto map = load_owned_affine<kVector, A>(p.state, p.channels, c, count);
  Affine<A, kOwned> shortcut_map{};
  if constexpr (kShortcut == Shortcut::kNormalised)
    shortcut_map = load_owned_affine<kVector, A>(p.shortcut_state, p.channels, c, count);

  for_rows<kBnAddReluRows<T, kVector>>(share.row, rows, step, [&](auto at_once, int64_t row) {
    Packed<T, kOwned> loaded[at_once], branch[at_once]{};
#pragma unroll
    for (int r = 0; r < at_once; ++r) {
      const int64_t m = row + r * step;
      loaded[r] = load_owned<kVector>(x + element(m, p.channels, 0), count);
      const int64_t pixel = kShortcut == Shortcut::kMapped ? source(m) : m;
      if (kShortcut != Shortcut::kMapped || reached > 0)
        branch[r] = load_owned<kVector>(shortcut + element(pixel, p.shortcut_channels, 0), reached);
    }
#pragma unroll
    for (int r = 0; r < at_once; ++r) {
      auto z = apply(map, unpack(loaded[r]));
      auto added = unpack(branch[r]);
      if constexpr (kShortcut == Shortcut::kNormalised) added = apply(shortcut_map, added);
      unsigned bits = 0;
#pragma unroll
      for (int i = 0; i < kOwned; ++i) {
        z[i] += added[i];
        bits |= static_cast<unsigned>(!(z[i] <= 0)) << i;  // z is 0 after the last channel
      }
      store_owned<kVector>(out + element(row + r * step, p.channels, 0), relu(z), count);
      if (p.mask != nullptr) p.mask[bits_byte(row + r * step, p.channels, c)] = static_cast<uint8_t>(bits);
    }
  });
}

}  // namespace fusedres
