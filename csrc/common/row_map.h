#pragma once

#include <cstdint>

namespace fusedres {

// Rows of an NHWC tensor of which every stride-th pixel in height and width is taken: output pixel (n, p, q) reads
// source pixel (n, p·stride, q·stride). Sizes are the source's. constexpr: for the GPU too.
struct RowMap {
  int64_t batch;
  int64_t height;
  int64_t width;
  int64_t stride;

  constexpr int64_t out_height() const { return (height + stride - 1) / stride; }
  constexpr int64_t out_width() const { return (width + stride - 1) / stride; }
  constexpr int64_t out_rows() const { return batch * out_height() * out_width(); }

  constexpr int64_t source_row(int64_t row) const {
    if (stride == 1) return row;
    const int64_t q = row % out_width();
    const int64_t rest = row / out_width();
    const int64_t p = rest % out_height();
    const int64_t n = rest / out_height();
    return (n * height + p * stride) * width + q * stride;
  }
};

}  // namespace fusedres
