#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/norm.h"

namespace fusedres {

struct BnStatisticsParams {
  const void* x;  // [rows, channels], contiguous; written where `added` is given
  DType dtype;
  int64_t rows;
  int64_t channels;
  void* state;  // [4, channels], float64 for float64 x, else float32: mean, invstd, scale, shift
  Norm norm;
  int threads;
  const void* added = nullptr;  // like x: it is added to x first; null: nothing is
  int64_t samples = 1;          // each of rows / samples rows
  void* means = nullptr;        // [samples, channels] like state: the means of each sample; null: not wanted
};

// Batch statistics of NHWC data per channel, merged without cancellation, and what follows from them:
// mean, invstd = (var + eps)^-1/2, scale = weight·invstd, shift = bias - scale·mean, and the running statistics.
void bn_statistics(const BnStatisticsParams& params);

// Computes the state and the running statistics from the mean and the sum of squared deviations of each channel. If the
// data were centred, running_offset is what was subtracted; it is added to the mean for the running mean, and may be
// null. x is not read.
void bn_finalize(const BnStatisticsParams& params, const double* mean, const double* m2, const double* running_offset);

// Computes the same state from the running statistics, which do not change. Reads only channels, state, dtype (of the
// activation) and norm, of which the averaging settings are ignored.
void bn_frozen(const BnStatisticsParams& params);

}  // namespace fusedres
