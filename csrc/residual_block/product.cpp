#include "residual_block/product.h"

#include <cstring>
#include <utility>

#include "common/parallel.h"

namespace fusedres {
namespace {

using aten::Shape;
using aten::Tensor;

// Returns a row for each pixel of the output, with what each tap reads: [taps, channels], zeros outside of the image.
Tensor gather(const Tensor& x, const ConvolutionMap& map, int threads) {
  const int64_t taps = map.kernel[0] * map.kernel[1], rows = map.out_pixels();
  const int64_t height = map.out_size(0), width = map.out_size(1);
  Tensor columns = aten::empty({rows, taps * map.channels}, x.torch_dtype());
  const int64_t pixel_bytes = x.bytes() / (map.batch * map.height * map.width);
  const char* const source = static_cast<const char*>(x.data());
  char* const target = static_cast<char*>(columns.data());
  parallel_for(threads_for(columns.bytes(), threads), map.batch * height, [&](int64_t line) {
    const int64_t image = line / height, out_row = line % height;
    char* out = target + line * width * taps * pixel_bytes;
    for (int64_t out_column = 0; out_column < width; ++out_column) {
      for (int64_t tap = 0; tap < taps; ++tap, out += pixel_bytes) {
        const int64_t row = out_row * map.stride[0] - map.padding[0] + tap / map.kernel[1] * map.dilation[0];
        const int64_t column = out_column * map.stride[1] - map.padding[1] + tap % map.kernel[1] * map.dilation[1];
        if (row < 0 || row >= map.height || column < 0 || column >= map.width) {
          std::memset(out, 0, pixel_bytes);
        } else {
          std::memcpy(out, source + ((image * map.height + row) * map.width + column) * pixel_bytes, pixel_bytes);
        }
      }
    }
  });
  return columns;
}

Tensor rows_of(const Tensor& x) {
  const Shape shape = x.shape();
  return aten::matrix(x, shape.rows(), shape.channels);
}

}  // namespace

Tensor product(const Tensor& x, const Tensor& weight) {
  Shape shape = x.shape();
  const int64_t channels = shape.channels;
  shape.channels = weight.sizes()[0];
  Tensor out = aten::empty_channels_last(shape, x.torch_dtype());
  aten::multiply(rows_of(out), rows_of(x), aten::transposed(weight, shape.channels, channels));
  return out;
}

Tensor product_input_gradient(const Tensor& grad, const Tensor& weight) {
  Shape shape = grad.shape();
  const int64_t out_channels = shape.channels;
  shape.channels = weight.sizes()[1];
  Tensor out = aten::empty_channels_last(shape, grad.torch_dtype());
  aten::multiply(rows_of(out), rows_of(grad), aten::matrix(weight, out_channels, shape.channels));
  return out;
}

Tensor product_weight_gradient(const Tensor& grad, const Tensor& x, const Tensor& weight, const ConvolutionMap& map,
                               int threads) {
  const int64_t rows = map.out_pixels(), columns = map.kernel[0] * map.kernel[1] * map.channels;
  Tensor gathered;
  if (!map.is_pointwise()) gathered = gather(x, map, threads);
  const Tensor pixels = aten::matrix(map.is_pointwise() ? x : gathered, rows, columns);
  // The columns are in the order of a channels_last weight.
  Tensor result = aten::empty_like(weight);
  Tensor ordered;
  if (!weight.is_channels_last()) ordered = aten::empty_channels_last(weight.shape(), weight.torch_dtype());
  const Tensor& sums = ordered.defined() ? ordered : result;
  aten::multiply(aten::matrix(sums, map.out_channels, columns), aten::transposed(grad, rows, map.out_channels), pixels);
  if (ordered.defined()) aten::copy(result, ordered);
  return result;
}

}  // namespace fusedres
