#pragma once

#include <cstdint>

#include "bn_backward/bn_backward_cuda.h"
#include "common/cuda_device.h"

// Decides when BatchNorm's backward runs in one launch. The numbers are guesses: no GPU has measured them yet.

namespace fusedres {

// The bytes that the sums read, and that the elementwise step reads again.
inline int64_t bn_backward_bytes(const BnBackwardParams& p) {
  const int64_t itemsize = p.dtype == DType::kFloat64 ? 8 : p.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t tensors = 1 + p.branches + (p.gate.kind == GateKind::kOutput ? 1 : 0);
  const int64_t bits = p.gate.kind == GateKind::kBits ? (p.channels + 7) / 8 : 0;
  return p.rows * (tensors * p.channels * itemsize + bits);
}

// One launch pays if the data that is read twice fits into half of L2 (the results pass through the rest), and if each
// block has few tiles to sum: for many tiles, a separate kernel with its higher occupancy is better. resident: the
// number of blocks that the device runs at once.
inline bool fused_pays(const BnBackwardParams& p, int64_t blocks, int resident, const CudaDevice& device) {
  return 2 * bn_backward_bytes(p) <= device.l2_bytes && blocks <= 4ll * resident;
}

}  // namespace fusedres
