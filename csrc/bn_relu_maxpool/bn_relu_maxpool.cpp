#include "bn_relu_maxpool/bn_relu_maxpool.h"

#include <algorithm>
#include <memory>

#include "common/bits.h"
#include "common/check.h"
#include "common/gate.h"
#include "common/isa.h"
#include "common/parallel.h"

#define FUSEDRES_KERNEL_FILE "bn_relu_maxpool/kernel.inc"
#include "common/for_each_isa.h"

namespace fusedres {
namespace {

void check(const BnReluMaxpoolBackwardParams& p, const char* op) {
  require(p.grad != nullptr && p.argmax != nullptr && p.branch.x != nullptr && p.branch.state != nullptr &&
              p.sums != nullptr,
          op, "null pointer");
}

}  // namespace

void bn_relu_maxpool(const BnReluMaxpoolParams& p) {
  if (p.shape.windows() == 0) return;
  require(p.x != nullptr && p.state != nullptr && p.out != nullptr, "bn_relu_maxpool", "null pointer");
  FUSEDRES_SELECT_ISA(pool_all)(p);
}

void bn_relu_maxpool_backward_reduce(const BnReluMaxpoolBackwardParams& p) {
  if (p.shape.windows() == 0) return;
  check(p, "bn_relu_maxpool_backward_reduce");
  FUSEDRES_SELECT_ISA(pool_backward<true>)(p);
}

void bn_relu_maxpool_backward_elementwise(const BnReluMaxpoolBackwardParams& p) {
  if (p.shape.windows() == 0) return;
  check(p, "bn_relu_maxpool_backward_elementwise");
  require(p.branch.grad_x != nullptr, "bn_relu_maxpool_backward_elementwise", "null gradient");
  FUSEDRES_SELECT_ISA(pool_backward<false>)(p);
}

}  // namespace fusedres
