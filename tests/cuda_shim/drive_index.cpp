// Index arithmetic beyond 2^31 elements, which is more than the kernels of the tests reach.

#include "common/cuda_gate.cuh"
#include "common/cuda_index.cuh"
#include "common/cuda_rows.h"
#include "common/row_map.h"
#include "driver.h"

namespace driver {
namespace {

void index() {
  const auto expect = [](const char* what, int64_t got, int64_t want) {
    expect_near(what, static_cast<double>(got - want), 0, 0);
  };
  blockIdx = {(1u << 31) - 2, 0, 0};
  blockDim = dim3(1024);
  gridDim = dim3((1u << 31) - 1);
  threadIdx = {1023, 0, 0};
  expect("thread_index", thread_index(), ((int64_t{1} << 31) - 2) * 1024 + 1023);
  expect("thread_count", thread_count(), ((int64_t{1} << 31) - 1) * 1024);
  expect("element", element(int64_t{1} << 31, 2048, 2047), (int64_t{1} << 42) + 2047);
  expect("bits_byte", bits_byte(int64_t{1} << 31, 2047, 2046), (int64_t{1} << 39) + 255);
  const RowMap map{1 << 20, 224, 224, 2};
  expect("source_row", map.source_row(map.out_rows() - 1), (int64_t{1} << 20) * 224 * 224 - 1 - 224 - 1);
}

// Every vector of the first rows belongs to exactly one thread, and the grid keeps the limits of the device.
void rows() {
  CudaDevice device{};
  device.multiprocessors = 132;
  device.max_block_threads = 1024;
  for (const int64_t rows : {int64_t{1}, int64_t{5}, int64_t{70000}, int64_t{1} << 40})
    for (const int64_t channels : {1, 3, 64, 2047, 2048, 1 << 20, (1 << 20) * 5 + 8, 2147483640})
      for (const int vector : {1, 8}) {
        const RowGrid grid = row_grid("rows", rows, channels, vector, 4, device);
        const int64_t threads = static_cast<int64_t>(grid.blocks) * grid.threads;
        expect_near("blocks", grid.blocks < 1 || grid.blocks > INT32_MAX || grid.threads > 1024, 0, 0);
        expect_near("vectors", grid.vectors, static_cast<double>((channels + vector - 1) / vector), 0);
        expect_near("step", grid.step, static_cast<double>(threads / grid.vectors), 0);
        expect_near("idle", threads > 4 * 132 * 256 && grid.step > 1, 0, 0);
        int64_t busy = static_cast<int64_t>(grid.step) * grid.vectors;
        for (const int64_t thread : {int64_t{0}, busy / 2, busy - 1, threads - 1}) {
          const RowShare share = row_share(grid, static_cast<uint32_t>(thread), rows, vector);
          if (thread < busy)
            expect_near("share", static_cast<double>(share.row * grid.vectors + share.c / vector - thread), 0, 0);
          else
            expect_near("no share", static_cast<double>(share.row - rows), 0, 0);
        }
      }
  // with 32-bit arithmetic, and beyond 2^32 rows with 64-bit arithmetic
  for (const RowMap& map : {RowMap{1 << 20, 224, 224, 2}, RowMap{1 << 22, 61, 57, 2}, RowMap{5, 1 << 20, 3 << 20, 3},
                            RowMap{int64_t{1} << 33, 1, 1, 2}, RowMap{1 << 20, 99, 101, 1}}) {
    const SourceRows source(map);
    const int64_t all = map.out_rows();
    for (const int64_t row : {int64_t{0}, all / 3, (int64_t{1} << 32) - 1, (int64_t{1} << 32) + 1, all - 1})
      if (row < all) expect_near("source", static_cast<double>(source(row) - map.source_row(row)), 0, 0);
  }
}

const Check check{"index", index};
const Check of_rows{"rows", rows};

}  // namespace
}  // namespace driver
