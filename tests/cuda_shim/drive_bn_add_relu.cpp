#include "bn_add_relu/bn_add_relu_cuda.h"
#include "driver.h"

namespace driver {
namespace {

void compare(DType dtype, int64_t channels, int64_t shortcut_channels, int64_t stride, bool normalise) {
  const DType wide = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const RowMap map{2, 7, 6, stride};
  const int64_t rows = map.out_rows(), width = (channels + 7) / 8;
  Values x(dtype, normal(rows * channels)), shortcut(dtype, normal(2 * 7 * 6 * shortcut_channels));
  Values state(wide, normal(4 * channels)), shortcut_state(wide, normal(4 * channels));
  Values out(dtype, rows * channels);
  std::vector<uint8_t> mask(rows * width);
  cuda_bn_add_relu({x.data(), dtype, channels, state.data(), shortcut.data(), map, shortcut_channels,
                    normalise ? shortcut_state.data() : nullptr, out.data(), mask.data(), 0},
                   nullptr);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < 8 * width; ++c) {
      double z = 0;
      if (c < channels) z = state[2 * channels + c] * x[row * channels + c] + state[3 * channels + c];
      if (c < shortcut_channels) {
        const double value = shortcut[map.source_row(row) * shortcut_channels + c];
        z += normalise ? shortcut_state[2 * channels + c] * value + shortcut_state[3 * channels + c] : value;
      }
      if (c < channels) expect_near("out", out[row * channels + c], z <= 0 ? 0 : z, storage(dtype) * (8 + std::abs(z)));
      if (std::abs(z) > 1e-4 || c >= channels)
        expect_near("mask", mask[row * width + c / 8] >> c % 8 & 1, c < channels && z > 0, 0);
    }
}

void bn_add_relu() {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    for (const int64_t channels : {1, 16, 37}) {
      compare(dtype, channels, channels, 1, false);
      compare(dtype, channels, channels, 1, true);
    }
    compare(dtype, 24, 16, 2, false);
    compare(dtype, 24, 8, 1, false);
    compare(dtype, 20, 13, 2, false);
  }
}

const Check check{"bn_add_relu", bn_add_relu};

}  // namespace
}  // namespace driver
