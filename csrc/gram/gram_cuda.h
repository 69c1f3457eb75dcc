#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/row_map.h"

// The CUDA launches of this folder for C++. No CUDA header is needed: streams are void*.

namespace fusedres {

struct GramCudaParams {
  const void* x;  // [batch, height, width, channels]
  DType dtype;
  bool tf32;  // compute float32 on the tensor cores, in tf32
  RowMap map;
  int64_t channels;
  const void* state;  // [4, channels] of A, the arithmetic type: mean, invstd, scale, shift; null: z is x
  void* out;          // [map.out_rows(), channels] like x: z − t; null: not wanted
  void* pivot;        // [channels] of A: t
  int64_t split_rows;
  int64_t splits;  // number of splits of split_rows rows, which cover all rows
  void* partials;  // [splits, channels + 1, channels] of A: G (only on and above the diagonal), then s
  double* total;   // [channels]: s
  double* matrix;  // [channels, channels]: G
};

void cuda_gram(const GramCudaParams& params, void* stream);

}  // namespace fusedres
