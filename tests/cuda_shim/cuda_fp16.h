#pragma once

// Conversions of float16; see cuda_runtime.h in this folder.

#include "common/bits.h"

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) {
  return {bits};
}
inline uint16_t __half_as_ushort(__half value) {
  return value.bits;
}
inline __half __float2half_rn(float value) {
  return {fusedres::float_to_half(value)};
}
inline float __half2float(__half value) {
  return fusedres::half_to_float(value.bits);
}
