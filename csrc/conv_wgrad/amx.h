#pragma once

#include "conv_wgrad/blocks.h"
#include "conv_wgrad/conv_wgrad.h"

namespace fusedres {

// Whether sum_split_amx takes a call: bfloat16, on a processor with AMX.
bool takes_amx(const ConvWgradParams& params);

// The same as sum_split. Returns whether all sums are finite: padding is multiplied by the gradient.
bool sum_split_amx(const ConvWgradParams& params, const PixelBlocks& blocks, const WgradTasks& tasks,
                   const WgradTask& task);

}  // namespace fusedres
