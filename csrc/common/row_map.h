#pragma once

#include <cstdint>

namespace fusedres {

// Maps the rows of a subsampled NHWC tensor to rows of its source: output pixel (n, p, q) is source pixel (n, p·stride,
// q·stride). The sizes are those of the source. The functions are constexpr so that the GPU can call them too.
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

// Walks over the source rows of consecutive output rows, from `first` on, without a division for each row.
class RowCursor {
 public:
  RowCursor(const RowMap& map, int64_t first)
      : map_(map),
        columns_(map.out_width()),
        lines_(map.out_height()),
        column_(first % columns_),
        line_(first / columns_ % lines_),
        line_start_(map.source_row(first) - column_ * map.stride) {}

  int64_t row() const { return line_start_ + column_ * map_.stride; }

  void next() {
    if (++column_ < columns_) return;
    column_ = 0;
    line_start_ += map_.stride * map_.width;
    if (++line_ < lines_) return;
    line_ = 0;
    line_start_ += (map_.height - lines_ * map_.stride) * map_.width;
  }

 private:
  RowMap map_;
  int64_t columns_;
  int64_t lines_;
  int64_t column_;
  int64_t line_;
  int64_t line_start_;
};

}  // namespace fusedres
