#include "one_pass/one_pass.h"

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "common/bits.h"
#include "common/check.h"
#include "common/gate.h"
#include "common/isa.h"
#include "common/parallel.h"

namespace fusedres {

// Up to this many multiplications Q is computed in float64, which costs little then.
constexpr double kFloat64Products = 1 << 24;

}  // namespace fusedres

#define FUSEDRES_KERNEL_FILE "one_pass/kernel.inc"
#include "common/for_each_isa.h"

namespace fusedres {

void one_pass_statistics(const OnePassStatisticsParams& p) {
  require(p.weight != nullptr && p.pivot != nullptr && p.total != nullptr && p.gram != nullptr &&
              p.projected != nullptr && p.output.state != nullptr,
          "one_pass_statistics", "null pointer");
  require(p.output.rows > 0 && p.output.channels > 0 && p.in_channels > 0, "one_pass_statistics",
          "no rows or channels");
  const int64_t channels = p.output.channels;
  std::vector<double> buffer(3 * channels);
  double* mean = buffer.data();
  double* m2 = mean + channels;
  double* offset = m2 + channels;
  FUSEDRES_SELECT_ISA(statistics_of)(p, mean, m2, offset);
  bn_finalize(p.output, mean, m2, offset);
}

void one_pass_grads(const OnePassGradsParams& p) {
  require((p.in_channels <= kOnePassNarrow ? p.d != nullptr && p.z != nullptr : p.cross != nullptr) &&
              p.sum_d != nullptr && p.weight != nullptr && p.state != nullptr && p.projected != nullptr &&
              p.total != nullptr && p.grad_conv != nullptr && p.grad_weight != nullptr &&
              (p.quadratic == nullptr) == (p.constant == nullptr),
          "one_pass_grads", "null pointer");
  require(p.rows > 0 && p.channels > 0 && p.in_channels > 0, "one_pass_grads", "no rows or channels");
  FUSEDRES_SELECT_ISA(grads_of)(p);
}

void one_pass_scale(const OnePassGradsParams& p, void* out) {
  require(p.weight != nullptr && p.state != nullptr && out != nullptr, "one_pass_scale", "null pointer");
  FUSEDRES_SELECT_ISA(scale_of)(p, out);
}

}  // namespace fusedres
