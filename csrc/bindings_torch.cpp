// Python bindings of the passes in residual_block/, which take and return torch tensors themselves.

#include "bindings_torch.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "aten/aten.h"
#include "residual_block/residual_block.h"

namespace py = pybind11;
using namespace fusedres;  // NOLINT: this file only binds

namespace {

using aten::Tensor;

constexpr size_t kUnitTensors = 6;
constexpr size_t kUnitParams = 3;  // the first three of them
constexpr size_t kOnePassTensors = 4;

// Conversions of torch._C._aoti. The first turns a tensor into a capsule with a handle, which we then own. The second
// turns a list of such capsules into tensors, which then own the handles.
PyObject* to_handle = nullptr;
PyObject* from_handles = nullptr;

Tensor tensor_of(PyObject* object) {
  if (object == Py_None) return Tensor();
  const auto capsule = py::reinterpret_steal<py::object>(PyObject_CallOneArg(to_handle, object));
  if (!capsule) throw py::error_already_set();
  return Tensor(PyCapsule_GetPointer(capsule.ptr(), PyCapsule_GetName(capsule.ptr())));
}

// Returns a list of Python tensors, with None for undefined ones.
py::list objects_of(std::vector<Tensor> tensors) {
  py::list result(tensors.size());
  py::list capsules;
  for (Tensor& tensor : tensors) {
    if (!tensor.defined()) continue;
    capsules.append(py::reinterpret_steal<py::object>(PyCapsule_New(tensor.get(), nullptr, nullptr)));
  }
  const auto found = py::reinterpret_steal<py::list>(PyObject_CallOneArg(from_handles, capsules.ptr()));
  if (!found) throw py::error_already_set();
  size_t next = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    result[i] = tensors[i].release() == nullptr ? py::none() : py::object(found[next++]);
  }
  return result;
}

// The positions of fields in the named tuples of fusedres.autograd.plan. A lookup by name would take longer than
// everything else here. connect() gets the names of the fields and checks them.
enum UnitField { kStride, kPadding, kDilation, kGroups, kPixelwise, kBatchStatistics, kUpdate, kMomentum, kEps };
const std::vector<std::string> kUnitFields = {"stride",           "padding", "dilation", "groups", "pixelwise",
                                              "batch_statistics", "update",  "momentum", "eps"};
enum PlanField { kUnits, kProjection, kPadStride, kOnePass, kRecompute, kInferImages };
const std::vector<std::string> kPlanFields = {"units",    "projection", "pad_stride",
                                              "one_pass", "recompute",  "infer_images"};

py::handle field(const py::handle& tuple, int index) {
  return PyTuple_GET_ITEM(tuple.ptr(), index);
}

int64_t integer(const py::handle& object) {
  return PyLong_AsLongLong(object.ptr());
}

bool flag(const py::handle& object) {
  return PyObject_IsTrue(object.ptr()) == 1;
}

// Reads two integers from a tuple, or from any sequence that a user gave instead.
void read_pair(const py::handle& pair, int64_t* out) {
  const auto values = py::reinterpret_steal<py::object>(PySequence_Tuple(pair.ptr()));
  if (!values || PyTuple_GET_SIZE(values.ptr()) != 2)
    throw py::value_error("stride, padding and dilation must be two integers each");
  out[0] = integer(field(values, 0));
  out[1] = integer(field(values, 1));
}

ConvBn unit_of(const py::handle& unit) {
  ConvBn result{};
  read_pair(field(unit, kStride), result.convolution.stride);
  read_pair(field(unit, kPadding), result.convolution.padding);
  read_pair(field(unit, kDilation), result.convolution.dilation);
  result.convolution.groups = integer(field(unit, kGroups));
  result.pixelwise = flag(field(unit, kPixelwise));
  result.batch_statistics = flag(field(unit, kBatchStatistics));
  result.update = flag(field(unit, kUpdate));
  const py::handle momentum = field(unit, kMomentum);
  result.cumulative = momentum.is_none();
  result.momentum = result.cumulative ? 0.0 : PyFloat_AsDouble(momentum.ptr());
  result.eps = PyFloat_AsDouble(field(unit, kEps).ptr());
  return result;
}

ResidualBlock block_of(const py::tuple& plan, int threads) {
  ResidualBlock result;
  const auto units = py::reinterpret_borrow<py::tuple>(field(plan, kUnits));
  result.units.reserve(units.size() + 1);
  for (const py::handle unit : units) result.units.push_back(unit_of(unit));
  const py::handle projection = field(plan, kProjection);
  result.projection = !projection.is_none();
  if (result.projection) result.units.push_back(unit_of(projection));
  result.pad_stride = integer(field(plan, kPadStride));
  const py::handle one_pass = field(plan, kOnePass);
  result.one_pass_last = flag(field(one_pass, 0));
  result.one_pass_projection = result.projection && flag(field(one_pass, 1));
  const py::handle recompute = field(plan, kRecompute);
  result.recompute_last = flag(field(recompute, 0));
  result.recompute_projection = result.projection && flag(field(recompute, 1));
  result.threads = threads;
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  return result;
}

void require_fields(const std::vector<std::string>& found, const std::vector<std::string>& expected) {
  if (found.size() < expected.size() || !std::equal(expected.begin(), expected.end(), found.begin())) {
    throw std::invalid_argument("fusedres._C: the fields of a plan are not those that csrc/bindings_torch.cpp reads");
  }
}

void connect(const std::map<std::string, uintptr_t>& addresses, const py::object& to, const py::object& from,
             const std::vector<std::string>& unit_fields, const std::vector<std::string>& plan_fields) {
  require_fields(unit_fields, kUnitFields);
  require_fields(plan_fields, kPlanFields);
  aten::connect(addresses);
  to_handle = to.inc_ref().ptr();
  from_handles = from.inc_ref().ptr();
}

std::vector<UnitTensors> unit_tensors_of(const py::tuple& tensors, const ResidualBlock& block) {
  if (tensors.size() != kUnitTensors * block.units.size())
    throw std::invalid_argument("expected six tensors for each unit");
  std::vector<UnitTensors> result;
  result.reserve(block.units.size());
  for (size_t i = 0; i < tensors.size(); i += kUnitTensors) {
    const auto tensor = [&](size_t k) { return tensor_of(PyTuple_GET_ITEM(tensors.ptr(), i + k)); };
    result.push_back({tensor(0), tensor(1), tensor(2), tensor(3), tensor(4), tensor(5)});
  }
  return result;
}

py::object forward(const py::object& x, const py::tuple& plan, const py::tuple& tensors, int threads) {
  const ResidualBlock block = block_of(plan, threads);
  const Tensor source = tensor_of(x.ptr());
  std::vector<UnitTensors> units = unit_tensors_of(tensors, block);
  if (!serves(source, block, units)) return py::none();
  ResidualBlockForward result;
  {
    const py::gil_scoped_release release;
    result = residual_block_forward(source, block, units);
  }
  std::vector<Tensor> tensors_out;
  tensors_out.push_back(std::move(result.out));
  tensors_out.push_back(std::move(result.mask));
  for (Tensor& y : result.outputs) tensors_out.push_back(std::move(y));
  for (Tensor& state : result.states) tensors_out.push_back(std::move(state));
  if (block.one_pass_last || block.one_pass_projection) {
    for (OnePass* end : {&result.last, &result.projection}) {
      if (end == &result.projection && !block.projection) continue;
      tensors_out.push_back(std::move(end->pivot));
      tensors_out.push_back(std::move(end->total));
      tensors_out.push_back(std::move(end->projected));
      tensors_out.emplace_back();  // only written by our own convolutions
    }
  }
  return objects_of(std::move(tensors_out));
}

py::object infer(const py::object& x, const py::tuple& plan, const py::tuple& tensors, int threads) {
  const ResidualBlock block = block_of(plan, threads);
  const Tensor source = tensor_of(x.ptr());
  std::vector<UnitTensors> units = unit_tensors_of(tensors, block);
  if (!serves(source, block, units)) return py::none();
  const int64_t images = integer(field(plan, kInferImages));
  std::vector<Tensor> result;
  {
    const py::gil_scoped_release release;
    result.push_back(residual_block_infer(source, block, units, images));
  }
  return objects_of(std::move(result))[0];
}

// saved: x, three parameters for each unit, and what forward returned after the result.
py::object backward(const py::object& grad_out, const py::tuple& plan, const py::tuple& saved, std::vector<bool> needs,
                    bool donated, int threads) {
  const ResidualBlock block = block_of(plan, threads);
  const size_t units = block.units.size();
  const size_t params = kUnitParams * units;
  const bool one_pass = block.one_pass_last || block.one_pass_projection;
  const size_t ends = one_pass ? kOnePassTensors * (block.projection ? 2 : 1) : 0;
  if (saved.size() < 2 + params + 2 * units + ends || needs.size() != 1 + params) {
    throw std::invalid_argument(
        "expected x, a mask, three parameters and two tensors for each unit, and four for each one-pass end");
  }
  size_t next = 0;
  const auto take = [&](size_t count) {
    std::vector<Tensor> result;
    result.reserve(count);
    while (count-- > 0) result.push_back(tensor_of(PyTuple_GET_ITEM(saved.ptr(), next++)));
    return result;
  };
  ResidualBlockBackward given;
  given.grad_out = tensor_of(grad_out.ptr());
  given.x = std::move(take(1)[0]);
  given.params = take(params);
  given.mask = std::move(take(1)[0]);
  given.outputs = take(units);
  given.states = take(units);
  for (OnePass* end : {&given.last, &given.projection}) {
    if (!one_pass || (end == &given.projection && !block.projection)) continue;
    std::vector<Tensor> tensors = take(kOnePassTensors);
    *end = {std::move(tensors[0]), std::move(tensors[1]), std::move(tensors[2])};
  }
  given.needs = std::move(needs);
  given.donated = donated;
  if (!serves(block, given)) return py::none();
  std::vector<Tensor> grads;
  {
    const py::gil_scoped_release release;
    grads = residual_block_backward(block, given);
  }
  return objects_of(std::move(grads));
}

}  // namespace

void bind_torch(py::module_& m) {
  m.def("torch_functions", [] {
    const auto& names = aten::function_names();
    return std::vector<std::string>(names.begin(), names.end());
  });
  m.attr("ERROR_TEXT_FUNCTION") = aten::kErrorText;
  m.def("connect_torch", &connect);
  m.def("residual_block_forward", &forward);
  m.def("residual_block_infer", &infer);
  m.def("residual_block_backward", &backward);
}
