#pragma once

#include "common/cuda_rows.h"

// Vector width and grid of bn_add_relu. The numbers are guesses: no GPU has measured them yet.

namespace fusedres {

constexpr int kBnAddReluOwned = 8;  // channels of a thread; their bits are one byte of the mask

// Rows that a thread loads at once: 32 bytes of each operand, but at least one row.
template <class T, int kVector>
constexpr int kBnAddReluRows = sizeof(T) == 2 && kVector > 1 ? 2 : 1;

// Blocks per multiprocessor.
template <class T>
constexpr int kBnAddReluBlocks = sizeof(T) == 8 ? 2 : 3;

struct BnAddReluConfig {
  bool vectorised;  // 16 bytes per access, else one value
  RowGrid grid;
};

template <class T>
BnAddReluConfig bn_add_relu_config(int64_t rows, int64_t channels, int64_t shortcut_channels, bool aligned,
                                   const CudaDevice& device) {
  const bool vectorised = aligned && channels % kBnAddReluOwned == 0 && shortcut_channels % kBnAddReluOwned == 0;
  return {vectorised, row_grid("bn_add_relu", rows, channels, kBnAddReluOwned, kBnAddReluBlocks<T>, device)};
}

}  // namespace fusedres
