#include "bn_relu/bn_relu.cuh"
#include "bn_relu/bn_relu_cuda.h"
#include "common/cuda_launch.cuh"

namespace fusedres {
namespace {

template <class T, int kVector>
void start(const BnReluParams& p, int64_t rows, const RowGrid& grid, void* stream) {
  const CudaLaunch how{"bn_relu", stream, dim3(grid.blocks), dim3(grid.threads)};
  const SourceRows source(p.map);
  if (p.map.stride == 1)
    launch(how, bn_relu_kernel<T, kVector, false>, p, source, rows, grid);
  else
    launch(how, bn_relu_kernel<T, kVector, true>, p, source, rows, grid);
}

}  // namespace

void cuda_bn_relu(const BnReluParams& p, void* stream) {
  const int64_t rows = p.map.out_rows();
  if (rows * p.channels == 0) return;
  const bool aligned = is_aligned(p.x) && is_aligned(p.out) && is_aligned(p.state) && is_aligned(p.pivot);
  dispatch_dtype(p.dtype, [&](auto value) {
    using T = decltype(value);
    const auto config = bn_relu_config<T>(rows, p.channels, aligned, cuda_device("bn_relu"));
    if (config.vectorised)
      start<T, kVectorOf<T>>(p, rows, config.grid, stream);
    else
      start<T, 1>(p, rows, config.grid, stream);
  });
}

}  // namespace fusedres
