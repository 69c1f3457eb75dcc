#pragma once

// Helpers of the checks of the CUDA kernels on the host, which driver.cpp runs. To add an op, write drive_<op>.cpp with
// functions that compare its launches with plain double loops; `const Check check{"op", function};` registers one.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/bits.h"
#include "common/channel_vector.h"

namespace driver {

using namespace fusedres;  // NOLINT: tests

// Registers a check under the name of its op.
struct Check {
  Check(const char* op, void (*run)());
};

// Counts a failure if |got - want| > tolerance; NaN equals NaN.
void expect_near(const char* what, double got, double want, double tolerance);

// Normal values, the same in every run.
std::vector<double> normal(size_t count, double mean = 0, double deviation = 1);

// A bound for the rounding errors of a dtype's arithmetic, for values of size 1.
double rounding(DType dtype);

// A bound for the error of rounding a value of size 1 to a dtype.
inline double storage(DType dtype) {
  return dtype == DType::kBFloat16 ? 4e-3 : dtype == DType::kFloat16 ? 5e-4 : rounding(dtype);
}

// Values of a dtype in exactly as many bytes on the heap as needed, so that the sanitizer guards the end.
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
