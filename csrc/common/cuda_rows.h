#pragma once

// How the threads of an elementwise kernel share a [rows, channels] tensor. Plain C++: what is computed here is tested
// without a GPU.

#include <algorithm>
#include <cstdint>

#include "common/check.h"
#include "common/cuda_device.h"
#include "common/row_map.h"

namespace fusedres {

// The threads of all blocks, numbered through, take the vectors of the first `step` rows in the order of memory, then
// those of the next: a thread keeps its channels, whose coefficients it loads once, and neighbouring threads touch
// neighbouring memory whatever the number of channels. At most `vectors` − 1 threads of the grid have nothing to do.
struct RowGrid {
  unsigned blocks;
  unsigned threads;  // of a block
  uint32_t vectors;  // of a row
  uint32_t step;     // rows that the grid takes at once
};

constexpr int kRowThreads = 256;

// So many blocks a multiprocessor, all running at once: a kernel's launch bounds make its registers allow them. Every
// thread has work for at least one row.
inline RowGrid row_grid(const char* op, int64_t rows, int64_t channels, int vector, int blocks_each,
                        const CudaDevice& device) {
  const int64_t vectors = (channels + vector - 1) / vector;
  require(vectors <= INT32_MAX, op, "more than 2^31 - 1 vectors of channels");
  const int64_t threads = std::min(kRowThreads, device.max_block_threads);
  const int64_t resident = threads * blocks_each * device.multiprocessors;
  const int64_t wanted = rows > resident / vectors ? resident : rows * vectors;
  const int64_t blocks = (std::max(wanted, vectors) + threads - 1) / threads;
  return {static_cast<unsigned>(blocks), static_cast<unsigned>(threads), static_cast<uint32_t>(vectors),
          static_cast<uint32_t>(blocks * threads / vectors)};
}

// What thread `thread` of that grid takes: channels c to c + vector of rows row, row + step, … of `rows`, none where
// row is `rows` already.
struct RowShare {
  int64_t row;
  int64_t c;
};

constexpr RowShare row_share(const RowGrid& grid, uint32_t thread, int64_t rows, int vector) {
  const uint32_t row = thread / grid.vectors;
  return {row < grid.step ? row : rows, static_cast<int64_t>(thread % grid.vectors) * vector};
}

// RowMap::source_row for the device, where a division of 64 bits takes several times as long as one of 32.
class SourceRows {
 public:
  explicit SourceRows(const RowMap& map)
      : map_(map),
        out_height_(static_cast<uint32_t>(map.out_height())),
        out_width_(static_cast<uint32_t>(map.out_width())),
        narrow_(map.out_rows() <= UINT32_MAX) {}

  constexpr int64_t operator()(int64_t row) const {
    if (map_.stride == 1) return row;
    if (!narrow_) return map_.source_row(row);
    const uint32_t line = static_cast<uint32_t>(row) / out_width_, q = static_cast<uint32_t>(row) % out_width_;
    const uint32_t n = line / out_height_, p = line % out_height_;
    return (n * map_.height + p * map_.stride) * map_.width + q * map_.stride;
  }

 private:
  RowMap map_;
  uint32_t out_height_;
  uint32_t out_width_;
  bool narrow_;
};

}  // namespace fusedres
