#pragma once

// Replaces CUDA's header of the same name in tests: with it, csrc/**/*.cuh and *.cu compile with g++ (-std=c++20) and
// run on the host. Each CUDA thread is a std::thread. In __syncthreads the threads of a block wait at a std::barrier,
// and warp shuffles go through exchange slots. Device pointers are host pointers, and a launch returns when its kernel
// is done.
//
// - Blocks run one after another, so a `static __shared__` array is one static array. Blocks of a cooperative launch
//   run at the same time, so such kernels use dynamic shared memory only (csrc/common/cuda_shared.cuh).
// - No thread may return before the last barrier or shuffle of its block or warp: the others would wait forever.
// - A shuffle is also a barrier of its warp here, which hides a missing __syncwarp. There are no tensor cores, and
//   nothing shows what code nvcc generates.

#define FUSEDRES_CUDA_SHIM

#include <algorithm>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Memory of other types may be read and written through these, as on a device.
struct alignas(8) [[gnu::may_alias]] uint2 {
  unsigned x, y;
};
struct alignas(16) [[gnu::may_alias]] uint4 {
  unsigned x, y, z, w;
};

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_shim {

// The simulated device is small, so that grids and blocks are small.
constexpr int kMultiprocessors = 2;
constexpr int kMaxBlockThreads = 64;
constexpr int kBlocksAMultiprocessor = 2;
constexpr int kL2Bytes = 1 << 14;
constexpr size_t kMaxSharedBytes = 232448;

struct Warp {
  explicit Warp(std::ptrdiff_t threads) : barrier(threads) {}
  std::barrier<> barrier;
  uint64_t slots[2][warpSize] = {};  // exchanges alternate: one array is read while the other is written
};

struct Block {
  Block(unsigned threads, size_t shared_bytes) : barrier(threads), shared_bytes(shared_bytes) {
    for (unsigned first = 0; first < threads; first += warpSize)
      warps.push_back(std::make_unique<Warp>(std::min<unsigned>(warpSize, threads - first)));
    // exactly the requested number of bytes, so that AddressSanitizer finds an overrun
    shared = static_cast<unsigned char*>(::operator new(shared_bytes, std::align_val_t{16}));
  }
  ~Block() { ::operator delete(shared, std::align_val_t{16}); }
  Block(const Block&) = delete;

  std::barrier<> barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  unsigned char* shared;
  size_t shared_bytes;
};

inline thread_local Block* block;
inline thread_local Warp* warp;
inline thread_local int lane;
inline thread_local int phase;
inline thread_local std::barrier<>* grid;  // the barrier of a cooperative launch

inline unsigned char* dynamic_shared() {
  return block->shared;
}

// Gives every lane access to the values of all lanes; all lanes of the warp must call it.
template <class T, class Read>
T exchange(T value, const Read& read) {
  static_assert(sizeof(T) <= 8);
  uint64_t* slots = warp->slots[phase];
  phase ^= 1;
  std::memcpy(&slots[lane], &value, sizeof(T));
  warp->barrier.arrive_and_wait();
  return read([slots](int from) {
    T got;
    std::memcpy(&got, &slots[from], sizeof(T));
    return got;
  });
}

// Runs one CUDA thread of each block from `first` to `last`, one after another.
template <class Run>
void run_thread(Block& mine, unsigned thread, dim3 block_size, dim3 grid_size, uint64_t first, uint64_t last,
                const Run& run) {
  block = &mine;
  warp = mine.warps[thread / warpSize].get();
  lane = static_cast<int>(thread % warpSize);
  phase = 0;
  blockDim = block_size;
  gridDim = grid_size;
  threadIdx = {thread % block_size.x, thread / block_size.x % block_size.y, thread / block_size.x / block_size.y};
  for (uint64_t index = first; index < last; ++index) {
    blockIdx = {static_cast<unsigned>(index % grid_size.x), static_cast<unsigned>(index / grid_size.x % grid_size.y),
                static_cast<unsigned>(index / grid_size.x / grid_size.y)};
    if (thread == 0) std::memset(mine.shared, 0xff, mine.shared_bytes);  // NaN: no kernel may rely on old content
    mine.barrier.arrive_and_wait();
    run();
    mine.barrier.arrive_and_wait();
  }
}

// Runs all threads of all blocks: the blocks at the same time if `concurrent`, otherwise one after another.
template <class Run>
void run_grid(dim3 grid_size, dim3 block_size, size_t shared_bytes, bool concurrent, const Run& run) {
  const unsigned threads = block_size.x * block_size.y * block_size.z;
  const uint64_t blocks = static_cast<uint64_t>(grid_size.x) * grid_size.y * grid_size.z;
  const uint64_t teams = concurrent ? blocks : 1;
  std::barrier<> whole(static_cast<std::ptrdiff_t>(teams * threads));
  std::vector<std::unique_ptr<Block>> storage;
  std::vector<std::thread> pool;
  for (uint64_t team = 0; team < teams; ++team) {
    storage.push_back(std::make_unique<Block>(threads, shared_bytes));
    for (unsigned thread = 0; thread < threads; ++thread)
      pool.emplace_back([&, team, thread, mine = storage.back().get()] {
        grid = concurrent ? &whole : nullptr;
        run_thread(*mine, thread, block_size, grid_size, concurrent ? team : 0, concurrent ? team + 1 : blocks, run);
      });
  }
  for (std::thread& thread : pool) thread.join();
}

}  // namespace cuda_shim

// Device functions

inline void __syncthreads() {
  cuda_shim::block->barrier.arrive_and_wait();
}

inline void __syncwarp(unsigned = 0xffffffffu) {
  cuda_shim::warp->barrier.arrive_and_wait();
}

template <class T>
T __shfl_sync(unsigned, T value, int from, int width = warpSize) {
  const int first = cuda_shim::lane / width * width;
  return cuda_shim::exchange(value, [&](const auto& of) { return of(first + from % width); });
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask, int width = warpSize) {
  const int from = cuda_shim::lane ^ mask;
  const bool inside = from / width <= cuda_shim::lane / width;
  return cuda_shim::exchange(value, [&](const auto& of) { return of(inside ? from : cuda_shim::lane); });
}

template <class T>
T __shfl_down_sync(unsigned, T value, unsigned delta, int width = warpSize) {
  const int from = cuda_shim::lane + static_cast<int>(delta);
  const bool inside = cuda_shim::lane % width + static_cast<int>(delta) < width;
  return cuda_shim::exchange(value, [&](const auto& of) { return of(inside ? from : cuda_shim::lane); });
}

template <class T>
T __shfl_up_sync(unsigned, T value, unsigned delta, int width = warpSize) {
  const int from = cuda_shim::lane - static_cast<int>(delta);
  const bool inside = cuda_shim::lane % width >= static_cast<int>(delta);
  return cuda_shim::exchange(value, [&](const auto& of) { return of(inside ? from : cuda_shim::lane); });
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return cuda_shim::exchange(static_cast<unsigned>(predicate != 0), [&](const auto& of) {
    unsigned bits = 0;
    for (int lane = 0; lane < warpSize; ++lane)
      if (mask >> lane & 1) bits |= of(lane) << lane;
    return bits;
  });
}

inline float __uint_as_float(unsigned bits) {
  return std::bit_cast<float>(bits);
}
inline unsigned __float_as_uint(float value) {
  return std::bit_cast<unsigned>(value);
}
inline int __popc(unsigned bits) {
  return std::popcount(bits);
}
template <class T>
T __ldg(const T* source) {
  return *source;
}

inline void __stwb(uint4* target, uint4 value) {
  *target = value;
}

using std::fma;
using std::isfinite;
using std::isnan;
using std::max;
using std::min;
using std::sqrt;
inline float rsqrt(float value) {
  return 1.0f / std::sqrt(value);
}
inline double rsqrt(double value) {
  return 1.0 / std::sqrt(value);
}
inline float rsqrtf(float value) {
  return rsqrt(value);
}

// The functions of the runtime API that csrc calls

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2 };

struct CUstream_st;
using cudaStream_t = CUstream_st*;

union cudaLaunchAttributeValue {
  int cooperative;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration"
         : error == cudaErrorInvalidValue       ? "cudaErrorInvalidValue"
                                                : "cudaSuccess";
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument"
         : error == cudaErrorInvalidValue       ? "invalid argument"
                                                : "no error";
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? cuda_shim::kMultiprocessors
           : attribute == cudaDevAttrL2CacheSize       ? cuda_shim::kL2Bytes
                                                       : cuda_shim::kMaxBlockThreads;
  return cudaSuccess;
}
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*)(Parameters...), cudaFuncAttribute, int bytes) {
  return static_cast<size_t>(bytes) <= cuda_shim::kMaxSharedBytes ? cudaSuccess : cudaErrorInvalidValue;
}
template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Parameters...), int, size_t) {
  *blocks = cuda_shim::kBlocksAMultiprocessor;
  return cudaSuccess;
}

// Refuses the launches that a GPU refuses.
template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  const bool empty = threads == 0 || grid.x == 0 || grid.y == 0 || grid.z == 0;
  if (empty || threads > 1024 || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (config->dynamicSmemBytes > cuda_shim::kMaxSharedBytes) return cudaErrorInvalidValue;
  const bool cooperative = config->numAttrs > 0 && config->attrs[0].val.cooperative != 0;
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  if (cooperative && blocks > cuda_shim::kMultiprocessors * cuda_shim::kBlocksAMultiprocessor)
    return cudaErrorInvalidConfiguration;
  cuda_shim::run_grid(grid, block, config->dynamicSmemBytes, cooperative, [&] { kernel(arguments...); });
  return cudaSuccess;
}
