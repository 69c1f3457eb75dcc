#pragma once

namespace fusedres {

// What a launch is sized by.
struct CudaDevice {
  int multiprocessors;
  int max_block_threads;
  int l2_bytes;
};

}  // namespace fusedres
