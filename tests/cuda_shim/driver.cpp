// Runs the CUDA kernels on the host (cuda_runtime.h in this folder) and compares them with plain double loops, for the
// sanitizers of tests/test_cuda_sanitizers.py. `driver [op]` runs one op or all; if any result is wrong, it prints what
// is wrong and returns 1.

#include "driver.h"

#include <cstdio>
#include <random>
#include <string>
#include <utility>

namespace driver {
namespace {

int failures = 0;

std::vector<std::pair<std::string, void (*)()>>& checks() {
  static std::vector<std::pair<std::string, void (*)()>> registered;
  return registered;
}

}  // namespace

Check::Check(const char* op, void (*run)()) {
  checks().emplace_back(op, run);
}

void expect_near(const char* what, double got, double want, double tolerance) {
  if (std::abs(got - want) <= tolerance || got == want || (std::isnan(got) && std::isnan(want))) return;
  if (++failures <= 20) std::printf("%s: got %.9g, want %.9g within %.3g\n", what, got, want, tolerance);
}

std::vector<double> normal(size_t count, double mean, double deviation) {
  static std::mt19937 engine(0);
  std::normal_distribution<double> draw(mean, deviation);
  std::vector<double> values(count);
  for (double& value : values) value = draw(engine);
  return values;
}

double rounding(DType dtype) {
  return dtype == DType::kFloat64 ? 1e-15 : 1e-6;
}

int run(const std::string& only) {
  int found = 0;
  for (const auto& [name, check] : checks()) {
    if (!only.empty() && name != only) continue;
    const int before = failures;
    check();
    ++found;
    std::printf("%s: %s\n", name.c_str(), failures == before ? "right" : "wrong");
  }
  return found > 0 && failures == 0 ? 0 : 1;
}

}  // namespace driver

int main(int count, char** arguments) {
  return driver::run(count > 1 ? arguments[1] : "");
}
