// Python bindings of the CUDA kernels: raw addresses, sizes, dtype codes and a stream handle in, nothing out.
// fusedres/kernels/<op>/cuda.py calls these after every argument was checked. Needs no CUDA header.

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bn_relu/bn_relu_cuda.h"
#include "bn_statistics/bn_statistics_cuda.h"
#include "common/cuda_info.h"

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

}  // namespace

PYBIND11_MODULE(_CUDA, m) {
  m.doc() = "CUDA kernels of fusedres. Internal: arguments are raw addresses, the last one is the stream.";
  const auto release = py::call_guard<py::gil_scoped_release>();

  m.def("build_info", &build_info);
  m.def("driver_version", &cuda_driver_version);

  m.def(
      "bn_finalize",
      [](Address partials, Address rows, int dtype, int64_t tiles, int64_t channels, Address state, Address weight,
         int weight_dtype, Address bias, int bias_dtype, Address running_mean, int running_mean_dtype,
         Address running_var, int running_var_dtype, Address num_batches_tracked, bool cumulative, double momentum,
         double eps, Address stream) {
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
                          eps},
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
}
