#pragma once

#include "common/cuda_rows.h"

// Vector width and grid of shortcut_grad. The numbers are guesses: no GPU has measured them yet.

namespace fusedres {

constexpr int kShortcutGradRows = 2;    // rows that a thread loads at once
constexpr int kShortcutGradBlocks = 4;  // blocks per multiprocessor

struct ShortcutGradConfig {
  bool vectorised;  // 16 bytes per access, else one value
  RowGrid grid;
};

template <class T>
ShortcutGradConfig shortcut_grad_config(int64_t rows, int64_t x_channels, int64_t channels, bool aligned,
                                        const CudaDevice& device) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  const bool vectorised = aligned && x_channels % kVector == 0 && channels % kVector == 0;
  const int vector = vectorised ? kVector : 1;
  return {vectorised, row_grid("shortcut_grad_", rows, x_channels, vector, kShortcutGradBlocks, device)};
}

}  // namespace fusedres
