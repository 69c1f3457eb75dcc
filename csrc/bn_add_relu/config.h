#pragma once

#include "common/cuda_rows.h"

// Vectors and grid of bn_add_relu. Guesses: no GPU has measured them yet.

namespace fusedres {

constexpr int kBnAddReluOwned = 8;  // channels of a thread: their bits are a byte of the mask

// Rows of a thread, under way at once: 32 bytes of each operand, and never less than one.
template <class T, int kVector>
constexpr int kBnAddReluRows = sizeof(T) == 2 && kVector > 1 ? 2 : 1;

// Blocks of a multiprocessor.
template <class T>
constexpr int kBnAddReluBlocks = sizeof(T) == 8 ? 2 : 3;

struct BnAddReluConfig {
  bool vectorised;  // 16 bytes an access, else one value
  RowGrid grid;
};

template <class T>
BnAddReluConfig bn_add_relu_config(int64_t rows, int64_t channels, int64_t shortcut_channels, bool aligned,
                                   const CudaDevice& device) {
  const bool vectorised = aligned && channels % kBnAddReluOwned == 0 && shortcut_channels % kBnAddReluOwned == 0;
  return {vectorised, row_grid("bn_add_relu", rows, channels, kBnAddReluOwned, kBnAddReluBlocks<T>, device)};
}

}  // namespace fusedres
