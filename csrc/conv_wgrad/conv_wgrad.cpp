#include "conv_wgrad/conv_wgrad.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>

#include "common/bits.h"
#include "common/check.h"
#include "common/gate.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "conv_wgrad/amx.h"
#include "conv_wgrad/blocks.h"

#define FUSEDRES_KERNEL_FILE "conv_wgrad/kernel.inc"
#include "common/for_each_isa.h"

namespace fusedres {

int64_t conv_wgrad_splits(const ConvolutionMap& map) {
  return WgradTasks::splits_of(PixelBlocks(map));
}

void conv_wgrad(const ConvWgradParams& p) {
  require(p.grad != nullptr && p.input != nullptr && p.partials != nullptr, "conv_wgrad", "null pointer");
  require((p.y == nullptr) == (p.coefficients == nullptr), "conv_wgrad", "y and coefficients belong together");
  require(p.map.batch > 0 && p.map.out_size(0) > 0 && p.map.out_size(1) > 0, "conv_wgrad", "there are no pixels");
  FUSEDRES_SELECT_ISA(sum_all)(p);
}

void conv_wgrad_finalize(const ConvWgradFinalizeParams& p) {
  require(p.partials != nullptr && p.grad_weight != nullptr && p.splits > 0, "conv_wgrad_finalize", "null pointer");
  FUSEDRES_SELECT_ISA(finalize_all)(p);
}

}  // namespace fusedres
