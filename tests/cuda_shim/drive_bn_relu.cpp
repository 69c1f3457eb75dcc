#include "bn_relu/bn_relu_cuda.h"
#include "driver.h"

namespace driver {
namespace {

void bn_relu() {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16})
    for (const int64_t channels : {1, 16, 37})
      for (const int64_t stride : {1, 2}) {
        const DType wide = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
        const RowMap map{2, 9, 8, stride};
        const int64_t rows = map.out_rows();
        Values x(dtype, normal(2 * 9 * 8 * channels)), state(wide, normal(4 * channels)), pivot(wide, normal(channels));
        Values out(dtype, rows * channels);
        cuda_bn_relu({x.data(), dtype, map, channels, state.data(), pivot.data(), out.data(), 0}, nullptr);
        for (int64_t row = 0; row < rows; ++row)
          for (int64_t c = 0; c < channels; ++c) {
            const double z = state[2 * channels + c] * x[map.source_row(row) * channels + c] + state[3 * channels + c];
            const double want = (z <= 0 ? 0 : z) - pivot[c];
            expect_near("out", out[row * channels + c], want, storage(dtype) * (4 + std::abs(want)));
          }
      }
}

const Check check{"bn_relu", bn_relu};

}  // namespace
}  // namespace driver
