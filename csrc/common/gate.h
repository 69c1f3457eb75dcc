#pragma once

#include <cstdint>

namespace fusedres {

// The source of the ReLU's mask in backward passes. The gradient passes where NOT (gate <= 0).
enum class GateKind : int {
  kNone = 0,       // no mask: the gradient is masked already
  kBits = 1,       // packed bits, [rows, ceil(channels / 8)]
  kOutput = 2,     // the ReLU's output, [rows, channels]
  kRecompute = 3,  // scale·x + shift of the layer itself; only if no shortcut was added before the ReLU
};

struct Gate {
  GateKind kind;
  const void* data;  // the bits or the output; null for kNone and kRecompute
};

// Calls function(constant) with the gate's kind as a compile-time constant.
template <GateKind kKind>
struct GateConstant {
  static constexpr GateKind value = kKind;
};

template <class Function>
void dispatch_gate(GateKind kind, Function&& function) {
  switch (kind) {
    case GateKind::kNone:
      return function(GateConstant<GateKind::kNone>{});
    case GateKind::kBits:
      return function(GateConstant<GateKind::kBits>{});
    case GateKind::kOutput:
      return function(GateConstant<GateKind::kOutput>{});
    case GateKind::kRecompute:
      return function(GateConstant<GateKind::kRecompute>{});
  }
}

}  // namespace fusedres
