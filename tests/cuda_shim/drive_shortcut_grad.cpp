#include "driver.h"
#include "shortcut_grad/shortcut_grad_cuda.h"

namespace driver {
namespace {

void compare(DType dtype, int64_t x_channels, int64_t channels, int64_t stride, GateKind kind) {
  const RowMap map{2, 7, 6, stride};
  const int64_t rows = map.out_rows(), width = (channels + 7) / 8;
  Values grad_x(dtype, normal(2 * 7 * 6 * x_channels)), grad(dtype, normal(rows * channels));
  Values output(dtype, normal(rows * channels));
  std::vector<uint8_t> bits(rows * width);
  for (size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint8_t>(37 * i + 11);
  const void* gate = kind == GateKind::kBits ? bits.data() : kind == GateKind::kOutput ? output.data() : nullptr;
  Values before = grad_x;
  cuda_shortcut_grad({grad_x.data(), dtype, map, x_channels, grad.data(), channels, {kind, gate}, 0}, nullptr);
  std::vector<double> want(2 * 7 * 6 * x_channels);
  for (int64_t i = 0; i < static_cast<int64_t>(want.size()); ++i) want[i] = before[i];
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < x_channels; ++c) {
      const bool open = kind == GateKind::kNone || (kind == GateKind::kBits ? bits[row * width + c / 8] >> c % 8 & 1
                                                                            : output[row * channels + c] > 0);
      if (open) want[map.source_row(row) * x_channels + c] += grad[row * channels + c];
    }
  for (int64_t i = 0; i < static_cast<int64_t>(want.size()); ++i)
    expect_near("grad_x", grad_x[i], want[i], storage(dtype) * (2 + std::abs(want[i])));
}

void shortcut_grad() {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16})
    for (const GateKind kind : {GateKind::kNone, GateKind::kBits, GateKind::kOutput}) {
      compare(dtype, 16, 16, 1, kind);
      compare(dtype, 8, 24, 2, kind);
      compare(dtype, 13, 20, 2, kind);
    }
}

const Check check{"shortcut_grad_", shortcut_grad};

}  // namespace
}  // namespace driver
