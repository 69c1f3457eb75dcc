#pragma once

#include <cstdint>

#include "common/channel_vector.h"
#include "common/dtype.h"
#include "common/norm.h"

// The CUDA launches of this folder as C++ sees them: no CUDA header, streams as void*.

namespace fusedres {

struct BnFinalizeParams {
  const void* partials;  // [tiles, 2, channels] dtype: mean and M2 of each tile
  const void* rows;      // [tiles] dtype
  DType dtype;           // float32 or float64
  int64_t tiles;
  int64_t channels;
  void* state;  // [4, channels] dtype: mean, invstd, scale, shift
  Norm norm;
  ChannelVector pivot = {};  // the partials' means are of x − pivot, 0 where it is not finite; null: of x
};

struct BnPartialsParams {
  const void* x;  // [rows, channels], its first row the pivot
  DType dtype;
  int64_t rows;
  int64_t channels;
  int64_t tiles;     // of cuda_bn_partial_tiles
  void* partials;    // [tiles, 2, channels] arithmetic type: mean of x − pivot, and M2, of each tile
  void* row_counts;  // [tiles] like the partials
};

struct BnFrozenParams {
  DType dtype;  // of the state: float32 or float64
  int64_t channels;
  void* state;  // [4, channels]: mean, invstd, scale, shift
  Norm norm;    // num_batches_tracked, cumulative and momentum are not read
};

// How many tiles the current device takes for x.
int64_t cuda_bn_partial_tiles(const void* x, DType dtype, int64_t rows, int64_t channels);

void cuda_bn_partials(const BnPartialsParams& params, void* stream);

void cuda_bn_finalize(const BnFinalizeParams& params, void* stream);

void cuda_bn_frozen(const BnFrozenParams& params, void* stream);

}  // namespace fusedres
