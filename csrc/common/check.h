#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/dtype.h"

namespace fusedres {

// A last check that protects the pointers. Python checks all arguments first, with messages for users.
inline void require(bool condition, const char* op, const char* what) {
  if (!condition) throw std::invalid_argument(std::string("fusedres._C.") + op + ": " + what);
}

// Calls function(T{}) with the storage type of a run-time dtype.
template <class Function>
void dispatch_dtype(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(float{});
    case DType::kFloat64:
      return function(double{});
    case DType::kBFloat16:
      return function(BFloat16{});
    case DType::kFloat16:
      return function(Float16{});
  }
  throw std::invalid_argument("fusedres._C: unknown dtype code");
}

}  // namespace fusedres
