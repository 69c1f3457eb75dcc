#pragma once

#include <cstdint>

#include "common/channel_vector.h"
#include "common/dtype.h"
#include "common/norm.h"

// The CUDA launches of this folder for C++. No CUDA header is needed: streams are void*.

namespace fusedres {

struct BnFinalizeParams {
  const void* partials;  // [tiles, 2, channels] dtype: mean and M2 of each tile
  const void* rows;      // [tiles] dtype
  DType dtype;           // float32 or float64
  int64_t tiles;
  int64_t channels;
  void* state;  // [4, channels] dtype: mean, invstd, scale, shift
  Norm norm;
  ChannelVector pivot = {};  // subtracted from x before the means of the partials; 0 where not finite; may be null
};

struct BnPartialsParams {
  const void* x;  // [rows, channels]; the first row is the pivot
  DType dtype;
  int64_t rows;
  int64_t channels;
  int64_t tiles;     // as cuda_bn_partial_tiles returned
  void* partials;    // [tiles, 2, channels] arithmetic type: mean of x − pivot, and M2, of each tile
  void* row_counts;  // [tiles] like the partials
};

struct BnFrozenParams {
  DType dtype;  // of the state: float32 or float64
  int64_t channels;
  void* state;  // [4, channels]: mean, invstd, scale, shift
  Norm norm;    // num_batches_tracked, cumulative and momentum are not read
};

// The number of tiles into which the current device splits x.
int64_t cuda_bn_partial_tiles(const void* x, DType dtype, int64_t rows, int64_t channels);

void cuda_bn_partials(const BnPartialsParams& params, void* stream);

void cuda_bn_finalize(const BnFinalizeParams& params, void* stream);

void cuda_bn_frozen(const BnFrozenParams& params, void* stream);

}  // namespace fusedres
