#include "bn_add_relu/bn_add_relu.h"

#include <cmath>
#include <limits>

#include "common/bits.h"
#include "common/check.h"
#include "common/gate.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "gated_tail/gated_tail.h"

#define FUSEDRES_KERNEL_FILE "bn_add_relu/kernel.inc"
#include "common/for_each_isa.h"

namespace fusedres {

void bn_add_relu(const BnAddReluParams& p) {
  if (p.shortcut_map.out_rows() == 0) return;
  require(p.x != nullptr && p.state != nullptr && p.shortcut != nullptr && p.out != nullptr, "bn_add_relu",
          "null pointer");
  require(p.shortcut_channels <= p.channels, "bn_add_relu", "more shortcut channels than channels");
  require(p.shortcut_state == nullptr || p.shortcut_channels == p.channels, "bn_add_relu",
          "a normalised shortcut must have as many channels as x");
  GatedTailParams tail{};
  tail.dtype = p.dtype;
  tail.batch = 1;
  tail.pixels = p.shortcut_map.out_rows();
  tail.channels = p.channels;
  tail.branch.x = p.x;
  tail.branch.state = p.state;
  tail.shortcut.x = p.shortcut;
  tail.shortcut.state = p.shortcut_state;
  tail.threads = p.threads;
  FUSEDRES_SELECT_ISA(add_all)(tail, {p.shortcut_map, p.shortcut_channels}, {p.out, p.mask});
}

}  // namespace fusedres
