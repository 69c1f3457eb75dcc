#include <algorithm>

#include "bn_add_relu_backward/bn_add_relu_backward.cuh"
#include "bn_add_relu_backward/bn_add_relu_backward_cuda.h"
#include "bn_add_relu_backward/config.h"
#include "bn_backward/dispatch.cuh"

namespace fusedres {
namespace {

// Runs all steps in one launch if that pays or is requested. Returns whether it ran.
template <class Kind>
bool launch_fused(const BnBackwardParams& p, void* stream) {
  const char* op = "bn_add_relu_backward";
  using A = typename Kind::A;
  const CudaDevice device = cuda_device(op);
  const auto config = bn_backward_config(p, Kind::kVector, Kind::kMergeVector, device);
  const size_t shared = std::max(
      reduce_rows_bytes<Sums<A, Kind::kVector, 1 + Kind::kBranches>>(config.width, config.threads / config.width),
      reduce_rows_bytes<Sums<A, Kind::kMergeVector, 1 + Kind::kBranches>>(config.merge_width,
                                                                          config.threads / config.merge_width));
  const auto kernel = bn_add_relu_backward_kernel<typename Kind::T, Kind::kVector, Kind::kMergeVector, Kind::kBranches>;
  const int resident = resident_blocks(op, kernel, static_cast<int>(config.threads), shared);
  const int64_t blocks = p.tiles * config.channel_blocks;
  if (p.launches == BnBackwardLaunches::kChosen && !fused_pays(p, blocks, resident, device)) return false;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(blocks, resident)));
  launch({op, stream, grid, dim3(config.threads), shared, true}, kernel, p, config);
  return true;
}

}  // namespace

void cuda_bn_add_relu_backward(const BnBackwardParams& params, void* stream) {
  BnBackwardParams p = params;
  bool summed = p.with_sums;
  for (int b = 0; b < p.branches; ++b) summed = summed || p.branch[b].batch_statistics;
  if (summed) {
    bool done = false;
    if (p.launches != BnBackwardLaunches::kSeparate && p.tiles > 0)
      dispatch_bn_backward(p, [&](auto kind) { done = launch_fused<decltype(kind)>(p, stream); });
    if (done) return;
    cuda_bn_backward_reduce(p, stream);
    cuda_bn_backward_coefficients(p, stream);
  }
  for (int b = 0; b < p.branches; ++b) {
    BnBackwardBranch& branch = p.branch[b];
    if (!summed) branch.coefficients = nullptr;
    if (!branch.batch_statistics && p.gate.kind != GateKind::kRecompute) branch.x = nullptr;  // not needed again
  }
  cuda_bn_backward_apply(p, stream);
}

}  // namespace fusedres
