#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fusedres {

// The index of this thread among all threads along x. It has 64 bits, as tensors may have more than 2^31 elements.
__device__ __forceinline__ int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ int64_t thread_count() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

// The index of element (row, c) of a dense [rows, channels] tensor.
__device__ __forceinline__ int64_t element(int64_t row, int64_t channels, int64_t c) {
  return row * channels + c;
}

template <int kRows>
struct RowCount {
  static constexpr int value = kRows;
  constexpr operator int() const { return kRows; }
};

// Calls body(RowCount, row) for rows first, first + step, … below last. It takes kBatch rows at a time (row, row +
// step, …), so that their loads overlap, then the remaining rows one at a time.
template <int kBatch, class Body>
__device__ __forceinline__ void for_rows(int64_t first, int64_t last, int64_t step, const Body& body) {
  int64_t row = first;
  for (; row + (kBatch - 1) * step < last; row += kBatch * step) body(RowCount<kBatch>{}, row);
  for (; row < last; row += step) body(RowCount<1>{}, row);
}

}  // namespace fusedres
