#pragma once

#include <cstring>
#include <memory>

#include "common/fold.h"
#include "gated_tail/gated_tail.h"

namespace fusedres {

// A tail with several rows as one (common/fold.h), and its vectors repeated.
class FoldedTail {
 public:
  // mask: the pass reads or writes bits, which must not be padded at the end of a row.
  FoldedTail(const GatedTailParams& p, bool mask) : params_(p), rows_(1) {
    if (!p.per_sample() && !(mask && p.channels % 8 != 0)) rows_ = rows_at_once(p.rows(), p.channels, kLeastChannels);
    if (rows_ == 1) return;
    bytes_ = p.channels * (p.dtype == DType::kFloat64 ? 8 : 4);
    memory_.reset(new char[kVectors * rows_ * bytes_]);
    free_ = memory_.get();
    params_.batch = 1;
    params_.pixels = p.rows() / rows_;
    params_.channels = p.channels * rows_;
    for (TailTerm* term : {&params_.branch, &params_.shortcut}) {
      term->state = repeated(term->state, 4);
      term->factor = repeated(term->factor, 1);
      term->coefficients = repeated(term->coefficients, 4);
    }
    params_.slope = repeated(params_.slope, 1);
  }

  const GatedTailParams& params() const { return params_; }
  int64_t rows() const { return rows_; }

 private:
  static constexpr int64_t kLeastChannels = 64;
  static constexpr int64_t kVectors = 2 * 9 + 1;

  const void* repeated(const void* vectors, int64_t count) {
    if (vectors == nullptr) return nullptr;
    char* const target = free_;
    for (int64_t vector = 0; vector < count; ++vector)
      for (int64_t row = 0; row < rows_; ++row, free_ += bytes_)
        std::memcpy(free_, static_cast<const char*>(vectors) + vector * bytes_, bytes_);
    return target;
  }

  GatedTailParams params_;
  int64_t rows_;
  int64_t bytes_ = 0;  // of one vector
  std::unique_ptr<char[]> memory_;
  char* free_ = nullptr;
};

}  // namespace fusedres
