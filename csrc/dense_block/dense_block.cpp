#include "dense_block/dense_block.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "bn_statistics/bn_statistics.h"
#include "common/bits.h"
#include "common/check.h"
#include "common/gate.h"
#include "common/isa.h"
#include "common/parallel.h"

#define FUSEDRES_KERNEL_FILE "dense_block/kernel.inc"
#include "common/for_each_isa.h"

namespace fusedres {
namespace {

void check(const DenseBuffer& buffer, int64_t first, int64_t channels, const char* op) {
  require(buffer.data != nullptr, op, "null pointer");
  require(first >= 0 && channels > 0 && first + channels <= buffer.width, op, "channels outside of the buffer");
}

}  // namespace

void dense_append(const DenseAppendParams& p) {
  if (p.buffer.rows == 0) return;
  check(p.buffer, p.first, p.channels, "dense_append");
  require(p.x != nullptr, "dense_append", "null pointer");
  FUSEDRES_SELECT_ISA(append_all)(p);
}

void dense_bn_relu(const DenseBnReluParams& p) {
  if (p.buffer.rows == 0) return;
  check(p.buffer, 0, p.channels, "dense_bn_relu");
  require(p.state != nullptr && p.out != nullptr, "dense_bn_relu", "null pointer");
  FUSEDRES_SELECT_ISA(apply_all)(p);
}

void dense_bn_relu_backward(const DenseBnReluBackwardParams& p) {
  if (p.buffer.rows == 0) return;
  check(p.buffer, 0, p.channels, "dense_bn_relu_backward");
  require(p.grad != nullptr && p.state != nullptr && p.grad_x != nullptr && p.sums != nullptr, "dense_bn_relu_backward",
          "null pointer");
  require(p.corrections != nullptr || !p.batch_statistics, "dense_bn_relu_backward", "null corrections");
  FUSEDRES_SELECT_ISA(backward_all)(p);
}

void dense_gradient(const DenseGradientParams& p) {
  if (p.buffer.rows == 0) return;
  check(p.buffer, p.first, p.channels, "dense_gradient");
  require(p.grad_x != nullptr && p.out != nullptr, "dense_gradient", "null pointer");
  require((p.moments == nullptr) == (p.corrections == nullptr), "dense_gradient", "moments without corrections");
  FUSEDRES_SELECT_ISA(gradient_all)(p);
}

void bn_from_moments(DType dtype, int64_t rows, int64_t channels, const double* moments, void* state,
                     const Norm& norm) {
  require(moments != nullptr && state != nullptr && rows > 0, "bn_from_moments", "null pointer or no rows");
  std::vector<double> apart(2 * channels);
  for (int64_t c = 0; c < channels; ++c) {
    apart[c] = moments[2 * c];
    apart[channels + c] = moments[2 * c + 1];
  }
  bn_finalize({nullptr, dtype, rows, channels, state, norm, 1}, apart.data(), apart.data() + channels, nullptr);
}

}  // namespace fusedres
