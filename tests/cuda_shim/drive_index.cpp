// The index arithmetic beyond 2^31 elements, where no kernel of a test gets to.

#include "common/cuda_gate.cuh"
#include "common/cuda_index.cuh"
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

const Check check{"index", index};

}  // namespace
}  // namespace driver
