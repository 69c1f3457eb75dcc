#include "bn_add_relu_backward/bn_add_relu_backward_cuda.h"
#include "bn_backward/bn_backward_cuda.h"
#include "driver.h"
#include "relu_backward/relu_backward_cuda.h"

namespace driver {
namespace {

constexpr int64_t kTileRows = 32;

// A gradient, a gate of any kind, and the gradient that passes it.
struct Gradient {
  Gradient(DType dtype, int64_t rows, int64_t channels, GateKind kind)
      : grad(dtype, normal(rows * channels)),
        output(dtype, normal(rows * channels)),
        bits(rows * ((channels + 7) / 8)),
        gate{kind, kind == GateKind::kBits     ? bits.data()
                   : kind == GateKind::kOutput ? output.data()
                                               : nullptr} {
    for (int64_t i = 0; i < rows * channels; ++i) {
      const bool open = kind == GateKind::kNone || kind == GateKind::kRecompute || !(output[i] <= 0);
      if (open) bits[i / channels * ((channels + 7) / 8) + i % channels / 8] |= 1 << i % channels % 8;
      d.push_back(open ? grad[i] : 0);
    }
  }

  Values grad, output;
  std::vector<uint8_t> bits;
  Gate gate;
  std::vector<double> d;
};

// Σd, Σd·x̂ and dx of a branch in double, and the results of the launches.
void compare(const BnBackwardParams& p, const Gradient& gradient, int b, const Values& x, const Values& state,
             const Values& sums, const Values& grad_x) {
  for (int64_t c = 0; c < p.channels; ++c) {
    const double mean = state[c], invstd = state[p.channels + c], scale = state[2 * p.channels + c];
    double total = 0, product = 0;
    for (int64_t i = c; i < p.rows * p.channels; i += p.channels) {
      total += gradient.d[i];
      product += gradient.d[i] * (x[i] - mean) * invstd;
    }
    const double size = static_cast<double>(p.rows) * (1 + std::abs(invstd)) * (1 + std::abs(mean));
    expect_near("sum d", sums[c], total, 20 * rounding(p.dtype) * size);
    expect_near("sum d·x̂", sums[(1 + b) * p.channels + c], product, 20 * rounding(p.dtype) * size);
    const double batch = p.branch[b].batch_statistics ? 1.0 / static_cast<double>(p.rows) : 0;
    for (int64_t i = c; i < p.rows * p.channels; i += p.channels) {
      const double pull = (x[i] - mean) * invstd * product;
      const double want = scale * (gradient.d[i] - batch * (total + pull));
      const double terms = std::abs(scale) * (1 + std::abs(invstd)) * (8 + batch * (std::abs(total) + std::abs(pull)));
      expect_near("grad_x", grad_x[i], want, storage(p.dtype) * std::abs(want) + 20 * rounding(p.dtype) * terms);
    }
  }
}

void check_backward(DType dtype, int64_t rows, int64_t channels, GateKind kind, int branches, int how) {
  const DType wide = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  Values x(dtype, normal(rows * channels, 1)), other(dtype, normal(rows * channels));
  Values state(wide, normal(4 * channels)), other_state(wide, normal(4 * channels));
  Gradient gradient(dtype, rows, channels, kind);
  if (kind == GateKind::kRecompute)
    for (int64_t i = 0; i < rows * channels; ++i) {
      const int64_t c = i % channels;
      const double z = state[2 * channels + c] * x[i] + state[3 * channels + c];
      if (std::abs(z) < 1e-4) return;  // rounding decides the mask
      if (z <= 0) gradient.d[i] = 0;
    }
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  Values partials(wide, tiles * (1 + branches) * channels), sums(wide, (1 + branches) * channels);
  Values coefficients(wide, 4 * channels), other_coefficients(wide, 4 * channels);
  Values grad_x(dtype, rows * channels), grad_other(dtype, rows * channels);
  BnBackwardParams p{};
  p.dtype = dtype;
  p.rows = rows;
  p.channels = channels;
  p.grad = gradient.grad.data();
  p.gate = gradient.gate;
  p.branches = branches;
  p.branch[0] = {x.data(), state.data(), true, coefficients.data(), grad_x.data()};
  p.branch[1] = {other.data(), other_state.data(), false, other_coefficients.data(), grad_other.data()};
  p.tile_rows = kTileRows;
  p.tiles = tiles;
  p.partials = partials.data();
  p.sums = sums.data();
  p.with_sums = true;
  if (how == 0) {
    cuda_bn_backward_reduce(p, nullptr);
    cuda_bn_backward_coefficients(p, nullptr);
    cuda_bn_backward_apply(p, nullptr);
  } else {
    p.launches = static_cast<BnBackwardLaunches>(how);
    cuda_bn_add_relu_backward(p, nullptr);
  }
  compare(p, gradient, 0, x, state, sums, grad_x);
  if (branches == 2) compare(p, gradient, 1, other, other_state, sums, grad_other);
}

// how: 0 for the separate steps, otherwise a value of BnBackwardLaunches.
void check_all(int how) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    check_backward(dtype, 75, 16, GateKind::kBits, 2, how);
    check_backward(dtype, 70, 13, GateKind::kOutput, 2, how);
    check_backward(dtype, 9, 24, GateKind::kRecompute, 1, how);
    check_backward(dtype, 1, 3, GateKind::kNone, 1, how);
  }
}

void bn_backward() {
  check_all(0);
}

void bn_add_relu_backward() {
  check_all(static_cast<int>(BnBackwardLaunches::kSeparate));
  check_all(static_cast<int>(BnBackwardLaunches::kFused));
}

void relu_backward() {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16})
    for (const int64_t channels : {1, 16, 37})
      for (const GateKind kind : {GateKind::kBits, GateKind::kOutput}) {
        const DType wide = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
        const int64_t rows = 70, tiles = 3;
        Gradient gradient(dtype, rows, channels, kind);
        Values d(dtype, rows * channels), partials(wide, tiles * channels), sums(wide, channels);
        cuda_relu_backward({dtype, rows, channels, gradient.grad.data(), gradient.gate, d.data(), kTileRows, tiles,
                            partials.data(), sums.data()},
                           nullptr);
        for (int64_t c = 0; c < channels; ++c) {
          double total = 0;
          for (int64_t i = c; i < rows * channels; i += channels) {
            expect_near("d", d[i], gradient.d[i], 0);
            total += gradient.d[i];
          }
          expect_near("sum d", sums[c], total, 100 * rounding(dtype));
        }
      }
}

const Check bn_backward_check{"bn_backward", bn_backward};
const Check bn_add_relu_backward_check{"bn_add_relu_backward", bn_add_relu_backward};
const Check relu_backward_check{"relu_backward", relu_backward};

}  // namespace
}  // namespace driver
