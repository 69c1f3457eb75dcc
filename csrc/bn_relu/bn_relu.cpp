#include "bn_relu/bn_relu.h"

#include "common/bits.h"
#include "common/check.h"
#include "common/gate.h"
#include "common/isa.h"
#include "common/parallel.h"

#define FUSEDRES_KERNEL_FILE "bn_relu/kernel.inc"
#include "common/for_each_isa.h"

namespace fusedres {

void bn_relu(const BnReluParams& p) {
  if (p.map.out_rows() == 0) return;
  require(p.x != nullptr && p.out != nullptr, "bn_relu", "null pointer");
  require(p.map.stride >= 1 && (p.map.stride == 1 || p.x != p.out), "bn_relu", "in place only with stride 1");
  FUSEDRES_SELECT_ISA(apply_all)(p);
}

}  // namespace fusedres
