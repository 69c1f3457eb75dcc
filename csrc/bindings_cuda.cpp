// Python bindings of the CUDA kernels. They take raw addresses, sizes, dtype codes and a stream handle, and return
// nothing. fusedres/kernels/<op>/cuda.py calls them after it has checked every argument. This file needs no CUDA
// header.

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings_values.h"
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

namespace fusedres {

// What each tile of rows writes before the tiles are summed.
struct Partials {
  int64_t tile_rows;
  int64_t tiles;
  Address data;
};

inline bool read(PyObject* object, Partials& value) {
  return read_tuple(object, value.tile_rows, value.tiles, value.data);
}

// One or two raw convolution outputs that meet in a ReLU.
struct Branches {
  int count;
  BnBackwardBranch branch[2];
};

inline bool read(PyObject* object, BnBackwardBranch& value) {
  return read_tuple(object, value.x, value.state, value.batch_statistics, value.coefficients, value.grad_x);
}

inline bool read(PyObject* object, Branches& value) {
  value = {};
  if (!PyTuple_Check(object)) return false;
  value.count = static_cast<int>(PyTuple_GET_SIZE(object));
  if (value.count == 1) return read_tuple(object, value.branch[0]);
  return read_tuple(object, value.branch[0], value.branch[1]);
}

}  // namespace fusedres

namespace py = pybind11;
using namespace fusedres;  // NOLINT: this file only binds

namespace {

py::dict build_info() {
  py::dict info;
  info["archs"] = FUSEDRES_CUDA_ARCHS;
  info["runtime"] = cuda_runtime_version();
  return info;
}

// Every launch of BatchNorm's backward takes the same arguments and ignores those that it does not need.
template <void (*kLaunch)(const BnBackwardParams&, void*)>
void bn_backward(const Matrix& grad, const Gate& gate, const Branches& branches, const Partials& partials, Address sums,
                 bool with_sums, int launches, Address stream) {
  kLaunch({grad.dtype,
           grad.rows,
           grad.columns,
           grad.data,
           gate,
           branches.count,
           {branches.branch[0], branches.branch[1]},
           partials.tile_rows,
           partials.tiles,
           partials.data,
           sums,
           with_sums,
           static_cast<BnBackwardLaunches>(launches)},
          stream);
}

}  // namespace

PYBIND11_MODULE(_CUDA, m) {
  m.doc() = "CUDA kernels of fusedres. Internal: arguments are raw addresses, and the last one is the stream.";
  const auto release = py::call_guard<py::gil_scoped_release>();

  m.def("build_info", &build_info);
  m.def("driver_version", &cuda_driver_version);

  m.def("bn_partial_tiles",
        [](const Matrix& x, Address) { return cuda_bn_partial_tiles(x.data, x.dtype, x.rows, x.columns); });

  m.def(
      "bn_partials",
      [](const Matrix& x, int64_t tiles, Address partials, Address row_counts, Address stream) {
        cuda_bn_partials({x.data, x.dtype, x.rows, x.columns, tiles, partials, row_counts}, stream);
      },
      release);

  m.def(
      "bn_finalize",
      [](const ChannelVector& partials, Address rows, int64_t tiles, int64_t channels, Address state, const Norm& norm,
         const ChannelVector& pivot, Address stream) {
        cuda_bn_finalize({partials.data, rows, partials.dtype, tiles, channels, state, norm, pivot}, stream);
      },
      release);

  m.def(
      "bn_frozen",
      [](const ChannelVector& state, int64_t channels, const Norm& norm, Address stream) {
        cuda_bn_frozen({state.dtype, channels, state.data, norm}, stream);
      },
      release);

  m.def(
      "bn_relu",
      [](const Pixels& x, Address state, Address pivot, Address out, Address stream) {
        cuda_bn_relu({x.data, x.dtype, x.map, x.channels, state, pivot, out, 0}, stream);
      },
      release);

  m.def(
      "bn_add_relu",
      [](Address x, int64_t channels, Address state, const Pixels& shortcut, Address shortcut_state, Address out,
         Address mask, Address stream) {
        cuda_bn_add_relu({x, shortcut.dtype, channels, state, shortcut.data, shortcut.map, shortcut.channels,
                          shortcut_state, out, mask, 0},
                         stream);
      },
      release);

  m.def("bn_backward_reduce", &bn_backward<cuda_bn_backward_reduce>, release);
  m.def("bn_backward_coefficients", &bn_backward<cuda_bn_backward_coefficients>, release);
  m.def("bn_backward_apply", &bn_backward<cuda_bn_backward_apply>, release);
  m.def("bn_add_relu_backward", &bn_backward<cuda_bn_add_relu_backward>, release);

  m.def(
      "relu_backward",
      [](const Matrix& grad, const Gate& gate, Address d, const Partials& partials, Address sums, Address stream) {
        cuda_relu_backward({grad.dtype, grad.rows, grad.columns, grad.data, gate, d, partials.tile_rows, partials.tiles,
                            partials.data, sums},
                           stream);
      },
      release);

  m.def(
      "shortcut_grad_",
      [](const Pixels& grad_x, Address grad, int64_t channels, const Gate& gate, Address stream) {
        cuda_shortcut_grad({grad_x.data, grad_x.dtype, grad_x.map, grad_x.channels, grad, channels, gate, 0}, stream);
      },
      release);

  m.def(
      "gram",
      [](const Pixels& x, bool tf32, Address state, Address out, Address pivot, const Partials& partials, Address total,
         Address matrix, Address stream) {
        cuda_gram({x.data, x.dtype, tf32, x.map, x.channels, state, out, pivot, partials.tile_rows, partials.tiles,
                   partials.data, total, matrix},
                  stream);
      },
      release);
}
