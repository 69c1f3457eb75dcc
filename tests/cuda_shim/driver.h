#pragma once

// What the checks of the CUDA kernels on the host share; driver.cpp runs them. To add an op: a file drive_<op>.cpp that
// compares its launches with plain double loops, each in a function registered by `const Check check{"op", function};`.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/bits.h"
#include "common/channel_vector.h"

namespace driver {

using namespace fusedres;  // NOLINT: tests

// A check by the name of its op.
struct Check {
  Check(const char* op, void (*run)());
};

// NaN equals NaN.
void expect_near(const char* what, double got, double want, double tolerance);

// The same values in every run.
std::vector<double> normal(size_t count, double mean = 0, double deviation = 1);

// Rounding errors of the arithmetic of a dtype, for values of size 1.
double rounding(DType dtype);

// Rounding of a value of size 1 to a dtype.
inline double storage(DType dtype) {
  return dtype == DType::kBFloat16 ? 4e-3 : dtype == DType::kFloat16 ? 5e-4 : rounding(dtype);
}

// A vector of exactly so many bytes on the heap, so that its end is guarded, as values of a dtype.
class Values {
 public:
  Values(DType dtype, const std::vector<double>& values) : dtype_(dtype), bytes_(values.size() * itemsize(dtype)) {
    for (size_t i = 0; i < values.size(); ++i) store_scalar(data(), static_cast<int64_t>(i), dtype_, values[i]);
  }
  Values(DType dtype, size_t count) : Values(dtype, std::vector<double>(count, NAN)) {}

  void* data() { return bytes_.data(); }
  DType dtype() const { return dtype_; }
  double operator[](int64_t i) const { return load_scalar(bytes_.data(), i, dtype_); }
  operator ChannelVector() { return {data(), dtype_}; }

  static size_t itemsize(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

 private:
  DType dtype_;
  std::vector<uint8_t> bytes_;
};

}  // namespace driver
