#pragma once

#include <cstdint>

#include "common/channel_vector.h"
#include "common/dtype.h"

// The CUDA launches of this folder as C++ sees them: no CUDA header, streams as void*.

namespace fusedres {

struct BnFinalizeParams {
  const void* partials;  // [tiles, 2, channels] dtype: mean and M2 of each tile
  const void* rows;      // [tiles] dtype
  DType dtype;           // float32 or float64
  int64_t tiles;
  int64_t channels;
  void* state;  // [4, channels] dtype: mean, invstd, scale, shift
  ChannelVector weight;
  ChannelVector bias;
  ChannelVector running_mean;    // updated in place
  ChannelVector running_var;     // updated in place with the unbiased variance
  int64_t* num_batches_tracked;  // incremented; null where not tracked
  bool cumulative;               // averaging factor 1 / num_batches_tracked instead of momentum
  double momentum;
  double eps;
};

struct BnFrozenParams {
  DType dtype;  // of the state: float32 or float64
  int64_t channels;
  void* state;  // [4, channels]: mean, invstd, scale, shift
  ChannelVector weight;
  ChannelVector bias;
  ChannelVector running_mean;
  ChannelVector running_var;
  double eps;
};

void cuda_bn_finalize(const BnFinalizeParams& params, void* stream);

void cuda_bn_frozen(const BnFrozenParams& params, void* stream);

}  // namespace fusedres
