#include "gram/gram.h"

#include <algorithm>
#include <memory>
#include <type_traits>

#include "common/bits.h"
#include "common/check.h"
#include "common/gate.h"
#include "common/isa.h"
#include "common/parallel.h"

#define FUSEDRES_KERNEL_FILE "gram/kernel.inc"
#include "common/for_each_isa.h"

namespace fusedres {

void gram(const GramParams& p) {
  require(p.x != nullptr && p.out != nullptr && p.pivot != nullptr && p.sum != nullptr && p.gram != nullptr, "gram",
          "null pointer");
  require(p.map.out_rows() > 0 && p.channels > 0, "gram", "rows and channels must be positive");
  FUSEDRES_SELECT_ISA(gram_all)(p);
}

}  // namespace fusedres
