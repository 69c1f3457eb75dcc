#pragma once

namespace fusedres {

// CUDA versions as the API numbers them, 13000 for 13.0.
int cuda_runtime_version();  // linked into this module
int cuda_driver_version();   // the highest version that the driver supports; 0 without a driver

}  // namespace fusedres
