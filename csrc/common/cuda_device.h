#pragma once

namespace fusedres {

// What a launch is sized by.
struct CudaDevice {
  int multiprocessors;
  int max_block_threads;
};

}  // namespace fusedres
