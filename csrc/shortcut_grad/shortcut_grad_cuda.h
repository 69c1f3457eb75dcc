#pragma once

#include "shortcut_grad/shortcut_grad.h"

namespace fusedres {

// shortcut_grad on the GPU; threads is not read.
void cuda_shortcut_grad(const ShortcutGradParams& params, void* stream);

}  // namespace fusedres
