#pragma once

namespace fusedres {

// The activations of a residual block's tail; fusedres/values.py has the same order.
enum class Activation : int { kIdentity = 0, kRelu = 1, kLeakyRelu = 2, kSilu = 3, kHardswish = 4, kGelu = 5 };

}  // namespace fusedres
