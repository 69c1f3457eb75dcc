#include <cmath>
#include <utility>

#include "bn_statistics/bn_statistics_cuda.h"
#include "driver.h"

namespace driver {
namespace {

void bn_finalize() {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64}) {
    for (const auto& [tiles, channels] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {5, 64}, {37, 21}, {70, 8}}) {
      std::vector<double> statistics, row_counts;
      for (int64_t t = 0; t < tiles; ++t) {
        row_counts.push_back(static_cast<double>(2 + t % 3));
        for (const double mean : normal(channels, 3)) statistics.push_back(mean);
        for (const double m2 : normal(channels)) statistics.push_back(m2 * m2);
      }
      Values partials(dtype, statistics), rows(dtype, row_counts), state(dtype, 4 * channels);
      Values weight(DType::kFloat16, normal(channels)), bias(DType::kBFloat16, normal(channels));
      const std::vector<double> old_mean = normal(channels), old_var = normal(channels, 5);
      Values running_mean(DType::kFloat32, old_mean), running_var(DType::kFloat64, old_var);
      int64_t batches = 2;
      for (const bool cumulative : {false, true}) {
        const double factor = cumulative ? 0.25 : 0.1;
        Values mean_before = running_mean, var_before = running_var;
        cuda_bn_finalize({partials.data(),
                          rows.data(),
                          dtype,
                          tiles,
                          channels,
                          state.data(),
                          {weight, bias, running_mean, running_var, &batches, cumulative, 0.1, 1e-3}},
                         nullptr);
        expect_near("num_batches_tracked", static_cast<double>(batches), cumulative ? 4 : 3, 0);
        for (int64_t c = 0; c < channels; ++c) {
          double count = 0, mean = 0, m2 = 0;
          for (int64_t t = 0; t < tiles; ++t) count += rows[t], mean += rows[t] * partials[2 * t * channels + c];
          mean /= count;
          for (int64_t t = 0; t < tiles; ++t)
            m2 += partials[(2 * t + 1) * channels + c] + rows[t] * std::pow(partials[2 * t * channels + c] - mean, 2);
          const double invstd = 1 / std::sqrt(m2 / count + 1e-3), scale = weight[c] * invstd;
          const double tolerance = 100 * rounding(dtype) * (1 + invstd);
          expect_near("mean", state[c], mean, tolerance);
          expect_near("invstd", state[channels + c], invstd, tolerance);
          expect_near("scale", state[2 * channels + c], scale, tolerance * (1 + std::abs(weight[c])));
          expect_near("shift", state[3 * channels + c], bias[c] - scale * mean, 10 * tolerance * (1 + std::abs(scale)));
          expect_near("running_mean", running_mean[c], (1 - factor) * mean_before[c] + factor * mean, 1e-5);
          expect_near("running_var", running_var[c], (1 - factor) * var_before[c] + factor * m2 / (count - 1), 1e-4);
        }
      }
    }
  }
}

void bn_frozen() {
  const int64_t channels = 67;
  Values mean(DType::kFloat32, normal(channels)), var(DType::kFloat32, std::vector<double>(channels, 0.5));
  Values weight(DType::kBFloat16, normal(channels)), state(DType::kFloat32, 4 * channels);
  cuda_bn_frozen({DType::kFloat32, channels, state.data(), {weight, {}, mean, var, nullptr, false, 0, 1e-3}}, nullptr);
  for (int64_t c = 0; c < channels; ++c) {
    const double scale = weight[c] / std::sqrt(0.501);
    expect_near("scale", state[2 * channels + c], scale, 1e-6 * (1 + std::abs(scale)));
    expect_near("shift", state[3 * channels + c], -scale * mean[c], 1e-5 * (1 + std::abs(scale)));
  }
}

void bn_partials() {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16})
    for (const auto& [rows, channels] :
         std::vector<std::pair<int64_t, int64_t>>{{2, 1}, {700, 16}, {133, 37}, {9, 520}}) {
      const DType wide = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
      Values x(dtype, normal(rows * channels, 30));
      const int64_t tiles = cuda_bn_partial_tiles(x.data(), dtype, rows, channels);
      Values partials(wide, 2 * tiles * channels), row_counts(wide, tiles);
      cuda_bn_partials({x.data(), dtype, rows, channels, tiles, partials.data(), row_counts.data()}, nullptr);
      double counted = 0;
      for (int64_t t = 0; t < tiles; ++t) counted += row_counts[t];
      expect_near("rows", counted, static_cast<double>(rows), 0);
      for (int64_t c = 0; c < channels; ++c) {
        double mean = 0, m2 = 0, got_mean = 0, got_m2 = 0;
        for (int64_t row = 0; row < rows; ++row) mean += x[row * channels + c] / static_cast<double>(rows);
        for (int64_t row = 0; row < rows; ++row) m2 += std::pow(x[row * channels + c] - mean, 2);
        for (int64_t t = 0; t < tiles; ++t) got_mean += row_counts[t] * partials[2 * t * channels + c] / rows;
        for (int64_t t = 0; t < tiles; ++t)
          got_m2 += partials[(2 * t + 1) * channels + c] +
                    row_counts[t] * std::pow(partials[2 * t * channels + c] - got_mean, 2);
        expect_near("mean", got_mean + x[c], mean, 100 * rounding(dtype));
        expect_near("m2", got_m2, m2, 100 * rounding(dtype) * (1 + m2));
      }
    }
}

const Check parts{"bn_partials", bn_partials};
const Check finalize{"bn_finalize", bn_finalize};
const Check frozen{"bn_frozen", bn_frozen};

}  // namespace
}  // namespace driver
