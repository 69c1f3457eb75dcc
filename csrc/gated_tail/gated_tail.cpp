#include "gated_tail/gated_tail.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "common/bits.h"
#include "common/check.h"
#include "common/gate.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "gated_tail/folded.h"

#define FUSEDRES_KERNEL_FILE "gated_tail/kernel.inc"
#include "common/for_each_isa.h"

namespace fusedres {
namespace {

void check(const GatedTailParams& p, const char* op) {
  require(p.branch.x != nullptr, op, "null branch");
  require(p.activation != Activation::kLeakyRelu || p.slope != nullptr, op, "a leaky ReLU needs its slope");
  require(!p.coupled || (p.branch.logits != nullptr && p.shortcut.x != nullptr), op,
          "a coupled gate needs logits and a shortcut");
  for (const TailTerm* term : {&p.branch, &p.shortcut}) {
    require(term->x != nullptr || (term->state == nullptr && term->factor == nullptr && term->logits == nullptr), op,
            "a term without its x");
    require(term->logits == nullptr || term->factor == nullptr, op, "logits and a factor");
  }
}

void check(const GatedTailParams& p, const GatedTailGradient& gradient, const char* op) {
  check(p, op);
  require(gradient.grad != nullptr, op, "null gradient");
}

}  // namespace

void gated_tail(const GatedTailParams& p, const GatedTailResults& results) {
  if (p.rows() == 0) return;
  check(p, "gated_tail");
  require(results.out != nullptr, "gated_tail", "null result");
  const FoldedTail folded(p, results.mask != nullptr);
  const GatedTailParams& wide = folded.params();
  const RowMap all{1, 1, wide.rows(), 1};
  FUSEDRES_SELECT_ISA(forward_all)(wide, {all, wide.shortcut.x == nullptr ? 0 : wide.channels}, results);
}

void gated_tail_reduce(const GatedTailParams& p, const GatedTailGradient& gradient, bool slope_wanted, void* sums) {
  if (p.rows() == 0) return;
  check(p, gradient, "gated_tail_reduce");
  require(sums != nullptr, "gated_tail_reduce", "null sums");
  const FoldedTail folded(p, gradient.mask != nullptr);
  FUSEDRES_SELECT_ISA(reduce_all)(folded.params(), gradient, slope_wanted, folded.rows(), sums);
}

void gated_tail_apply(const GatedTailParams& p, const GatedTailGradient& gradient) {
  if (p.rows() == 0) return;
  check(p, gradient, "gated_tail_apply");
  require(p.branch.grad_logits == nullptr || p.branch.logits != nullptr, "gated_tail_apply", "gradient of no logits");
  require(p.shortcut.grad_logits == nullptr || p.shortcut.logits != nullptr, "gated_tail_apply",
          "gradient of no logits");
  require(p.shortcut.grad_x == nullptr || p.shortcut.x != nullptr, "gated_tail_apply", "gradient of no shortcut");
  FUSEDRES_SELECT_ISA(apply_all)(FoldedTail(p, gradient.mask != nullptr).params(), gradient);
}

}  // namespace fusedres
