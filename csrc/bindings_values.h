#pragma once

// Reads the arguments of both extensions. A tensor is the address of its first element, as an integer; 0 is null. A
// struct is a tuple of its fields, in the order of the `read` functions below. fusedres/kernels/arguments.py builds
// these tuples.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "common/channel_vector.h"
#include "common/dtype.h"
#include "common/gate.h"
#include "common/norm.h"
#include "common/row_map.h"

namespace fusedres {

// The address of a tensor. It converts to a pointer of any type.
struct Address {
  uintptr_t value = 0;

  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(value);
  }
};

// A dense tensor as a matrix: a weight, or an activation with one row for each pixel.
struct Matrix {
  Address data;
  DType dtype;
  int64_t rows;
  int64_t columns;
};

// An NHWC activation, read at every stride-th pixel.
struct Pixels {
  Address data;
  DType dtype;
  RowMap map;
  int64_t channels;
};

// Each `read` returns false if the object is not such a value. A Python error may be set then.

inline bool read(PyObject* object, Address& value) {
  value.value = PyLong_AsUnsignedLongLong(object);
  return value.value != static_cast<uintptr_t>(-1) || PyErr_Occurred() == nullptr;
}

inline bool read(PyObject* object, int64_t& value) {
  value = PyLong_AsLongLong(object);
  return value != -1 || PyErr_Occurred() == nullptr;
}

inline bool read(PyObject* object, double& value) {
  value = PyFloat_AsDouble(object);
  return value != -1.0 || PyErr_Occurred() == nullptr;
}

inline bool read(PyObject* object, bool& value) {
  const int truth = PyObject_IsTrue(object);
  value = truth == 1;
  return truth >= 0;
}

template <class T>
bool read(PyObject* object, T*& value) {
  Address address;
  if (!read(object, address)) return false;
  value = address;
  return true;
}

template <class T, std::enable_if_t<std::is_enum_v<T>, int> = 0>
bool read(PyObject* object, T& value) {
  int64_t code;
  if (!read(object, code)) return false;
  value = static_cast<T>(code);
  return true;
}

template <class... Fields>
bool read_tuple(PyObject* object, Fields&... fields) {
  if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != static_cast<Py_ssize_t>(sizeof...(fields))) return false;
  Py_ssize_t next = 0;
  return (read(PyTuple_GET_ITEM(object, next++), fields) && ...);
}

inline bool read(PyObject* object, ChannelVector& value) {
  return read_tuple(object, value.data, value.dtype);
}

inline bool read(PyObject* object, Gate& value) {
  return read_tuple(object, value.kind, value.data);
}

inline bool read(PyObject* object, Matrix& value) {
  return read_tuple(object, value.data, value.dtype, value.rows, value.columns);
}

inline bool read(PyObject* object, Pixels& value) {
  return read_tuple(object, value.data, value.dtype, value.map.batch, value.map.height, value.map.width,
                    value.map.stride, value.channels);
}

inline bool read(PyObject* object, Norm& value) {
  return read_tuple(object, value.weight, value.bias, value.running_mean, value.running_var, value.num_batches_tracked,
                    value.cumulative, value.momentum, value.eps);
}

// Whether there is a function above, or beside the struct, that reads a T.
template <class T, class = void>
struct IsRead : std::false_type {};
template <class T>
struct IsRead<T, std::void_t<decltype(read(std::declval<PyObject*>(), std::declval<T&>()))>> : std::is_class<T> {};

// Makes pybind11 read a T with these functions.
template <class T>
struct ArgumentCaster {
  PYBIND11_TYPE_CASTER(T, pybind11::detail::const_name("int | tuple"));

  bool load(pybind11::handle source, bool) {
    if (read(source.ptr(), value)) return true;
    PyErr_Clear();
    return false;
  }
};

}  // namespace fusedres

template <class T>
struct pybind11::detail::type_caster<T, std::enable_if_t<fusedres::IsRead<T>::value>> : fusedres::ArgumentCaster<T> {};
