#include "bn_statistics/bn_statistics.cuh"
#include "bn_statistics/config.h"
#include "common/check.h"
#include "common/cuda_launch.cuh"

namespace fusedres {
namespace {

template <class A, int kVector>
void finalize(const BnFinalizeParams& p, const BnFinalizeConfig& config, void* stream) {
  const size_t shared = reduce_rows_bytes<Moments<A, kVector>>(config.block_x, config.block_y);
  const CudaLaunch how{"bn_finalize", stream, dim3(config.grid), dim3(config.block_x, config.block_y), shared};
  launch(how, bn_finalize_kernel<A, kVector>, p);
}

template <class A>
void finalize(const BnFinalizeParams& p, void* stream) {
  const bool aligned = is_aligned(p.partials) && is_aligned(p.state);
  const auto config = bn_finalize_config(p.tiles, p.channels, sizeof(A), aligned, cuda_device("bn_finalize"));
  if (config.vectorised)
    finalize<A, kVectorOf<A>>(p, config, stream);
  else
    finalize<A, 1>(p, config, stream);
  if (p.norm.cumulative && p.norm.num_batches_tracked != nullptr)
    launch({"bn_finalize", stream, dim3(1), dim3(1)}, count_batch_kernel, p.norm.num_batches_tracked);
}

template <class T>
BnPartialsConfig partials_config(const void* x, int64_t rows, int64_t channels) {
  return bn_partials_config<T>(rows, channels, is_aligned(x), cuda_device("bn_statistics"));
}

template <class T, int kVector>
void partials(const BnPartialsParams& p, const BnPartialsConfig& config, void* stream) {
  const size_t shared = reduce_rows_bytes<Moments<Arithmetic<T>, kVector>>(config.width, config.threads / config.width);
  const dim3 grid(static_cast<unsigned>(p.tiles * config.channel_blocks));
  const CudaLaunch how{"bn_statistics", stream, grid, dim3(config.threads), shared};
  launch(how, bn_partials_kernel<T, kVector>, p, config.width, config.channel_blocks);
}

}  // namespace

int64_t cuda_bn_partial_tiles(const void* x, DType dtype, int64_t rows, int64_t channels) {
  int64_t tiles = 0;
  dispatch_dtype(dtype, [&](auto value) { tiles = partials_config<decltype(value)>(x, rows, channels).tiles; });
  return tiles;
}

void cuda_bn_partials(const BnPartialsParams& p, void* stream) {
  dispatch_dtype(p.dtype, [&](auto value) {
    using T = decltype(value);
    const auto config = partials_config<T>(p.x, p.rows, p.channels);
    require(p.tiles == config.tiles && is_aligned(p.partials), "bn_statistics",
            "partials must have the size that cuda_bn_partial_tiles gave");
    if (config.vectorised)
      partials<T, kVectorOf<T>>(p, config, stream);
    else
      partials<T, 1>(p, config, stream);
  });
}

void cuda_bn_finalize(const BnFinalizeParams& p, void* stream) {
  if (p.dtype == DType::kFloat64)
    finalize<double>(p, stream);
  else
    finalize<float>(p, stream);
}

void cuda_bn_frozen(const BnFrozenParams& p, void* stream) {
  const unsigned threads = channel_threads(cuda_device("bn_frozen"));
  const dim3 grid(static_cast<unsigned>((p.channels + threads - 1) / threads));
  const CudaLaunch how{"bn_frozen", stream, grid, dim3(threads)};
  if (p.dtype == DType::kFloat64)
    launch(how, bn_frozen_kernel<double>, p);
  else
    launch(how, bn_frozen_kernel<float>, p);
}

}  // namespace fusedres
