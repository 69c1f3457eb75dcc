#include "common/cuda_launch.cuh"
#include "shortcut_grad/shortcut_grad.cuh"
#include "shortcut_grad/shortcut_grad_cuda.h"

namespace fusedres {
namespace {

template <class T, int kVector>
void start(const ShortcutGradParams& p, int64_t rows, const RowGrid& grid, void* stream) {
  const CudaLaunch how{"shortcut_grad_", stream, dim3(grid.blocks), dim3(grid.threads)};
  const SourceRows source(p.map);
  if (p.gate.kind == GateKind::kNone)
    launch(how, shortcut_grad_kernel<T, kVector, GateKind::kNone>, p, source, rows, grid);
  else if (p.gate.kind == GateKind::kBits)
    launch(how, shortcut_grad_kernel<T, kVector, GateKind::kBits>, p, source, rows, grid);
  else
    launch(how, shortcut_grad_kernel<T, kVector, GateKind::kOutput>, p, source, rows, grid);
}

}  // namespace

void cuda_shortcut_grad(const ShortcutGradParams& p, void* stream) {
  const int64_t rows = p.map.out_rows();
  if (rows * p.x_channels == 0) return;
  require(p.gate.kind != GateKind::kRecompute, "shortcut_grad_", "the gate cannot be recomputed here");
  const bool aligned =
      is_aligned(p.grad_x) && is_aligned(p.grad) && (p.gate.kind != GateKind::kOutput || is_aligned(p.gate.data));
  dispatch_dtype(p.dtype, [&](auto value) {
    using T = decltype(value);
    const auto config = shortcut_grad_config<T>(rows, p.x_channels, p.channels, aligned, cuda_device("shortcut_grad_"));
    if (config.vectorised)
      start<T, kVectorOf<T>>(p, rows, config.grid, stream);
    else
      start<T, 1>(p, rows, config.grid, stream);
  });
}

}  // namespace fusedres
