#pragma once

// Conversions of bfloat16; see cuda_runtime.h in this folder.

#include "common/bits.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) {
  return {bits};
}
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) {
  return value.bits;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  return {fusedres::float_to_bf16(value)};
}
inline float __bfloat162float(__nv_bfloat16 value) {
  return fusedres::bf16_to_float(value.bits);
}
