#pragma once

#include <cstdint>
#include <vector>

#include "aten/aten.h"

// The passes of a residual block on the CPU with torch's convolutions, in the order of fusedres/autograd/forward.py and
// backward.py, which explain the mathematics. The same kernels run on the same tensors, without Python between them.
namespace fusedres {

struct ConvBn {
  aten::ConvolutionParams convolution;
  bool pixelwise;         // a 1x1 kernel without padding or groups, and the same stride for both axes
  bool batch_statistics;  // false: the running statistics, as constants
  bool update;            // update the running statistics with this batch
  bool cumulative;        // the averaging factor is 1 / num_batches_tracked instead of momentum
  double momentum;
  double eps;
};

// Whether the settings of a convolution are valid.
inline bool is_sound(const ConvBn& unit) {
  const aten::ConvolutionParams& p = unit.convolution;
  for (int axis = 0; axis < 2; ++axis) {
    if (p.stride[axis] < 1 || p.padding[axis] < 0 || p.dilation[axis] < 1) return false;
  }
  return p.groups >= 1;
}

struct ResidualBlock {
  std::vector<ConvBn> units;  // of the branch in order, then the projection's
  bool projection;
  int64_t pad_stride;        // of an identity or zero-padded shortcut
  bool one_pass_last;        // the statistics of the last unit are computed before its convolution
  bool one_pass_projection;  // those of the projection
  bool recompute_last;       // the last unit's convolution runs again in backward instead of saving its output
  bool recompute_projection;
  int threads;

  size_t last() const { return units.size() - 1 - (projection ? 1 : 0); }
  bool one_pass(size_t index) const { return index == last() ? one_pass_last : index > last() && one_pass_projection; }
  bool recomputes(size_t index) const {
    return index == last() ? recompute_last : index > last() && recompute_projection;
  }
};

// What a one-pass unit saves instead of the output of its convolution.
struct OnePass {
  aten::Tensor pivot;      // (C,)
  aten::Tensor total;      // (C,), float64
  aten::Tensor projected;  // (K, C)
};

struct UnitTensors {
  aten::Tensor conv_weight;
  aten::Tensor weight;
  aten::Tensor bias;
  aten::Tensor running_mean;
  aten::Tensor running_var;
  aten::Tensor num_batches_tracked;
};

struct ResidualBlockForward {
  aten::Tensor out;
  aten::Tensor mask;                  // packed bits of the last ReLU
  std::vector<aten::Tensor> outputs;  // raw outputs of the convolutions in the units' order; undefined if not saved
  std::vector<aten::Tensor> states;   // (4, C) of the BatchNorms
  OnePass last;
  OnePass projection;
};

// Whether the passes below accept these tensors: x is channels_last, the convolution weights have its dtype, or float32
// if x has 16 bits, and the dtype is float32 if a unit is one-pass.
bool serves(const aten::Tensor& x, const ResidualBlock& block, const std::vector<UnitTensors>& tensors);

// Computes relu(F(x) + S(x)), and what its backward needs. The weights are rounded to the dtype of x.
ResidualBlockForward residual_block_forward(const aten::Tensor& x, const ResidualBlock& block,
                                            std::vector<UnitTensors>& tensors);

// Computes the same with constant statistics, some images at a time, and keeps nothing for backward.
aten::Tensor residual_block_infer(const aten::Tensor& x, const ResidualBlock& block, std::vector<UnitTensors>& tensors,
                                  int64_t images_at_a_time);

struct ResidualBlockBackward {
  aten::Tensor grad_out;
  aten::Tensor x;
  aten::Tensor mask;
  std::vector<aten::Tensor> params;  // conv weight, BN weight, BN bias of every unit
  std::vector<aten::Tensor> outputs;
  std::vector<aten::Tensor> states;
  OnePass last;
  OnePass projection;
  std::vector<bool> needs;  // of x, then of every parameter
  bool donated;             // the outputs may be overwritten with their gradients
};

bool serves(const ResidualBlock& block, const ResidualBlockBackward& saved);

// Returns the gradients in the order of `needs`. Those that are not needed are undefined.
std::vector<aten::Tensor> residual_block_backward(const ResidualBlock& block, ResidualBlockBackward& saved);

}  // namespace fusedres
