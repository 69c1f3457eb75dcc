#include "relu_backward/relu_backward.h"

#include <memory>

#include "common/bits.h"
#include "common/check.h"
#include "common/gate.h"
#include "common/isa.h"
#include "common/parallel.h"

#define FUSEDRES_KERNEL_FILE "relu_backward/kernel.inc"
#include "common/for_each_isa.h"

namespace fusedres {

void relu_backward(const ReluBackwardParams& p) {
  if (p.rows == 0) return;
  require(p.grad != nullptr && p.gate.data != nullptr && p.d != nullptr && p.sums != nullptr, "relu_backward",
          "null pointer");
  require(p.gate.kind == GateKind::kBits || p.gate.kind == GateKind::kOutput, "relu_backward",
          "the gate must be bits or an output");
  FUSEDRES_SELECT_ISA(relu_backward_all)(p);
}

}  // namespace fusedres
