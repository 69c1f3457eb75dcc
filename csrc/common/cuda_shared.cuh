#pragma once

#include <cuda_runtime.h>

namespace fusedres {

// The dynamic shared memory of the block, aligned to 16 bytes. Kernels of a cooperative launch use no other shared
// memory: the host shim (tests/cuda_shim) runs their blocks at the same time and has only one copy of a `static
// __shared__` array.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef FUSEDRES_CUDA_SHIM
  return reinterpret_cast<T*>(cuda_shim::dynamic_shared());
#else
  extern __shared__ __align__(16) unsigned char fusedres_dynamic_shared[];
  return reinterpret_cast<T*>(fusedres_dynamic_shared);
#endif
}

}  // namespace fusedres
