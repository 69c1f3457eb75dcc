#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

// Scalar conversions between storage types and float. They round to nearest even and keep NaN.

namespace fusedres {

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline float bf16_to_float(uint16_t bits) {
  return bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude < 0x400u) {  // zero or subnormal: magnitude · 2^-24 is exact in float
    const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    return bit_cast<float>(bit_cast<uint32_t>(value) | sign);
  }
  return bit_cast<float>(sign | ((magnitude << 13) + 0x38000000u));
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal half: adding 0.5 aligns the mantissa and rounds to nearest even
    const uint32_t aligned = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f);
    return static_cast<uint16_t>(sign | (aligned - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}

// Loads a scalar of a run-time dtype. Per-channel parameters need it: their dtype may differ from that of the
// activations.
inline double load_scalar(const void* data, int64_t index, DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return static_cast<const double*>(data)[index];
    case DType::kBFloat16:
      return bf16_to_float(static_cast<const uint16_t*>(data)[index]);
    case DType::kFloat16:
      return half_to_float(static_cast<const uint16_t*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

inline void store_scalar(void* data, int64_t index, DType dtype, double value) {
  switch (dtype) {
    case DType::kFloat64:
      static_cast<double*>(data)[index] = value;
      break;
    case DType::kBFloat16:
      static_cast<uint16_t*>(data)[index] = float_to_bf16(static_cast<float>(value));
      break;
    case DType::kFloat16:
      static_cast<uint16_t*>(data)[index] = float_to_half(static_cast<float>(value));
      break;
    default:
      static_cast<float*>(data)[index] = static_cast<float>(value);
  }
}

}  // namespace fusedres
