#include <algorithm>

#include "driver.h"
#include "gram/gram_cuda.h"

namespace driver {
namespace {

void compare(DType dtype, bool tf32, int64_t channels, int64_t stride, bool with_state) {
  const RowMap map{2, 11, 13, stride};
  const int64_t rows = map.out_rows(), split_rows = 128, splits = (rows + split_rows - 1) / split_rows;
  const DType wide = dtype == DType::kFloat64 ? dtype : DType::kFloat32;
  Values x(dtype, normal(2 * 11 * 13 * channels, 2)), state(wide, normal(4 * channels));
  Values out(dtype, rows * channels), pivot(wide, channels), partials(wide, splits * (channels + 1) * channels);
  std::vector<double> total(channels, NAN), matrix(channels * channels, NAN);
  cuda_gram({x.data(), dtype, tf32, map, channels, with_state ? state.data() : nullptr, out.data(), pivot.data(),
             split_rows, splits, partials.data(), total.data(), matrix.data()},
            nullptr);
  for (int64_t c = 0; c < channels; ++c) {
    const auto z = [&](int64_t row) {
      const double value = x[map.source_row(row) * channels + c];
      return with_state ? std::max(0.0, state[2 * channels + c] * value + state[3 * channels + c]) : value;
    };
    double mean = 0, sum = 0;
    for (int64_t row = 0; row < 8; ++row) mean += z(row) / 8;
    expect_near("pivot", pivot[c], mean, 20 * rounding(dtype));
    for (int64_t row = 0; row < rows; ++row) {
      const double want = z(row) - mean;
      expect_near("out", out[row * channels + c], want, storage(dtype) * (10 + std::abs(want)));
      sum += out[row * channels + c];
    }
    expect_near("total", total[c], sum, 1e3 * rounding(dtype));
    for (int64_t other = 0; other < channels; ++other) {
      double product = 0, terms = 0;
      for (int64_t row = 0; row < rows; ++row) {
        const double term = out[row * channels + c] * out[row * channels + other];
        product += term, terms += std::abs(term);
      }
      expect_near("matrix", matrix[c * channels + other], product, (tf32 ? 1e-3 : 100 * rounding(dtype)) * terms);
    }
  }
}

void gram() {
  compare(DType::kBFloat16, false, 64, 1, true);
  compare(DType::kFloat16, false, 136, 2, false);
  compare(DType::kBFloat16, false, 67, 1, true);
  compare(DType::kFloat32, true, 68, 1, false);
  compare(DType::kFloat32, false, 20, 2, true);
  compare(DType::kFloat32, false, 3, 1, true);
  compare(DType::kFloat64, false, 66, 2, true);
}

const Check check{"gram", gram};

}  // namespace
}  // namespace driver
