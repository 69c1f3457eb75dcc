#pragma once

#include "common/dtype.h"

namespace fusedres {

// A per-channel vector whose dtype is its own; data may be null where the vector is optional.
struct ChannelVector {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
};

}  // namespace fusedres
