#include "common/cuda_info.h"
#include "common/cuda_launch.cuh"

namespace fusedres {

int cuda_runtime_version() {
  int version = 0;
  check_cuda("build_info", "cudaRuntimeGetVersion", cudaRuntimeGetVersion(&version));
  return version;
}

int cuda_driver_version() {
  int version = 0;
  check_cuda("driver_version", "cudaDriverGetVersion", cudaDriverGetVersion(&version));
  return version;
}

}  // namespace fusedres
