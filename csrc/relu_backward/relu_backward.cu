#include "common/check.h"
#include "common/cuda_launch.cuh"
#include "relu_backward/relu_backward.cuh"

namespace fusedres {
namespace {

template <class T, int kVector>
void relu_backward(const ReluBackwardParams& p, void* stream) {
  const char* op = "relu_backward";
  using A = Arithmetic<T>;
  constexpr int kMergeVector = kVector == 1 ? 1 : kVectorOf<A>;
  const auto config = relu_backward_config(p, kVector, kMergeVector, cuda_device(op));
  if (p.tiles > 0) {
    const dim3 grid(static_cast<unsigned>(p.tiles * config.channel_blocks));
    const size_t shared = reduce_rows_bytes<Sums<A, kVector, 1>>(config.width, config.threads / config.width);
    const CudaLaunch how{op, stream, grid, dim3(config.threads), shared};
    if (p.gate.kind == GateKind::kBits)
      launch(how, relu_backward_kernel<T, kVector, GateKind::kBits>, p, config);
    else
      launch(how, relu_backward_kernel<T, kVector, GateKind::kOutput>, p, config);
  }
  const size_t shared =
      reduce_rows_bytes<Sums<A, kMergeVector, 1>>(config.merge_width, config.threads / config.merge_width);
  launch({op, stream, dim3(config.merge_blocks), dim3(config.threads), shared}, merge_sums_kernel<A, kMergeVector>, p,
         config);
}

}  // namespace

void cuda_relu_backward(const ReluBackwardParams& p, void* stream) {
  require(p.gate.kind == GateKind::kBits || p.gate.kind == GateKind::kOutput, "relu_backward",
          "the gate must be bits or an output");
  dispatch_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool aligned = is_aligned(p.grad) && is_aligned(p.d) && is_aligned(p.partials) && is_aligned(p.sums) &&
                         (p.gate.kind == GateKind::kBits || is_aligned(p.gate.data));
    if (aligned && p.channels % kVectorOf<T> == 0)
      relu_backward<T, kVectorOf<T>>(p, stream);
    else
      relu_backward<T, 1>(p, stream);
  });
}

}  // namespace fusedres
