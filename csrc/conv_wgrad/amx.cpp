#include "conv_wgrad/amx.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/bits.h"
#include "common/gate.h"
#include "common/isa.h"
#include "common/scratch.h"
#include "conv_wgrad/strips.h"

#define FUSEDRES_KERNEL_FILE "conv_wgrad/amx.inc"
#include "common/for_amx.h"

namespace fusedres {

bool takes_amx(const ConvWgradParams& p) {
  return p.dtype == DType::kBFloat16 && p.y == nullptr && has_amx();
}

bool sum_split_amx([[maybe_unused]] const ConvWgradParams& p, [[maybe_unused]] const PixelBlocks& blocks,
                   [[maybe_unused]] const WgradTasks& tasks, [[maybe_unused]] const WgradTask& task) {
#if FUSEDRES_AMX
  return amx::sum_split(p, blocks, tasks, task);
#else
  return false;
#endif
}

}  // namespace fusedres
