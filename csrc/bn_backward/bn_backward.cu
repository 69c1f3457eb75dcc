#include "bn_backward/bn_backward.cuh"
#include "bn_backward/dispatch.cuh"

namespace fusedres {

void cuda_bn_backward_reduce(const BnBackwardParams& p, void* stream) {
  if (p.tiles == 0) return;
  const char* op = "bn_backward_reduce";
  dispatch_bn_backward(p, [&](auto kind) {
    using Kind = decltype(kind);
    using Value = Sums<typename Kind::A, Kind::kVector, 1 + Kind::kBranches>;
    const auto config = bn_backward_config(p, Kind::kVector, Kind::kMergeVector, cuda_device(op));
    const dim3 grid(static_cast<unsigned>(p.tiles * config.channel_blocks));
    const size_t shared = reduce_rows_bytes<Value>(config.width, config.threads / config.width);
    launch({op, stream, grid, dim3(config.threads), shared},
           bn_backward_reduce_kernel<typename Kind::T, Kind::kVector, Kind::kBranches>, p, config);
  });
}

void cuda_bn_backward_coefficients(const BnBackwardParams& p, void* stream) {
  const char* op = "bn_backward_coefficients";
  dispatch_bn_backward(p, [&](auto kind) {
    using Kind = decltype(kind);
    using Value = Sums<typename Kind::A, Kind::kMergeVector, 1 + Kind::kBranches>;
    const auto config = bn_backward_config(p, Kind::kVector, Kind::kMergeVector, cuda_device(op));
    const size_t shared = reduce_rows_bytes<Value>(config.merge_width, config.threads / config.merge_width);
    launch({op, stream, dim3(config.merge_blocks), dim3(config.threads), shared},
           bn_backward_coefficients_kernel<typename Kind::A, Kind::kMergeVector, Kind::kBranches>, p, config);
  });
}

void cuda_bn_backward_apply(const BnBackwardParams& p, void* stream) {
  if (p.rows == 0) return;
  const char* op = "bn_backward_apply";
  dispatch_bn_backward(p, [&](auto kind) {
    using Kind = decltype(kind);
    const auto config = bn_backward_config(p, Kind::kVector, Kind::kMergeVector, cuda_device(op));
    const dim3 grid(config.apply_blocks * config.channel_blocks);
    launch({op, stream, grid, dim3(config.threads)},
           bn_backward_apply_kernel<typename Kind::T, Kind::kVector, Kind::kBranches>, p, config);
  });
}

}  // namespace fusedres
