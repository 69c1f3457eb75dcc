#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/norm.h"

namespace fusedres {

struct BnStatisticsParams {
  const void* x;  // [rows, channels], contiguous
  DType dtype;
  int64_t rows;
  int64_t channels;
  void* state;  // [4, channels], float64 for float64 x, else float32: mean, invstd, scale, shift
  Norm norm;
  int threads;
};

// Batch statistics of NHWC data per channel, merged without cancellation, and what follows from them:
// mean, invstd = (var + eps)^-1/2, scale = weight·invstd, shift = bias - scale·mean, and the running statistics.
void bn_statistics(const BnStatisticsParams& params);

// The state and the running statistics from each channel's mean and sum of squared deviations. running_offset, if not
// null, is added to the mean for the running one: the data were centred on it. x is not read.
void bn_finalize(const BnStatisticsParams& params, const double* mean, const double* m2, const double* running_offset);

// The same state from given statistics, which stay as they are: channels, state, dtype (of the activation) and
// norm without num_batches_tracked and momentum are read.
void bn_frozen(const BnStatisticsParams& params);

}  // namespace fusedres
