#include "packed_convolution/packed_convolution.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "common/bits.h"
#include "common/check.h"
#include "common/gate.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "convolution_method/convolution_method.h"
#include "packed_convolution/blocks.h"

#define FUSEDRES_KERNEL_FILE "packed_convolution/kernel.inc"
#include "common/for_each_isa.h"

namespace fusedres {

int64_t packed_size(const ConvolutionMap& map, bool winograd) {
  const int64_t panel = FUSEDRES_SELECT_ISA(panel_size)();
  const int64_t depth = winograd ? kWinogradPositions * map.channels : DepthBlocks(map).depth();
  return (map.out_channels + panel - 1) / panel * panel * depth;
}

void pack_weight(const PackWeightParams& p) {
  require(p.weight != nullptr && p.panels != nullptr, "pack_weight", "null pointer");
  if (p.winograd) {
    require(takes_winograd(p.map), "pack_weight", "Winograd's algorithm does not take this convolution");
    return FUSEDRES_SELECT_ISA(pack_winograd)(p);
  }
  FUSEDRES_SELECT_ISA(pack_all)(p);
}

void packed_convolution(const PackedConvolutionParams& p) {
  if (p.map.batch == 0) return;
  require(p.x != nullptr && p.panels != nullptr && p.bias != nullptr && p.out != nullptr, "packed_convolution",
          "null pointer");
  require(p.shortcut != p.out, "packed_convolution", "the shortcut must not be the result's memory");
  require(p.map.out_size(0) > 0 && p.map.out_size(1) > 0, "packed_convolution", "the kernel does not fit");
  if (p.winograd) {
    require(takes_winograd(p.map), "packed_convolution", "Winograd's algorithm does not take this convolution");
    return FUSEDRES_SELECT_ISA(convolve_winograd)(p);
  }
  FUSEDRES_SELECT_ISA(convolve_all)(p);
}

}  // namespace fusedres
