#include "bn_add_relu_backward/bn_add_relu_backward.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "common/bits.h"
#include "common/check.h"
#include "common/gate.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "gated_tail/gated_tail.h"

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
  require(p.added == nullptr || (p.gate.kind == GateKind::kRecompute && p.shortcut.x == nullptr), op,
          "another gradient is added only where the gate is recomputed, and to one branch");
}

TailTerm term_of(const BnBranch& branch) {
  TailTerm term;
  term.x = branch.x;
  term.state = branch.state;
  term.grad_x = branch.grad_x;
  return term;
}

GatedTailParams tail_of(const BnAddReluBackwardParams& p) {
  GatedTailParams tail{};
  tail.dtype = p.dtype;
  tail.batch = 1;
  tail.pixels = p.rows;
  tail.channels = p.channels;
  tail.branch = term_of(p.branch);
  tail.shortcut = term_of(p.shortcut);
  tail.threads = p.threads;
  return tail;
}

}  // namespace

void bn_add_relu_backward_reduce(const BnAddReluBackwardParams& p) {
  if (p.rows == 0) return;
  check(p, "bn_add_relu_backward_reduce");
  FUSEDRES_SELECT_ISA(backward<true>)(p, tail_of(p), {p.grad, p.gate.data});
}

void bn_add_relu_backward_elementwise(const BnAddReluBackwardParams& p) {
  if (p.rows == 0) return;
  check(p, "bn_add_relu_backward_elementwise");
  require(p.branch.grad_x != nullptr && (p.shortcut.x == nullptr || p.shortcut.grad_x != nullptr),
          "bn_add_relu_backward_elementwise", "null gradient");
  FUSEDRES_SELECT_ISA(backward<false>)(p, tail_of(p), {p.grad, p.gate.data, p.added});
}

}  // namespace fusedres
