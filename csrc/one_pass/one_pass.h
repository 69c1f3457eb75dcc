#pragma once

#include <cstdint>

#include "bn_statistics/bn_statistics.h"

// The small products of a 1x1 convolution with BatchNorm statistics that are known before it runs. With z centred on a
// pivot, Cov = Σzzᵀ/rows - centre·centreᵀ and centre = Σz/rows, the output W·z has
//     mean = W·centre,  var = diag(W·Cov·Wᵀ).
// Matrices are dense; "arithmetic" is float64 for float64 activations, else float32.
namespace fusedres {

struct OnePassStatisticsParams {
  BnStatisticsParams output;  // BatchNorm of the output; x is not read
  const void* weight;         // [channels, in_channels] arithmetic
  int64_t in_channels;
  const void* pivot;    // [in_channels] arithmetic
  const double* total;  // [in_channels]: Σz
  const double* gram;   // [in_channels, in_channels]: Σzzᵀ
  void* projected;      // [channels, in_channels] arithmetic: W·Cov
};

// Computes the state of the output's BatchNorm, its running statistics (of the data before centring), and W·Cov. The
// product is computed in float64.
void one_pass_statistics(const OnePassStatisticsParams& params);

// Up to this many input channels, G and Σd are computed in float64 from d and z themselves: in a sum of few terms the
// rounding of each term shows, and eager sums in float64 if there is one channel.
constexpr int64_t kOnePassNarrow = 8;

struct OnePassGradsParams {
  DType dtype;  // of the activations
  int64_t rows;
  int64_t channels;
  int64_t in_channels;
  const void* cross;      // [channels, in_channels] arithmetic: G = dᵀz; not read if in_channels <= kOnePassNarrow
  const void* sum_d;      // [channels] arithmetic
  const void* weight;     // [channels, in_channels] arithmetic
  const void* state;      // [4, channels] arithmetic: mean, invstd, scale, shift
  const void* projected;  // [channels, in_channels] arithmetic: W·Cov
  const double* total;    // [in_channels]: Σz
  void* grad_conv;        // [channels, in_channels] arithmetic
  void* grad_weight;      // [channels] arithmetic
  void* quadratic;        // [in_channels, in_channels] arithmetic: -Q; null, together with constant: not wanted
  void* constant;         // [in_channels] arithmetic
  int threads;
  const void* d;  // [rows, channels] arithmetic; like z only read if in_channels <= kOnePassNarrow
  const void* z;  // [rows, in_channels] arithmetic
};

// With c1 = scale·Σd/rows, dγ = invstd·(rowsum(W⊙G) - mean·Σd) and c2 = scale·invstd·dγ/rows:
//     dW = scale⊙G - c1·totalᵀ - rows·c2⊙(W·Cov),   Q = Wᵀ·diag(c2)·W,   constant = totalᵀ·Q/rows - c1ᵀ·W,
// so that dz = d·(scale⊙W) - z·Q + constant.
void one_pass_grads(const OnePassGradsParams& params);

// out = scale⊙W by rows, with the scale of the state.
void one_pass_scale(const OnePassGradsParams& params, void* out);

}  // namespace fusedres
