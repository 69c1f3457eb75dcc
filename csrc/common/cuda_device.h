#pragma once

namespace fusedres {

// The properties of a device that determine the size of a launch.
struct CudaDevice {
  int multiprocessors;
  int max_block_threads;
  int l2_bytes;
};

}  // namespace fusedres
