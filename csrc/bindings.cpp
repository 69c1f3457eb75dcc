// Python bindings of the C++ kernels. They take raw addresses, sizes and dtype codes, and return nothing.
// fusedres/kernels/<op>/cpu.py calls them after it has checked every argument.

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings_torch.h"
#include "bindings_values.h"
#include "bn_add_relu/bn_add_relu.h"
#include "bn_add_relu_backward/bn_add_relu_backward.h"
#include "bn_relu/bn_relu.h"
#include "bn_relu_maxpool/bn_relu_maxpool.h"
#include "bn_statistics/bn_statistics.h"
#include "common/isa.h"
#include "common/memory.h"
#include "conv_wgrad/conv_wgrad.h"
#include "convolution_method/convolution_method.h"
#include "dense_block/dense_block.h"
#include "gated_tail/gated_tail.h"
#include "gram/gram.h"
#include "one_pass/one_pass.h"
#include "packed_convolution/packed_convolution.h"
#include "relu_backward/relu_backward.h"
#include "shortcut_grad/shortcut_grad.h"

namespace fusedres {

inline bool read(PyObject* object, BnBranch& value) {
  return read_tuple(object, value.x, value.state, value.batch_statistics, value.grad_x);
}

// A tensor of [rows, columns], as Matrix.
inline bool read(PyObject* object, DenseBuffer& value) {
  return read_tuple(object, value.data, value.dtype, value.rows, value.width);
}

inline bool read(PyObject* object, TailTerm& value) {
  return read_tuple(object, value.x, value.state, value.factor, value.per_sample, value.logits, value.coefficients,
                    value.own_coefficients, value.grad_x, value.grad_logits);
}

inline bool read(PyObject* object, GatedTailParams& value) {
  int64_t threads;
  if (!read_tuple(object, value.dtype, value.batch, value.pixels, value.channels, value.branch, value.shortcut,
                  value.activation, value.before_add, value.slope, value.coupled, threads))
    return false;
  value.threads = static_cast<int>(threads);
  return true;
}

// What one_pass_statistics leaves for the backward.
struct OnePassSaved {
  Address state;
  Address projected;
  Address total;
};

inline bool read(PyObject* object, OnePassSaved& value) {
  return read_tuple(object, value.state, value.projected, value.total);
}

// The results of one_pass_grads.
struct OnePassResults {
  Address grad_conv;
  Address grad_weight;
  Address quadratic;
  Address constant;
};

inline bool read(PyObject* object, OnePassResults& value) {
  return read_tuple(object, value.grad_conv, value.grad_weight, value.quadratic, value.constant);
}

// The gradient of a convolution's output, or what it is formed from.
struct OutputGradient {
  Address grad;
  Address gate;
  Address y;
  Address coefficients;
};

inline bool read(PyObject* object, OutputGradient& value) {
  return read_tuple(object, value.grad, value.gate, value.y, value.coefficients);
}

inline bool read(PyObject* object, WeightStrides& value) {
  return read_tuple(object, value.out_channel, value.channel, value.row, value.column);
}

inline bool read(PyObject* object, ConvolutionMap& value) {
  return read_tuple(object, value.batch, value.height, value.width, value.channels, value.out_channels, value.kernel[0],
                    value.kernel[1], value.stride[0], value.stride[1], value.padding[0], value.padding[1],
                    value.dilation[0], value.dilation[1]);
}

}  // namespace fusedres

namespace py = pybind11;
using namespace fusedres;  // NOLINT: this file only binds

namespace {

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
  m.def("advise_huge_pages", [](Address data, size_t bytes) { advise_huge_pages(data, bytes); }, release);

  m.def(
      "bn_statistics",
      [](const Matrix& x, Address added, Address state, const Norm& norm, int threads, int64_t samples, Address means) {
        bn_statistics({x.data, x.dtype, x.rows, x.columns, state, norm, threads, added, samples, means});
      },
      release);

  m.def("bn_frozen", [](int dtype, int64_t channels, Address state, const Norm& norm) {
    bn_frozen({nullptr, static_cast<DType>(dtype), 0, channels, state, norm, 1});
  });

  m.def(
      "bn_relu",
      [](const Pixels& x, Address state, Address pivot, Address out, int threads) {
        bn_relu({x.data, x.dtype, x.map, x.channels, state, pivot, out, threads});
      },
      release);

  m.def(
      "bn_add_relu",
      [](Address x, int64_t channels, Address state, const Pixels& shortcut, Address shortcut_state, Address out,
         Address mask, int threads) {
        bn_add_relu({x, shortcut.dtype, channels, state, shortcut.data, shortcut.map, shortcut.channels, shortcut_state,
                     out, mask, threads});
      },
      release);

  m.def(
      "bn_add_relu_backward",
      [](const Matrix& grad, const Gate& gate, const BnBranch& branch, const BnBranch& shortcut, Address sums,
         bool reduce, bool elementwise, Address added, int threads) {
        const BnAddReluBackwardParams params{grad.data, grad.dtype, grad.rows, grad.columns, gate,
                                             branch,    shortcut,   sums,      threads,      added};
        if (reduce) bn_add_relu_backward_reduce(params);
        if (elementwise) bn_add_relu_backward_elementwise(params);
      },
      release);

  m.def(
      "gated_tail", [](const GatedTailParams& params, Address out, Address mask) { gated_tail(params, {out, mask}); },
      release);

  m.def(
      "gated_tail_reduce",
      [](const GatedTailParams& params, Address grad, Address mask, bool slope_wanted, Address sums) {
        gated_tail_reduce(params, {grad, mask}, slope_wanted, sums);
      },
      release);

  m.def(
      "gated_tail_apply",
      [](const GatedTailParams& params, Address grad, Address mask) { gated_tail_apply(params, {grad, mask}); },
      release);

  m.def(
      "dense_append",
      [](const DenseBuffer& buffer, const Matrix& x, int64_t first, Address moments, int threads) {
        dense_append({buffer, x.data, x.columns, first, moments, threads});
      },
      release);

  m.def(
      "dense_bn_relu",
      [](const DenseBuffer& buffer, Address state, int64_t channels, Address out, int threads) {
        dense_bn_relu({buffer, state, channels, out, threads});
      },
      release);

  m.def(
      "dense_bn_relu_backward",
      [](const Matrix& grad, const DenseBuffer& buffer, Address state, bool batch_statistics, Address grad_x,
         Address corrections, Address sums, int threads) {
        dense_bn_relu_backward(
            {buffer, grad.data, state, grad.columns, batch_statistics, grad_x, corrections, sums, threads});
      },
      release);

  m.def(
      "dense_gradient",
      [](Address grad_x, const DenseBuffer& buffer, Address moments, Address corrections, int64_t first,
         const Matrix& out, int threads) {
        dense_gradient({buffer, grad_x, moments, corrections, first, out.columns, out.data, threads});
      },
      release);

  m.def("bn_from_moments",
        [](int dtype, int64_t rows, int64_t channels, Address moments, Address state, const Norm& norm) {
          bn_from_moments(static_cast<DType>(dtype), rows, channels, moments, state, norm);
        });

  m.def(
      "bn_relu_maxpool",
      [](const Pixels& x, Address state, Address out, Address argmax, int threads) {
        const PoolShape shape{x.map.batch, x.map.height, x.map.width, x.channels};
        bn_relu_maxpool({x.data, x.dtype, shape, state, out, argmax, threads});
      },
      release);

  m.def(
      "bn_relu_maxpool_backward",
      [](Address grad, Address argmax, const Pixels& x, const BnBranch& branch, Address sums, bool reduce,
         int threads) {
        const PoolShape shape{x.map.batch, x.map.height, x.map.width, x.channels};
        const BnReluMaxpoolBackwardParams params{grad, x.dtype, shape, argmax, branch, sums, threads};
        if (reduce) bn_relu_maxpool_backward_reduce(params);
        bn_relu_maxpool_backward_elementwise(params);
      },
      release);

  m.def(
      "relu_backward",
      [](const Matrix& grad, const Gate& gate, Address d, Address sums, int threads) {
        relu_backward({grad.data, grad.dtype, grad.rows, grad.columns, gate, d, sums, threads});
      },
      release);

  m.def(
      "shortcut_grad",
      [](const Pixels& grad_x, Address grad, int64_t channels, const Gate& gate, int threads) {
        shortcut_grad({grad_x.data, grad_x.dtype, grad_x.map, grad_x.channels, grad, channels, gate, threads});
      },
      release);

  m.def(
      "gram",
      [](const Pixels& x, Address state, Address out, Address pivot, Address total, Address matrix, int threads) {
        gram({x.data, x.dtype, x.map, x.channels, state, out, pivot, total, matrix, threads});
      },
      release);

  m.def(
      "one_pass_statistics",
      [](const Matrix& weight, int64_t rows, Address pivot, Address total, Address gram_matrix, Address state,
         Address projected, const Norm& norm, int threads) {
        one_pass_statistics({{nullptr, weight.dtype, rows, weight.rows, state, norm, threads},
                             weight.data,
                             weight.columns,
                             pivot,
                             total,
                             gram_matrix,
                             projected});
      },
      release);

  m.attr("ONE_PASS_NARROW") = kOnePassNarrow;
  m.def(
      "one_pass_grads",
      [](const Matrix& d, Address z, const Matrix& weight, Address cross, Address sum_d, const OnePassSaved& saved,
         const OnePassResults& results, int threads) {
        one_pass_grads({d.dtype, d.rows, weight.rows, weight.columns, cross, sum_d, weight.data, saved.state,
                        saved.projected, saved.total, results.grad_conv, results.grad_weight, results.quadratic,
                        results.constant, threads, d.data, z});
      },
      release);

  m.def(
      "one_pass_scale",
      [](const Matrix& weight, Address state, Address out, int threads) {
        OnePassGradsParams params{};
        params.dtype = weight.dtype;
        params.channels = weight.rows;
        params.in_channels = weight.columns;
        params.weight = weight.data;
        params.state = state;
        params.threads = threads;
        one_pass_scale(params, out);
      },
      release);

  m.def("conv_wgrad_splits", &conv_wgrad_splits);
  m.def(
      "conv_wgrad",
      [](const OutputGradient& gradient, const Matrix& input, Address input_state, const ConvolutionMap& map,
         Address partials, int threads) {
        conv_wgrad({input.dtype, gradient.grad, gradient.gate, gradient.y, gradient.coefficients, input.data,
                    input_state, map, partials, threads});
      },
      release);

  m.def(
      "conv_wgrad_finalize",
      [](const Matrix& partials, int64_t splits, const Matrix& grad_weight, const ConvolutionMap& map,
         const WeightStrides& strides, int threads) {
        conv_wgrad_finalize(
            {partials.dtype, partials.data, splits, map, grad_weight.dtype, grad_weight.data, strides, threads});
      },
      release);

  m.def("packed_size", &packed_size);
  m.def("fastest_method", [](const ConvolutionMap& map, int dtype, int purpose) {
    return static_cast<int>(fastest_method(map, static_cast<DType>(dtype), static_cast<Purpose>(purpose)));
  });
  m.def("takes_winograd", &takes_winograd);
  m.def("winograd_is_faster", &winograd_is_faster);

  m.def(
      "pack_weight",
      [](Address weight, const ConvolutionMap& map, const WeightStrides& strides, Address scale, Address panels,
         int threads, bool winograd) { pack_weight({weight, strides, map, scale, panels, threads, winograd}); },
      release);

  m.def(
      "packed_convolution",
      [](Address x, const ConvolutionMap& map, Address panels, Address bias, Address shortcut, bool relu, Address out,
         int threads,
         bool winograd) { packed_convolution({x, map, panels, bias, shortcut, relu, out, threads, winograd}); },
      release);

  bind_torch(m);
}
