#pragma once

// All CUDA kernels start here. Neither this code nor the kernels allocate memory: the caller provides scratch memory.

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/cuda_device.h"

namespace fusedres {

// Throws if a CUDA call failed. Python gets a RuntimeError that names the op.
inline void check_cuda(const char* op, const char* call, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, so that the next call does not report it
  throw std::runtime_error(std::string(op) + ": " + call + " failed: " + cudaGetErrorString(error) + " (" +
                           cudaGetErrorName(error) + ")");
}

// The current device.
inline CudaDevice cuda_device(const char* op) {
  int index = 0;
  CudaDevice device{};
  check_cuda(op, "cudaGetDevice", cudaGetDevice(&index));
  check_cuda(op, "cudaDeviceGetAttribute",
             cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index));
  check_cuda(op, "cudaDeviceGetAttribute",
             cudaDeviceGetAttribute(&device.max_block_threads, cudaDevAttrMaxThreadsPerBlock, index));
  check_cuda(op, "cudaDeviceGetAttribute", cudaDeviceGetAttribute(&device.l2_bytes, cudaDevAttrL2CacheSize, index));
  return device;
}

// Whether 16 bytes can be loaded and stored at once.
inline bool is_aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

struct CudaLaunch {
  const char* op;
  void* stream;  // a cudaStream_t
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;   // dynamic shared memory of a block
  bool cooperative = false;  // all blocks run at once and may wait for each other (cooperative_groups::this_grid)
};

// Starts kernel(arguments...).
template <class... Parameters, class... Arguments>
void launch(const CudaLaunch& how, void (*kernel)(Parameters...), const Arguments&... arguments) {
  constexpr size_t kWithoutAsking = 48 << 10;  // more shared memory than this must be requested
  if (how.shared_bytes > kWithoutAsking)
    check_cuda(
        how.op, "cudaFuncSetAttribute",
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(how.shared_bytes)));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = static_cast<cudaStream_t>(how.stream);
  config.attrs = &attribute;
  config.numAttrs = how.cooperative ? 1 : 0;
  check_cuda(how.op, "cudaLaunchKernelEx", cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

// The number of blocks of a kernel that the device can run at once. This is the largest grid of a cooperative launch.
template <class... Parameters>
int resident_blocks(const char* op, void (*kernel)(Parameters...), int block_threads, size_t shared_bytes) {
  int blocks = 0;
  check_cuda(op, "cudaOccupancyMaxActiveBlocksPerMultiprocessor",
             cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, block_threads, shared_bytes));
  return blocks * cuda_device(op).multiprocessors;
}

}  // namespace fusedres
