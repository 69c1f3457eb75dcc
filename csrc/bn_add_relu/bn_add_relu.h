#pragma once

#include "common/dtype.h"
#include "common/row_map.h"

namespace fusedres {

struct BnAddReluParams {
  const void* x;  // [rows, channels], rows = shortcut_map.out_rows()
  DType dtype;
  int64_t channels;
  const void* state;     // [4, channels] arithmetic type: mean, invstd, scale, shift
  const void* shortcut;  // [batch, height, width, shortcut_channels] of shortcut_map
  RowMap shortcut_map;
  int64_t shortcut_channels;   // at most channels; the other channels get no shortcut (zero padding)
  const void* shortcut_state;  // [4, channels] to normalise a raw convolution output as the shortcut; may be null
  void* out;                   // [rows, channels]; may be x
  uint8_t* mask;               // [rows, ceil(channels / 8)], bit set where NOT (out <= 0); may be null
  int threads;
};

// out = relu(scale·x + shift + S), where S is the shortcut: unchanged, normalised, or subsampled and zero-padded in its
// channels.
void bn_add_relu(const BnAddReluParams& params);

}  // namespace fusedres
