#pragma once

// Backward of BatchNorm and the ReLU after it, for one branch or for two that are added before the ReLU, in three
// steps.
//
//     d = grad where the gate is open, else 0      x̂ = (x − μ)·r      c1 = Σd / M      k = r·(Σ d·x̂) / M
//     dx = a·(d − c1 − (x − μ)·k)                  (Ioffe and Szegedy 2015); c1 = k = 0 for constant statistics
//
// Activations are [rows, channels]. A block is seen as rows of `width` vectors of channels, 16 bytes each.
//
// reduce        A block sums a tile of rows: each thread sums its channels of every height-th row, then the threads are
//               summed as a tree. Reads grad, the gate and x (of both branches); writes a partial for each tile.
// coefficients  A block merges its channels of all partials in a fixed order. Reads the partials; writes the sums and
//               the coefficients of each channel.
// apply         A block walks over rows and keeps its coefficients in registers. Reads grad, the gate and x again;
//               writes dx.
//
// The device functions do the work of one block, not of the grid, so that bn_add_relu_backward can run all three in one
// launch.

#include "bn_backward/bn_backward_cuda.h"
#include "bn_backward/config.h"
#include "common/cuda_gate.cuh"
#include "common/cuda_shared.cuh"
#include "common/cuda_sums.cuh"

namespace fusedres {

// The rows that are loaded together.
template <class A, int kVector, int kBranches, int kRows>
struct BnBackwardRows {
  Lanes<A, kVector> d[kRows];
  Lanes<A, kVector> x[kBranches][kRows];
};

// The scale and shift that a recomputed gate needs. There is only one branch then.
template <class A, int kVector>
struct GateAffine {
  Lanes<A, kVector> scale, shift;
};

template <class A, int kVector, int kBranches>
__device__ __forceinline__ GateAffine<A, kVector> load_gate_affine(const BnBackwardParams& p, int64_t c) {
  GateAffine<A, kVector> affine{};
  if (kBranches == 1 && p.gate.kind == GateKind::kRecompute) {
    const A* state = static_cast<const A*>(p.branch[0].state) + c;
    affine.scale = load<kVector>(state + 2 * p.channels);
    affine.shift = load<kVector>(state + 3 * p.channels);
  }
  return affine;
}

// Loads d and x of rows row, row + step, …. All loads start before the gate waits for any of them.
template <class T, int kVector, int kBranches, int kRows>
__device__ __forceinline__ BnBackwardRows<Arithmetic<T>, kVector, kBranches, kRows> load_rows(
    const BnBackwardParams& p, const GateAffine<Arithmetic<T>, kVector>& affine, int64_t row, int64_t step, int64_t c) {
  using A = Arithmetic<T>;
  BnBackwardRows<A, kVector, kBranches, kRows> rows;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    rows.d[r] = load<kVector>(static_cast<const T*>(p.grad) + element(row + r * step, p.channels, c));
#pragma unroll
  for (int b = 0; b < kBranches; ++b) {
    const T* x = static_cast<const T*>(p.branch[b].x);
    if (x == nullptr) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) rows.x[b][r] = {};
    } else {
#pragma unroll
      for (int r = 0; r < kRows; ++r) rows.x[b][r] = load<kVector>(x + element(row + r * step, p.channels, c));
    }
  }
  switch (p.gate.kind) {
    case GateKind::kNone:
      break;
    case GateKind::kBits:
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        rows.d[r] = gated<GateKind::kBits, T>(p.gate, row + r * step, p.channels, c, rows.d[r]);
      break;
    case GateKind::kOutput:
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        rows.d[r] = gated<GateKind::kOutput, T>(p.gate, row + r * step, p.channels, c, rows.d[r]);
      break;
    case GateKind::kRecompute:
      if constexpr (kBranches == 1) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          Lanes<A, kVector> z;
#pragma unroll
          for (int i = 0; i < kVector; ++i) z[i] = affine.scale[i] * rows.x[0][r][i] + affine.shift[i];
          rows.d[r] = z_gated(z, rows.d[r]);
        }
      }
  }
  return rows;
}

// Writes the partial of a tile of rows, for the width·kVector channels of a block from first_channel on.
template <class T, int kVector, int kBranches>
__device__ __forceinline__ void sum_tile(const BnBackwardParams& p, int64_t tile, int64_t first_channel,
                                         unsigned width) {
  using A = Arithmetic<T>;
  const BlockPlace place = place_in_block(width);
  const int64_t c = first_channel + place.x * kVector;
  const bool inside = c < p.channels;
  auto sums = no_sums<A, kVector, 1 + kBranches>();
  if (inside) {
    const auto affine = load_gate_affine<A, kVector, kBranches>(p, c);
    Lanes<A, kVector> mean[kBranches];
#pragma unroll
    for (int b = 0; b < kBranches; ++b) mean[b] = load<kVector>(static_cast<const A*>(p.branch[b].state) + c);
    const int64_t first = tile * p.tile_rows;
    const int64_t last = min(first + p.tile_rows, p.rows);
    for_rows<2>(first + place.y, last, place.height, [&](auto count, int64_t row) {
      constexpr int kRows = decltype(count)::value;
      const auto rows = load_rows<T, kVector, kBranches, kRows>(p, affine, row, place.height, c);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          sums.of[0][i] += rows.d[r][i];
#pragma unroll
          for (int b = 0; b < kBranches; ++b) sums.of[1 + b][i] += rows.d[r][i] * (rows.x[b][r][i] - mean[b][i]);
        }
      }
    });
  }

  reduce_rows(sums, dynamic_shared<Sums<A, kVector, 1 + kBranches>>(), add<A, kVector, 1 + kBranches>, place);

  if (!inside || place.y != 0) return;
  // x̂ is (x − μ)·r, and r is constant for a channel: multiply by it once
#pragma unroll
  for (int b = 0; b < kBranches; ++b) {
    const auto invstd = load<kVector>(static_cast<const A*>(p.branch[b].state) + p.channels + c);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sums.of[1 + b][i] *= invstd[i];
  }
  store_sums(static_cast<A*>(p.partials) + tile * (1 + kBranches) * p.channels, p.channels, c, sums);
}

// Writes the sums and coefficients of the width·kVector channels of a block from first_channel on.
template <class A, int kVector, int kBranches>
__device__ __forceinline__ void merge_channels(const BnBackwardParams& p, int64_t first_channel, unsigned width) {
  const BlockPlace place = place_in_block(width);
  const int64_t c = first_channel + place.x * kVector;
  const auto sums = merge_partials<kVector>(static_cast<const A*>(p.partials), p.tiles, p.channels, c, place,
                                            dynamic_shared<Sums<A, kVector, 1 + kBranches>>());
  if (c >= p.channels || place.y != 0) return;
  store_sums(static_cast<A*>(p.sums), p.channels, c, sums);
#pragma unroll
  for (int b = 0; b < kBranches; ++b) {
    const BnBackwardBranch& branch = p.branch[b];
    const A* state = static_cast<const A*>(branch.state) + c;
    A* coefficients = static_cast<A*>(branch.coefficients) + c;
    const auto invstd = load<kVector>(state + p.channels);
    Lanes<A, kVector> c1{}, k{};
    if (branch.batch_statistics) {
      const A count = static_cast<A>(p.rows > 1 ? p.rows : 1);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        c1[i] = sums.of[0][i] / count;
        k[i] = invstd[i] * (sums.of[1 + b][i] / count);
      }
    }
    store(coefficients, load<kVector>(state + 2 * p.channels));
    store(coefficients + p.channels, c1);
    store(coefficients + 2 * p.channels, load<kVector>(state));
    store(coefficients + 3 * p.channels, k);
  }
}

template <class A, int kVector>
struct BnBackwardCoefficients {
  Lanes<A, kVector> a, c1, mean, k;
};

template <class A, int kVector>
__device__ __forceinline__ BnBackwardCoefficients<A, kVector> load_coefficients(const BnBackwardBranch& branch,
                                                                                int64_t channels, int64_t c) {
  if (branch.coefficients == nullptr)
    return {load<kVector>(static_cast<const A*>(branch.state) + 2 * channels + c), {}, {}, {}};
  const A* coefficients = static_cast<const A*>(branch.coefficients) + c;
  return {load<kVector>(coefficients), load<kVector>(coefficients + channels),
          load<kVector>(coefficients + 2 * channels), load<kVector>(coefficients + 3 * channels)};
}

// Writes grad_x of rows first + y, first + y + step, … below last, for the width·kVector channels of a block from
// first_channel on.
template <class T, int kVector, int kBranches>
__device__ __forceinline__ void apply_rows(const BnBackwardParams& p, int64_t first, int64_t last, int64_t step,
                                           int64_t first_channel, unsigned width) {
  using A = Arithmetic<T>;
  const BlockPlace place = place_in_block(width);
  const int64_t c = first_channel + place.x * kVector;
  if (c >= p.channels) return;
  const auto affine = load_gate_affine<A, kVector, kBranches>(p, c);
  BnBackwardCoefficients<A, kVector> of[kBranches];
#pragma unroll
  for (int b = 0; b < kBranches; ++b) of[b] = load_coefficients<A, kVector>(p.branch[b], p.channels, c);
  for_rows<3 - kBranches>(first + place.y, last, step, [&](auto count, int64_t row) {
    constexpr int kRows = decltype(count)::value;
    const auto rows = load_rows<T, kVector, kBranches, kRows>(p, affine, row, step, c);
#pragma unroll
    for (int b = 0; b < kBranches; ++b) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        Lanes<A, kVector> grad_x;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          // for constant statistics x has no effect, not even NaN
          const A pull = of[b].k[i] == 0 ? 0 : (rows.x[b][r][i] - of[b].mean[i]) * of[b].k[i];
          grad_x[i] = of[b].a[i] * (rows.d[r][i] - of[b].c1[i] - pull);
        }
        store(static_cast<T*>(p.branch[b].grad_x) + element(row + r * step, p.channels, c), grad_x);
      }
    }
  });
}

template <class T, int kVector, int kBranches>
__global__ void __launch_bounds__(kBnBackwardThreads, kBnBackwardResident)
    bn_backward_reduce_kernel(const BnBackwardParams p, const BnBackwardConfig config) {
  const int64_t block = blockIdx.x % config.channel_blocks;
  sum_tile<T, kVector, kBranches>(p, blockIdx.x / config.channel_blocks, block * config.width * kVector, config.width);
}

template <class A, int kVector, int kBranches>
__global__ void __launch_bounds__(kBnBackwardThreads, kBnBackwardResident)
    bn_backward_coefficients_kernel(const BnBackwardParams p, const BnBackwardConfig config) {
  merge_channels<A, kVector, kBranches>(p, static_cast<int64_t>(blockIdx.x) * config.merge_width * kVector,
                                        config.merge_width);
}

template <class T, int kVector, int kBranches>
__global__ void __launch_bounds__(kBnBackwardThreads, kBnBackwardResident)
    bn_backward_apply_kernel(const BnBackwardParams p, const BnBackwardConfig config) {
  const int64_t height = blockDim.x / config.width;
  const int64_t first_channel = static_cast<int64_t>(blockIdx.x % config.channel_blocks) * config.width * kVector;
  apply_rows<T, kVector, kBranches>(p, blockIdx.x / config.channel_blocks * height, p.rows,
                                    config.apply_blocks * height, first_channel, config.width);
}

}  // namespace fusedres
