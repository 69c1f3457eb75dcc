#pragma once

#include "common/cuda_rows.h"

// Vector width and grid of bn_relu. The numbers are guesses: no GPU has measured them yet.

namespace fusedres {

constexpr int kBnReluRows = 4;    // rows that a thread loads at once
constexpr int kBnReluBlocks = 3;  // blocks per multiprocessor

struct BnReluConfig {
  bool vectorised;  // 16 bytes per access, else one value
  RowGrid grid;
};

template <class T>
BnReluConfig bn_relu_config(int64_t rows, int64_t channels, bool aligned, const CudaDevice& device) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  const bool vectorised = aligned && channels % kVector == 0;
  const int vector = vectorised ? kVector : 1;
  return {vectorised, row_grid("bn_relu", rows, channels, vector, kBnReluBlocks, device)};
}

}  // namespace fusedres
