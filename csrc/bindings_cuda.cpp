// Python bindings of the CUDA kernels: raw addresses, sizes, dtype codes and a stream handle in, nothing out.
// fusedres/kernels/<op>/cuda.py calls these after every argument was checked. Needs no CUDA header.

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bn_add_relu/bn_add_relu_cuda.h"
#include "bn_add_relu_backward/bn_add_relu_backward_cuda.h"
#include "bn_backward/bn_backward_cuda.h"
#include "bn_relu/bn_relu_cuda.h"
#include "bn_statistics/bn_statistics_cuda.h"
#include "common/cuda_info.h"
#include "gram/gram_cuda.h"
#include "relu_backward/relu_backward_cuda.h"
#include "shortcut_grad/shortcut_grad_cuda.h"

// The architectures, as TORCH_CUDA_ARCH_LIST writes them.
#ifndef FUSEDRES_CUDA_ARCHS
#error "FUSEDRES_CUDA_ARCHS must be defined"
#endif

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

py::dict build_info() {
  py::dict info;
  info["archs"] = FUSEDRES_CUDA_ARCHS;
  info["runtime"] = cuda_runtime_version();
  return info;
}

// Every launch of BatchNorm's backward takes the same arguments, and leaves alone those that it does not need.
template <void (*kLaunch)(const BnBackwardParams&, void*)>
void bn_backward(int dtype, int64_t rows, int64_t channels, Address grad, int gate_kind, Address gate, int branches,
                 Address x, Address state, bool batch_statistics, Address coefficients, Address grad_x,
                 Address shortcut_x, Address shortcut_state, bool shortcut_batch_statistics,
                 Address shortcut_coefficients, Address grad_shortcut, int64_t count, int64_t tile_rows, int64_t tiles,
                 Address partials, Address sums, bool with_sums, int launches, Address stream) {
  kLaunch(
      {dtype_of(dtype),
       rows,
       channels,
       pointer<const void>(grad),
       {static_cast<GateKind>(gate_kind), pointer<const void>(gate)},
       branches,
       {{pointer<const void>(x), pointer<const void>(state), batch_statistics, pointer(coefficients), pointer(grad_x)},
        {pointer<const void>(shortcut_x), pointer<const void>(shortcut_state), shortcut_batch_statistics,
         pointer(shortcut_coefficients), pointer(grad_shortcut)}},
       count,
       tile_rows,
       tiles,
       pointer(partials),
       pointer(sums),
       with_sums,
       static_cast<BnBackwardLaunches>(launches)},
      pointer(stream));
}

}  // namespace

PYBIND11_MODULE(_CUDA, m) {
  m.doc() = "CUDA kernels of fusedres. Internal: arguments are raw addresses, the last one is the stream.";
  const auto release = py::call_guard<py::gil_scoped_release>();

  m.def("build_info", &build_info);
  m.def("driver_version", &cuda_driver_version);

  m.def("bn_partial_tiles", [](Address x, int dtype, int64_t rows, int64_t channels, Address) {
    return cuda_bn_partial_tiles(pointer<const void>(x), dtype_of(dtype), rows, channels);
  });

  m.def(
      "bn_partials",
      [](Address x, int dtype, int64_t rows, int64_t channels, int64_t tiles, Address partials, Address row_counts,
         Address stream) {
        cuda_bn_partials(
            {pointer<const void>(x), dtype_of(dtype), rows, channels, tiles, pointer(partials), pointer(row_counts)},
            pointer(stream));
      },
      release);

  m.def(
      "bn_finalize",
      [](Address partials, Address rows, int dtype, int64_t tiles, int64_t channels, Address state, Address weight,
         int weight_dtype, Address bias, int bias_dtype, Address running_mean, int running_mean_dtype,
         Address running_var, int running_var_dtype, Address num_batches_tracked, bool cumulative, double momentum,
         double eps, Address pivot, int pivot_dtype, Address stream) {
        cuda_bn_finalize({pointer<const void>(partials),
                          pointer<const void>(rows),
                          dtype_of(dtype),
                          tiles,
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
                          {pointer(pivot), dtype_of(pivot_dtype)}},
                         pointer(stream));
      },
      release);

  m.def(
      "bn_frozen",
      [](int dtype, int64_t channels, Address state, Address weight, int weight_dtype, Address bias, int bias_dtype,
         Address running_mean, int running_mean_dtype, Address running_var, int running_var_dtype, double eps,
         Address stream) {
        cuda_bn_frozen({dtype_of(dtype),
                        channels,
                        pointer(state),
                        {pointer(weight), dtype_of(weight_dtype)},
                        {pointer(bias), dtype_of(bias_dtype)},
                        {pointer(running_mean), dtype_of(running_mean_dtype)},
                        {pointer(running_var), dtype_of(running_var_dtype)},
                        eps},
                       pointer(stream));
      },
      release);

  m.def(
      "bn_relu",
      [](Address x, int dtype, int64_t batch, int64_t height, int64_t width, int64_t stride, int64_t channels,
         Address state, Address pivot, Address out, Address stream) {
        cuda_bn_relu({pointer<const void>(x),
                      dtype_of(dtype),
                      {batch, height, width, stride},
                      channels,
                      pointer<const void>(state),
                      pointer<const void>(pivot),
                      pointer(out),
                      0},
                     pointer(stream));
      },
      release);

  m.def(
      "bn_add_relu",
      [](Address x, int dtype, int64_t channels, Address state, Address shortcut, int64_t batch, int64_t height,
         int64_t width, int64_t stride, int64_t shortcut_channels, Address shortcut_state, Address out, Address mask,
         Address stream) {
        cuda_bn_add_relu({pointer<const void>(x),
                          dtype_of(dtype),
                          channels,
                          pointer<const void>(state),
                          pointer<const void>(shortcut),
                          {batch, height, width, stride},
                          shortcut_channels,
                          pointer<const void>(shortcut_state),
                          pointer(out),
                          pointer<uint8_t>(mask),
                          0},
                         pointer(stream));
      },
      release);

  m.def("bn_backward_reduce", &bn_backward<cuda_bn_backward_reduce>, release);
  m.def("bn_backward_coefficients", &bn_backward<cuda_bn_backward_coefficients>, release);
  m.def("bn_backward_apply", &bn_backward<cuda_bn_backward_apply>, release);
  m.def("bn_add_relu_backward", &bn_backward<cuda_bn_add_relu_backward>, release);

  m.def(
      "relu_backward",
      [](Address grad, int dtype, int64_t rows, int64_t channels, int gate_kind, Address gate, Address d,
         int64_t tile_rows, int64_t tiles, Address partials, Address sums, Address stream) {
        cuda_relu_backward({dtype_of(dtype),
                            rows,
                            channels,
                            pointer<const void>(grad),
                            {static_cast<GateKind>(gate_kind), pointer<const void>(gate)},
                            pointer(d),
                            tile_rows,
                            tiles,
                            pointer(partials),
                            pointer(sums)},
                           pointer(stream));
      },
      release);

  m.def(
      "shortcut_grad_",
      [](Address grad_x, int dtype, int64_t batch, int64_t height, int64_t width, int64_t stride, int64_t x_channels,
         Address grad, int64_t channels, int gate_kind, Address gate, Address stream) {
        cuda_shortcut_grad({pointer(grad_x),
                            dtype_of(dtype),
                            {batch, height, width, stride},
                            x_channels,
                            pointer<const void>(grad),
                            channels,
                            {static_cast<GateKind>(gate_kind), pointer<const void>(gate)},
                            0},
                           pointer(stream));
      },
      release);

  m.def(
      "gram",
      [](Address x, int dtype, bool tf32, int64_t batch, int64_t height, int64_t width, int64_t stride,
         int64_t channels, Address state, Address out, Address pivot, int64_t split_rows, int64_t splits,
         Address partials, Address total, Address matrix, Address stream) {
        cuda_gram({pointer<const void>(x),
                   dtype_of(dtype),
                   tf32,
                   {batch, height, width, stride},
                   channels,
                   pointer<const void>(state),
                   pointer(out),
                   pointer(pivot),
                   split_rows,
                   splits,
                   pointer(partials),
                   pointer<double>(total),
                   pointer<double>(matrix)},
                  pointer(stream));
      },
      release);
}
