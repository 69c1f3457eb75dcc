#include "bn_add_relu_backward/bn_add_relu_backward.h"

#include <algorithm>
#include <memory>

#include "common/bits.h"
#include "common/check.h"
#include "common/gate.h"
#include "common/isa.h"
#include "common/parallel.h"

#define FUSEDRES_KERNEL_FILE "bn_add_relu_backward/kernel.inc"
#include "common/for_each_isa.h"

namespace fusedres {
namespace {

void check(const BnAddReluBackwardParams& p, const char* op) {
  require(p.grad != nullptr && p.branch.x != nullptr && p.branch.state != nullptr && p.sums != nullptr, op,
          "null pointer");
  require(p.shortcut.x == nullptr || p.shortcut.state != nullptr, op, "a shortcut branch needs its state");
  require(p.gate.data != nullptr || p.gate.kind == GateKind::kNone || p.gate.kind == GateKind::kRecompute, op,
          "null gate");
}

}  // namespace

void bn_add_relu_backward_reduce(const BnAddReluBackwardParams& p) {
  if (p.rows == 0) return;
  check(p, "bn_add_relu_backward_reduce");
  FUSEDRES_SELECT_ISA(backward<true>)(p);
}

void bn_add_relu_backward_elementwise(const BnAddReluBackwardParams& p) {
  if (p.rows == 0) return;
  check(p, "bn_add_relu_backward_elementwise");
  require(p.branch.grad_x != nullptr && (p.shortcut.x == nullptr || p.shortcut.grad_x != nullptr),
          "bn_add_relu_backward_elementwise", "null gradient");
  FUSEDRES_SELECT_ISA(backward<false>)(p);
}

}  // namespace fusedres
