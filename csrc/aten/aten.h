#pragma once

#include <cstdint>
#include <initializer_list>
#include <map>
#include <string>
#include <utility>

#include "common/channel_vector.h"
#include "common/dtype.h"

// Torch's CPU tensors and convolutions through its C interface (torch/csrc/inductor/aoti_torch/c/shim.h), which torch
// keeps for the models that it compiled ahead of time. The functions' addresses come at run time: nothing of torch is
// included or linked.
namespace fusedres::aten {

using Handle = void*;  // AtenTensorHandle: an at::Tensor on the heap

// Takes the addresses of the interface's functions by name; the names it needs are function_names().
void connect(const std::map<std::string, uintptr_t>& addresses);
const std::initializer_list<const char*>& function_names();
constexpr const char* kErrorText = "torch_exception_get_what_without_backtrace";  // taken where torch has it

struct Shape {
  int64_t batch;
  int64_t channels;
  int64_t height;
  int64_t width;

  int64_t rows() const { return batch * height * width; }
  bool operator==(const Shape& other) const {
    return batch == other.batch && channels == other.channels && height == other.height && width == other.width;
  }
};

// A handle that is owned, or none. Undefined stands for Python's None.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(Handle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(other.release()) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor();

  bool defined() const { return handle_ != nullptr; }
  Handle get() const { return handle_; }
  Handle release() { return std::exchange(handle_, nullptr); }

  void* data() const;  // null where undefined
  int64_t dim() const;
  const int64_t* sizes() const;
  const int64_t* strides() const;
  int32_t torch_dtype() const;
  int64_t bytes() const;   // of its elements
  bool has_dtype() const;  // one of DType
  DType dtype() const;
  Shape shape() const;  // of four dimensions
  bool is_contiguous() const;
  bool is_channels_last() const;
  bool is_matrix() const;              // (K, C, 1, 1), dense
  bool is_vector(int64_t size) const;  // (size,), contiguous
  bool in_memory() const;              // its storage on the CPU holds all of its elements; true where undefined
  ChannelVector vector() const;        // of a contiguous vector, or undefined

 private:
  Handle handle_ = nullptr;
};

int32_t torch_dtype(DType dtype);
int32_t torch_uint8();
int32_t torch_int64();

Tensor empty(std::initializer_list<int64_t> sizes, int32_t torch_dtype);
Tensor empty_channels_last(const Shape& shape, int32_t torch_dtype);  // huge pages behind large ones
Tensor empty_like(const Tensor& tensor);                              // of four dimensions, dense
Tensor clone(const Tensor& tensor);
void copy(const Tensor& target, const Tensor& source);
Tensor to_channels_last(Tensor tensor);                        // itself where it is
Tensor row(const Tensor& matrix, int64_t index);               // a view of a contiguous matrix
Tensor images(const Tensor& x, int64_t begin, int64_t count);  // a view of a channels_last tensor

struct ConvolutionParams {
  int64_t stride[2];
  int64_t padding[2];
  int64_t dilation[2];
  int64_t groups;
};

// Torch's convolution; its result in channels_last.
Tensor convolution(const Tensor& x, const Tensor& weight, const ConvolutionParams& params,
                   const Tensor& bias = Tensor());

// The gradients of x (in channels_last) and of the weight, each undefined unless needed.
std::pair<Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                               const ConvolutionParams& params, bool need_x, bool need_weight);

}  // namespace fusedres::aten
