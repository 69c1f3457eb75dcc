#include "bn_add_relu/bn_add_relu.cuh"
#include "bn_add_relu/bn_add_relu_cuda.h"
#include "common/cuda_launch.cuh"

namespace fusedres {
namespace {

template <class T, int kVector>
void start(const BnAddReluParams& p, int64_t rows, const RowGrid& grid, void* stream) {
  const CudaLaunch how{"bn_add_relu", stream, dim3(grid.blocks), dim3(grid.threads)};
  const SourceRows source(p.shortcut_map);
  if (p.shortcut_state != nullptr)
    launch(how, bn_add_relu_kernel<T, kVector, Shortcut::kNormalised>, p, source, rows, grid);
  else if (p.shortcut_map.stride == 1 && p.shortcut_channels == p.channels)
    launch(how, bn_add_relu_kernel<T, kVector, Shortcut::kPlain>, p, source, rows, grid);
  else
    launch(how, bn_add_relu_kernel<T, kVector, Shortcut::kMapped>, p, source, rows, grid);
}

}  // namespace

void cuda_bn_add_relu(const BnAddReluParams& p, void* stream) {
  const int64_t rows = p.shortcut_map.out_rows();
  if (rows * p.channels == 0) return;
  const bool aligned = is_aligned(p.x) && is_aligned(p.state) && is_aligned(p.shortcut) &&
                       is_aligned(p.shortcut_state) && is_aligned(p.out);
  dispatch_dtype(p.dtype, [&](auto value) {
    using T = decltype(value);
    const auto config =
        bn_add_relu_config<T>(rows, p.channels, p.shortcut_channels, aligned, cuda_device("bn_add_relu"));
    if (config.vectorised)
      start<T, kBnAddReluOwned>(p, rows, config.grid, stream);
    else
      start<T, 1>(p, rows, config.grid, stream);
  });
}

}  // namespace fusedres
