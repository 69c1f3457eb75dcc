#include "conv_wgrad/conv_wgrad.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>

#include "common/bits.h"
#include "common/check.h"
#include "common/gate.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "conv_wgrad/blocks.h"

#define FUSEDRES_KERNEL_FILE "conv_wgrad/kernel.inc"
#include "common/for_each_isa.h"

namespace fusedres {

int64_t conv_wgrad_splits(const ConvolutionMap& map) {
  return WgradTasks::splits_of(PixelBlocks(map));
}

void conv_wgrad(const ConvWgradParams& p) {
  require(p.grad != nullptr && p.input != nullptr && p.partials != nullptr, "conv_wgrad", "null pointer");
  require((p.y == nullptr) == (p.coefficients == nullptr), "conv_wgrad", "y and coefficients belong together");
  require(p.map.batch > 0 && p.map.out_size(0) > 0 && p.map.out_size(1) > 0, "conv_wgrad", "there are no pixels");
  FUSEDRES_SELECT_ISA(sum_all)(p);
}

namespace {

template <class A, class T>
void finalize(const ConvWgradFinalizeParams& p) {
  const int64_t channels = p.map.channels, columns = p.map.kernel[0] * p.map.kernel[1] * channels;
  const int64_t size = p.map.out_channels * columns;
  const A* partials = static_cast<const A*>(p.partials);
  const bool dense = p.strides.channel == 1 && p.strides.column == channels &&
                     p.strides.row == p.map.kernel[1] * channels && p.strides.out_channel == columns;
  const int threads = threads_for(size * p.splits * static_cast<int64_t>(sizeof(A)), p.threads);
  parallel_for(threads, p.map.out_channels, [&](int64_t k) {
    const std::unique_ptr<A[]> buffer(new A[columns]);
    std::copy_n(partials + k * columns, columns, buffer.get());
    for (int64_t split = 1; split < p.splits; ++split) {
      const A* other = partials + split * size + k * columns;
      for (int64_t i = 0; i < columns; ++i) buffer[i] += other[i];
    }
    T* out = static_cast<T*>(p.grad_weight) + k * p.strides.out_channel;
    if constexpr (std::is_same_v<A, T>) {
      if (dense) {
        std::copy_n(buffer.get(), columns, out);
        return;
      }
    }
    const A* value = buffer.get();
    for (int64_t row = 0; row < p.map.kernel[0]; ++row)
      for (int64_t column = 0; column < p.map.kernel[1]; ++column)
        for (int64_t c = 0; c < channels; ++c)
          store_scalar(out, row * p.strides.row + column * p.strides.column + c * p.strides.channel, p.dtype, *value++);
  });
}

}  // namespace

void conv_wgrad_finalize(const ConvWgradFinalizeParams& p) {
  require(p.partials != nullptr && p.grad_weight != nullptr && p.splits > 0, "conv_wgrad_finalize", "null pointer");
  dispatch_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    p.partials_dtype == DType::kFloat64 ? finalize<double, T>(p) : finalize<float, T>(p);
  });
}

}  // namespace fusedres
