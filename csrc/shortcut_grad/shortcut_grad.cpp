#include "shortcut_grad/shortcut_grad.h"

#include "common/bits.h"
#include "common/check.h"
#include "common/gate.h"
#include "common/isa.h"
#include "common/parallel.h"

#define FUSEDRES_KERNEL_FILE "shortcut_grad/kernel.inc"
#include "common/for_each_isa.h"

namespace fusedres {

void shortcut_grad(const ShortcutGradParams& p) {
  if (p.map.out_rows() == 0) return;
  require(p.grad != nullptr && p.grad_x != nullptr, "shortcut_grad", "null pointer");
  require(p.x_channels <= p.channels, "shortcut_grad", "more channels in x than in the gradient");
  require(p.gate.kind == GateKind::kNone || p.gate.data != nullptr, "shortcut_grad", "null gate");
  require(p.gate.kind != GateKind::kRecompute, "shortcut_grad", "the gate cannot be recomputed here");
  FUSEDRES_SELECT_ISA(shortcut_grad_all)(p);
}

}  // namespace fusedres
