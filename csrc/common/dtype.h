#pragma once

#include <cstdint>

namespace fusedres {

// Storage types of activations and parameters; fusedres/kernels/arguments.py uses the same numbers.
enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// Arithmetic type of a storage type: float64 computes in float64, everything else in float32.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

}  // namespace fusedres
