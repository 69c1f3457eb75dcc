#pragma once

#include "common/dtype.h"

namespace fusedres {

// A per-channel vector. Its dtype may differ from that of the activations. data is null if an optional vector is
// absent.
struct ChannelVector {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
};

}  // namespace fusedres
