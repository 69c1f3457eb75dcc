// Python bindings: raw addresses, sizes and dtype codes in, nothing out. fusedres/kernels/<op>/cpu.py calls these after
// every argument was checked.

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings_torch.h"
#include "bn_add_relu/bn_add_relu.h"
#include "bn_add_relu_backward/bn_add_relu_backward.h"
#include "bn_relu/bn_relu.h"
#include "bn_relu_maxpool/bn_relu_maxpool.h"
#include "bn_statistics/bn_statistics.h"
#include "common/isa.h"
#include "common/memory.h"
#include "gram/gram.h"
#include "one_pass/one_pass.h"
#include "relu_backward/relu_backward.h"
#include "shortcut_grad/shortcut_grad.h"

namespace py = pybind11;
using namespace fusedres;  // NOLINT: this file only binds

namespace {

using Address = uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

DType dtype_of(int code) {
  return static_cast<DType>(code);
}

Gate gate_of(int kind, Address data) {
  return {static_cast<GateKind>(kind), pointer<const void>(data)};
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#endif
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  py::list built;
  built.append(isa_name(Isa::kPortable));
#if FUSEDRES_X86
  built.append(isa_name(Isa::kAvx2));
  built.append(isa_name(Isa::kAvx512));
#endif
  info["isa_built"] = built;
  info["isa_used"] = isa_name(current_isa());
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of fusedres. Internal: arguments are raw addresses.";
  const auto release = py::call_guard<py::gil_scoped_release>();

  m.def("build_info", &build_info);

  m.attr("LARGE_BYTES") = kLargeBytes;
  m.def("advise_huge_pages", [](Address data, size_t bytes) { advise_huge_pages(pointer(data), bytes); }, release);

  m.def(
      "bn_statistics",
      [](Address x, int dtype, int64_t rows, int64_t channels, Address state, Address weight, int weight_dtype,
         Address bias, int bias_dtype, Address running_mean, int running_mean_dtype, Address running_var,
         int running_var_dtype, Address num_batches_tracked, bool cumulative, double momentum, double eps,
         int threads) {
        bn_statistics({pointer<const void>(x),
                       dtype_of(dtype),
                       rows,
                       channels,
                       pointer(state),
                       {pointer(weight), dtype_of(weight_dtype)},
                       {pointer(bias), dtype_of(bias_dtype)},
                       {pointer(running_mean), dtype_of(running_mean_dtype)},
                       {pointer(running_var), dtype_of(running_var_dtype)},
                       pointer<int64_t>(num_batches_tracked),
                       cumulative,
                       momentum,
                       eps,
                       threads});
      },
      release);

  m.def("bn_frozen",
        [](int dtype, int64_t channels, Address state, Address weight, int weight_dtype, Address bias, int bias_dtype,
           Address running_mean, int running_mean_dtype, Address running_var, int running_var_dtype, double eps) {
          BnStatisticsParams params{};
          params.dtype = dtype_of(dtype);
          params.channels = channels;
          params.state = pointer(state);
          params.weight = {pointer(weight), dtype_of(weight_dtype)};
          params.bias = {pointer(bias), dtype_of(bias_dtype)};
          params.running_mean = {pointer(running_mean), dtype_of(running_mean_dtype)};
          params.running_var = {pointer(running_var), dtype_of(running_var_dtype)};
          params.eps = eps;
          bn_frozen(params);
        });

  m.def(
      "bn_relu",
      [](Address x, int dtype, int64_t batch, int64_t height, int64_t width, int64_t stride, int64_t channels,
         Address state, Address pivot, Address out, int threads) {
        bn_relu({pointer<const void>(x),
                 dtype_of(dtype),
                 {batch, height, width, stride},
                 channels,
                 pointer<const void>(state),
                 pointer<const void>(pivot),
                 pointer(out),
                 threads});
      },
      release);

  m.def(
      "bn_add_relu",
      [](Address x, int dtype, int64_t channels, Address state, Address shortcut, int64_t batch, int64_t height,
         int64_t width, int64_t stride, int64_t shortcut_channels, Address shortcut_state, Address out, Address mask,
         int threads) {
        bn_add_relu({pointer<const void>(x),
                     dtype_of(dtype),
                     channels,
                     pointer<const void>(state),
                     pointer<const void>(shortcut),
                     {batch, height, width, stride},
                     shortcut_channels,
                     pointer<const void>(shortcut_state),
                     pointer(out),
                     pointer<uint8_t>(mask),
                     threads});
      },
      release);

  m.def(
      "bn_add_relu_backward",
      [](Address grad, int dtype, int64_t rows, int64_t channels, int gate_kind, Address gate, Address x, Address state,
         bool batch_statistics, Address grad_x, Address shortcut_x, Address shortcut_state,
         bool shortcut_batch_statistics, Address shortcut_grad_x, Address sums, bool reduce, bool elementwise,
         int threads) {
        const BnAddReluBackwardParams params{
            pointer<const void>(grad),
            dtype_of(dtype),
            rows,
            channels,
            gate_of(gate_kind, gate),
            {pointer<const void>(x), pointer<const void>(state), pointer(grad_x), batch_statistics},
            {pointer<const void>(shortcut_x), pointer<const void>(shortcut_state), pointer(shortcut_grad_x),
             shortcut_batch_statistics},
            pointer(sums),
            threads};
        if (reduce) bn_add_relu_backward_reduce(params);
        if (elementwise) bn_add_relu_backward_elementwise(params);
      },
      release);

  m.def(
      "bn_relu_maxpool",
      [](Address x, int dtype, int64_t batch, int64_t height, int64_t width, int64_t channels, Address state,
         Address out, Address argmax, int threads) {
        bn_relu_maxpool({pointer<const void>(x),
                         dtype_of(dtype),
                         {batch, height, width, channels},
                         pointer<const void>(state),
                         pointer(out),
                         pointer<uint8_t>(argmax),
                         threads});
      },
      release);

  m.def(
      "bn_relu_maxpool_backward",
      [](Address grad, int dtype, int64_t batch, int64_t height, int64_t width, int64_t channels, Address argmax,
         Address x, Address state, bool batch_statistics, Address grad_x, Address sums, bool reduce, int threads) {
        const BnReluMaxpoolBackwardParams params{
            pointer<const void>(grad),
            dtype_of(dtype),
            {batch, height, width, channels},
            pointer<const uint8_t>(argmax),
            {pointer<const void>(x), pointer<const void>(state), pointer(grad_x), batch_statistics},
            pointer(sums),
            threads};
        if (reduce) bn_relu_maxpool_backward_reduce(params);
        bn_relu_maxpool_backward_elementwise(params);
      },
      release);

  m.def(
      "relu_backward",
      [](Address grad, int dtype, int64_t rows, int64_t channels, int gate_kind, Address gate, Address d, Address sums,
         int threads) {
        relu_backward({pointer<const void>(grad), dtype_of(dtype), rows, channels, gate_of(gate_kind, gate), pointer(d),
                       pointer(sums), threads});
      },
      release);

  m.def(
      "shortcut_grad",
      [](Address grad_x, int dtype, int64_t batch, int64_t height, int64_t width, int64_t stride, int64_t x_channels,
         Address grad, int64_t channels, int gate_kind, Address gate, int threads) {
        shortcut_grad({pointer(grad_x),
                       dtype_of(dtype),
                       {batch, height, width, stride},
                       x_channels,
                       pointer<const void>(grad),
                       channels,
                       gate_of(gate_kind, gate),
                       threads});
      },
      release);

  m.def(
      "gram",
      [](Address x, int dtype, int64_t batch, int64_t height, int64_t width, int64_t stride, int64_t channels,
         Address state, Address out, Address pivot, Address sum, Address gram_matrix, int threads) {
        gram({pointer<const void>(x),
              dtype_of(dtype),
              {batch, height, width, stride},
              channels,
              pointer<const void>(state),
              pointer(out),
              pointer(pivot),
              pointer<double>(sum),
              pointer<double>(gram_matrix),
              threads});
      },
      release);

  m.def(
      "one_pass_statistics",
      [](Address weight, int dtype, int64_t rows, int64_t channels, int64_t in_channels, Address pivot, Address total,
         Address gram_matrix, Address state, Address projected, Address norm_weight, int norm_weight_dtype,
         Address bias, int bias_dtype, Address running_mean, int running_mean_dtype, Address running_var,
         int running_var_dtype, Address num_batches_tracked, bool cumulative, double momentum, double eps,
         int threads) {
        one_pass_statistics({{nullptr,
                              dtype_of(dtype),
                              rows,
                              channels,
                              pointer(state),
                              {pointer(norm_weight), dtype_of(norm_weight_dtype)},
                              {pointer(bias), dtype_of(bias_dtype)},
                              {pointer(running_mean), dtype_of(running_mean_dtype)},
                              {pointer(running_var), dtype_of(running_var_dtype)},
                              pointer<int64_t>(num_batches_tracked),
                              cumulative,
                              momentum,
                              eps,
                              threads},
                             pointer<const void>(weight),
                             in_channels,
                             pointer<const void>(pivot),
                             pointer<const double>(total),
                             pointer<const double>(gram_matrix),
                             pointer(projected)});
      },
      release);

  m.attr("ONE_PASS_NARROW") = kOnePassNarrow;
  m.def(
      "one_pass_grads",
      [](int dtype, int64_t rows, int64_t channels, int64_t in_channels, Address cross, Address sum_d, Address weight,
         Address state, Address projected, Address total, Address grad_conv, Address grad_weight, Address quadratic,
         Address constant, int threads, Address d, Address z) {
        one_pass_grads({dtype_of(dtype), rows, channels, in_channels, pointer<const void>(cross),
                        pointer<const void>(sum_d), pointer<const void>(weight), pointer<const void>(state),
                        pointer<const void>(projected), pointer<const double>(total), pointer(grad_conv),
                        pointer(grad_weight), pointer(quadratic), pointer(constant), threads, pointer<const void>(d),
                        pointer<const void>(z)});
      },
      release);

  m.def(
      "one_pass_scale",
      [](int dtype, int64_t channels, int64_t in_channels, Address weight, Address state, Address out, int threads) {
        OnePassGradsParams params{};
        params.dtype = dtype_of(dtype);
        params.channels = channels;
        params.in_channels = in_channels;
        params.weight = pointer<const void>(weight);
        params.state = pointer<const void>(state);
        params.threads = threads;
        one_pass_scale(params, pointer(out));
      },
      release);

  bind_torch(m);
}
