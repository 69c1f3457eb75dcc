#pragma once

// Divides a [rows, channels] tensor among the threads of an elementwise kernel. This is plain C++, so that tests need
// no GPU.

#include <algorithm>
#include <cstdint>

#include "common/check.h"
#include "common/cuda_device.h"
#include "common/row_map.h"

namespace fusedres {

// The threads of all blocks are numbered consecutively. They take the vectors of the first `step` rows in memory order,
// then those of the next `step` rows, and so on. So a thread keeps its channels and loads their coefficients once, and
// neighbouring threads access neighbouring memory for any number of channels. At most `vectors` − 1 threads of the grid
// are idle.
struct RowGrid {
  unsigned blocks;
  unsigned threads;  // of a block
  uint32_t vectors;  // of a row
  uint32_t step;     // rows that the grid takes at once
};

constexpr int kRowThreads = 256;

// Starts blocks_each blocks per multiprocessor, which all run at once: the launch bounds of the kernel limit its
// registers for that. There are fewer blocks if there are too few rows to give every thread at least one.
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

// The part of thread `thread` of that grid: channels c to c + vector of rows row, row + step, … below `rows`. It is
// empty if row equals `rows`.
struct RowShare {
  int64_t row;
  int64_t c;
};

constexpr RowShare row_share(const RowGrid& grid, uint32_t thread, int64_t rows, int vector) {
  const uint32_t row = thread / grid.vectors;
  return {row < grid.step ? row : rows, static_cast<int64_t>(thread % grid.vectors) * vector};
}

// RowMap::source_row for the device. It divides in 32 bits if the sizes allow it: a 64-bit division takes several times
// as long there.
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
