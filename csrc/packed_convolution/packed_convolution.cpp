#include "packed_convolution/packed_convolution.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "common/bits.h"
#include "common/check.h"
#include "common/gate.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "packed_convolution/blocks.h"

#define FUSEDRES_KERNEL_FILE "packed_convolution/kernel.inc"
#include "common/for_each_isa.h"

namespace fusedres {

int64_t packed_size(const ConvolutionMap& map) {
  const int64_t panel = FUSEDRES_SELECT_ISA(panel_size)();
  return (map.out_channels + panel - 1) / panel * panel * DepthBlocks(map).depth();
}

void pack_weight(const PackWeightParams& p) {
  require(p.weight != nullptr && p.panels != nullptr, "pack_weight", "null pointer");
  FUSEDRES_SELECT_ISA(pack_all)(p);
}

bool own_convolutions_are_faster() {
  return current_isa() == Isa::kAvx2;
}

void packed_convolution(const PackedConvolutionParams& p) {
  if (p.map.batch == 0) return;
  require(p.x != nullptr && p.panels != nullptr && p.bias != nullptr && p.out != nullptr, "packed_convolution",
          "null pointer");
  require(p.shortcut != p.out, "packed_convolution", "the shortcut must not be the result's memory");
  require(p.map.out_size(0) > 0 && p.map.out_size(1) > 0, "packed_convolution", "the kernel does not fit");
  FUSEDRES_SELECT_ISA(convolve_all)(p);
}

}  // namespace fusedres
