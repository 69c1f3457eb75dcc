#pragma once

// Batch statistics on the GPU: partial statistics of row tiles, and their merge into the state of BatchNorm.
//
//     mean = Σx / n                M2 = Σ(x − mean)²           var = M2 / n      invstd = (var + eps)^-½
//     scale = weight·invstd        shift = bias − scale·mean                         (Ioffe and Szegedy 2015)
//
// M2 is merged without cancellation (common/cuda_moments.cuh). Sums are of x − pivot. The pivot is a value of the
// channel (the first row of x, or the mean of the first tile), so that float32 keeps the differences of values far from
// 0.
//
// bn_partials: a block owns width·kVector channels of a tile. Thread row y takes every tiles·height-th row from
// tile·height + y on, kBnPartialsRows at a time, and computes their mean and then the deviations from it in registers.
// The block merges its thread rows as a tree. Reads x once and writes the partial statistics.
//
// bn_finalize: a block owns blockDim.x·kVector channels of every tile. Thread row y merges tiles y, y + blockDim.y, …,
// then the block merges its thread rows as a tree, so that the order is fixed. Reads the partial statistics once;
// writes the state and the running statistics.

#include "bn_statistics/bn_statistics_cuda.h"
#include "bn_statistics/config.h"
#include "common/cuda_index.cuh"
#include "common/cuda_moments.cuh"
#include "common/cuda_reduce.cuh"
#include "common/cuda_shared.cuh"

namespace fusedres {

// Stores mean, invstd, scale and shift of kVector channels from c on.
template <class A, int kVector, class Params>
__device__ __forceinline__ void store_state(const Params& p, int64_t c, const Lanes<A, kVector>& mean,
                                            const Lanes<A, kVector>& var) {
  Lanes<A, kVector> invstd, scale, shift;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    invstd[i] = A{1} / sqrt(var[i] + static_cast<A>(p.norm.eps));
    scale[i] = load_channel<A>(p.norm.weight, c + i, 1) * invstd[i];
    shift[i] = load_channel<A>(p.norm.bias, c + i, 0) - scale[i] * mean[i];
  }
  A* state = static_cast<A*>(p.state) + c;
  store(state, mean);
  store(state + p.channels, invstd);
  store(state + 2 * p.channels, scale);
  store(state + 3 * p.channels, shift);
}

template <class A>
__device__ __forceinline__ void average_in(const ChannelVector& running, int64_t c, A value, A factor) {
  if (running.data == nullptr) return;
  store_channel<A>(running, c, (1 - factor) * load_channel<A>(running, c, 0) + factor * value);
}

// Moments of x − pivot of kRows rows.
template <int kRows, class T, int kVector, class A>
__device__ __forceinline__ Moments<A, kVector> moments_of(const Packed<T, kVector> (&loaded)[kRows],
                                                          const Lanes<A, kVector>& pivot) {
  Moments<A, kVector> moments = no_moments<A, kVector>();
  moments.rows = kRows;
  Lanes<A, kVector> x[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    x[r] = unpack(loaded[r]);
#pragma unroll
    for (int i = 0; i < kVector; ++i) moments.sum[i] += x[r][i] -= pivot[i];
  }
  constexpr A kShare = A{1} / kRows;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const A gap = x[r][i] - moments.sum[i] * kShare;
      moments.m2[i] += gap * gap;
    }
  }
  return moments;
}

template <class T, int kVector>
__global__ void __launch_bounds__(kBnPartialsThreads, kBnPartialsBlocks)
    bn_partials_kernel(const BnPartialsParams p, const unsigned width, const unsigned channel_blocks) {
  using A = Arithmetic<T>;
  const BlockPlace place = place_in_block(width);
  const int64_t tile = blockIdx.x / channel_blocks;
  const int64_t c = (static_cast<int64_t>(blockIdx.x % channel_blocks) * width + place.x) * kVector;
  const bool inside = c < p.channels;
  const T* x = static_cast<const T*>(p.x) + c;

  auto moments = no_moments<A, kVector>();
  if (inside) {
    auto pivot = load<kVector>(x);
#pragma unroll
    for (int i = 0; i < kVector; ++i) pivot[i] = finite_or_zero(pivot[i]);
    const int64_t step = p.tiles * place.height;
    for_rows<kBnPartialsRows>(tile * place.height + place.y, p.rows, step, [&](auto count, int64_t row) {
      Packed<T, kVector> loaded[count];
#pragma unroll
      for (int r = 0; r < count; ++r) loaded[r] = load_packed<kVector>(x + element(row + r * step, p.channels, 0));
      merge(moments, moments_of(loaded, pivot));
    });
  }

  reduce_rows(moments, dynamic_shared<Moments<A, kVector>>(), merge<A, kVector>, place);

  if (!inside || place.y != 0) return;
  Lanes<A, kVector> mean;
#pragma unroll
  for (int i = 0; i < kVector; ++i) mean[i] = moments.sum[i] / moments.rows;
  A* partials = static_cast<A*>(p.partials) + tile * 2 * p.channels + c;
  store(partials, mean);
  store(partials + p.channels, moments.m2);
  if (c == 0) static_cast<A*>(p.row_counts)[tile] = moments.rows;
}

template <class A, int kVector>
__global__ void bn_finalize_kernel(const BnFinalizeParams p) {
  const int64_t c = thread_index() * kVector;
  const bool inside = c < p.channels;
  const A* partials = static_cast<const A*>(p.partials) + c;
  const A* rows = static_cast<const A*>(p.rows);

  const bool shifted = p.pivot.data != nullptr;
  Lanes<A, kVector> pivot;  // added to the mean at the end
  Lanes<A, kVector> taken;  // the part of the pivot that the means of the tiles contain
  auto moments = no_moments<A, kVector>();
  if (inside) {
    const auto first = load<kVector>(partials);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      pivot[i] = finite_or_zero(load_channel<A>(p.pivot, c + i, first[i]));
      taken[i] = shifted ? 0 : pivot[i];
    }
    for (int64_t tile = threadIdx.y; tile < p.tiles; tile += blockDim.y) {
      const A* of_tile = partials + tile * 2 * p.channels;
      Moments<A, kVector> added;
      added.rows = rows[tile];
      added.sum = load<kVector>(of_tile);
      added.m2 = load<kVector>(of_tile + p.channels);
#pragma unroll
      for (int i = 0; i < kVector; ++i) added.sum[i] = (added.sum[i] - taken[i]) * added.rows;
      merge(moments, added);
    }
  }

  reduce_rows(moments, dynamic_shared<Moments<A, kVector>>(), merge<A, kVector>);

  if (!inside || threadIdx.y != 0) return;
  Lanes<A, kVector> mean, var;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    mean[i] = moments.sum[i] / moments.rows + pivot[i];
    var[i] = moments.m2[i] / moments.rows;
  }
  store_state(p, c, mean, var);
  // For a cumulative average other threads may still read the count, so a separate launch increments it.
  const bool cumulative = p.norm.cumulative && p.norm.num_batches_tracked != nullptr;
  const A factor =
      cumulative ? A{1} / static_cast<A>(*p.norm.num_batches_tracked + 1) : static_cast<A>(p.norm.momentum);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    average_in<A>(p.norm.running_mean, c + i, mean[i], factor);
    average_in<A>(p.norm.running_var, c + i, moments.m2[i] / (moments.rows - 1), factor);
  }
  if (c == 0 && p.norm.num_batches_tracked != nullptr && !p.norm.cumulative) ++*p.norm.num_batches_tracked;
}

// Runs in one thread.
__global__ void count_batch_kernel(int64_t* num_batches_tracked) {
  ++*num_batches_tracked;
}

// A thread owns one channel.
template <class A>
__global__ void bn_frozen_kernel(const BnFrozenParams p) {
  const int64_t c = thread_index();
  if (c >= p.channels) return;
  const Lanes<A, 1> mean{{load_channel<A>(p.norm.running_mean, c, 0)}};
  const Lanes<A, 1> var{{load_channel<A>(p.norm.running_var, c, 0)}};
  store_state(p, c, mean, var);
}

}  // namespace fusedres
