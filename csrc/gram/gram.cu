#include "common/check.h"
#include "common/cuda_launch.cuh"
#include "gram/config.h"
#include "gram/gram.cuh"

namespace fusedres {
namespace {

template <class T, int kVector, int kTile, bool kTensorCores>
void tiles(const GramCudaParams& p, const GramTilesConfig& config, void* stream) {
  using Traits = GramTraits<T, kVector, kTile, kTensorCores>;
  require(p.split_rows % Traits::kRows == 0, "gram", "split_rows must be a multiple of the rows of a step");
  require(config.grid <= INT32_MAX, "gram", "more than 2^31 - 1 blocks");
  const CudaLaunch how{"gram", stream, dim3(static_cast<unsigned>(config.grid)), dim3(Traits::kThreads),
                       Traits::shared_bytes(config.panels)};
  launch(how, gram_tiles_kernel<T, kVector, kTile, kTensorCores>, p, SourceRows(p.map), p.map.out_rows(),
         gram_tile_pairs(p.channels, kTile));
}

template <class T, bool kTensorCores>
void tiles(const GramCudaParams& p, void* stream) {
  constexpr int kVector = kVectorOf<T>;
  const bool aligned = is_aligned(p.x) && is_aligned(p.out) && is_aligned(p.state);
  const auto config = gram_tiles_config(p.channels, p.splits, kVector, aligned, kTensorCores);
  if (!config.vectorised) return tiles<T, 1, 64, kTensorCores>(p, config, stream);
  if constexpr (kTensorCores) {
    if (config.tile == 128) return tiles<T, kVector, 128, true>(p, config, stream);
  }
  tiles<T, kVector, 64, kTensorCores>(p, config, stream);
}

template <class A, int kVector>
void finalize(const GramCudaParams& p, const GramFinalizeConfig& config, void* stream) {
  const size_t shared = reduce_rows_bytes<Lanes<double, kVector>>(config.block_x, config.block_y);
  const CudaLaunch how{"gram", stream, dim3(config.grid), dim3(config.block_x, config.block_y), shared};
  launch(how, gram_finalize_kernel<A, kVector>, p);
}

template <class A>
void finalize(const GramCudaParams& p, void* stream) {
  const bool aligned = is_aligned(p.partials) && is_aligned(p.total) && is_aligned(p.matrix);
  const auto config = gram_finalize_config(p.channels, p.splits, kVectorOf<A>, aligned, cuda_device("gram"));
  if (config.vectorised)
    finalize<A, kVectorOf<A>>(p, config, stream);
  else
    finalize<A, 1>(p, config, stream);
}

}  // namespace

void cuda_gram(const GramCudaParams& p, void* stream) {
  require(p.split_rows * p.splits >= p.map.out_rows(), "gram", "the splits do not cover the rows");
  dispatch_dtype(p.dtype, [&](auto value) {
    using T = decltype(value);
    if constexpr (sizeof(T) == 2) {
      tiles<T, true>(p, stream);
    } else if constexpr (sizeof(T) == 4) {
      if (p.tf32)
        tiles<T, true>(p, stream);
      else
        tiles<T, false>(p, stream);
    } else {
      tiles<T, false>(p, stream);
    }
    finalize<Arithmetic<T>>(p, stream);
  });
}

}  // namespace fusedres
