#pragma once

#include <cstdint>

#include "common/channel_vector.h"

namespace fusedres {

// A BatchNorm: its parameters, running statistics and settings. Every vector may be null.
struct Norm {
  ChannelVector weight;
  ChannelVector bias;
  ChannelVector running_mean;    // updated in place with batch statistics
  ChannelVector running_var;     // updated in place with the unbiased variance
  int64_t* num_batches_tracked;  // incremented with batch statistics; null: not tracked
  bool cumulative;               // the averaging factor is 1 / num_batches_tracked instead of momentum
  double momentum;
  double eps;
};

}  // namespace fusedres
