#pragma once

#include <cstdint>
#include <initializer_list>
#include <map>
#include <string>
#include <utility>

#include "common/channel_vector.h"
#include "common/dtype.h"

// Torch's CPU tensors and convolutions, called through the C interface (torch/csrc/inductor/aoti_torch/c/shim.h) that
// torch keeps for models compiled ahead of time. The addresses of its functions are found at run time: no header of
// torch is included, and no library of torch is linked.
namespace fusedres::aten {

using Handle = void*;  // AtenTensorHandle: an at::Tensor on the heap

// Sets the addresses of the interface's functions by name. function_names() returns the names that are needed.
void connect(const std::map<std::string, uintptr_t>& addresses);
const std::initializer_list<const char*>& function_names();
constexpr const char* kErrorText = "torch_exception_get_what_without_backtrace";  // optional: newer than the rest

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

// Owns a handle, or is undefined, which stands for Python's None.
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

  void* data() const;  // null if undefined
  int64_t dim() const;
  const int64_t* sizes() const;
  const int64_t* strides() const;
  int32_t torch_dtype() const;
  int64_t bytes() const;   // the size of all elements
  bool has_dtype() const;  // whether the dtype is one of DType
  DType dtype() const;
  Shape shape() const;  // the tensor must have four dimensions
  bool is_contiguous() const;
  bool is_channels_last() const;
  bool is_matrix() const;              // (K, C, 1, 1), dense
  bool is_vector(int64_t size) const;  // (size,), contiguous
  bool in_memory() const;        // whether its storage is on the CPU and holds all of its elements; true if undefined
  ChannelVector vector() const;  // the tensor must be a contiguous vector, or undefined

 private:
  Handle handle_ = nullptr;
};

int32_t torch_dtype(DType dtype);
int32_t torch_uint8();
int32_t torch_int64();

Tensor empty(std::initializer_list<int64_t> sizes, int32_t torch_dtype);
Tensor empty_channels_last(const Shape& shape, int32_t torch_dtype);  // in huge pages if large
Tensor empty_like(const Tensor& tensor);  // the tensor must be dense and have four dimensions
Tensor clone(const Tensor& tensor);
void copy(const Tensor& target, const Tensor& source);
Tensor converted(const Tensor& tensor, int32_t torch_dtype);
Tensor in_dtype(Tensor tensor, int32_t torch_dtype);           // returns the tensor itself if it has the dtype
Tensor to_channels_last(Tensor tensor);                        // returns the tensor itself if it is channels_last
Tensor row(const Tensor& matrix, int64_t index);               // a view of a contiguous matrix
Tensor images(const Tensor& x, int64_t begin, int64_t count);  // a view of a channels_last tensor

// Views of the elements of a dense tensor as a matrix: row by row, and the transpose of that.
Tensor matrix(const Tensor& tensor, int64_t rows, int64_t columns);
Tensor transposed(const Tensor& tensor, int64_t rows, int64_t columns);

// Torch's product of matrices: out = a·b.
void multiply(const Tensor& out, const Tensor& a, const Tensor& b);

struct ConvolutionParams {
  int64_t stride[2];
  int64_t padding[2];
  int64_t dilation[2];
  int64_t groups;
};

// Torch's convolution. The result is channels_last.
Tensor convolution(const Tensor& x, const Tensor& weight, const ConvolutionParams& params,
                   const Tensor& bias = Tensor());

// The gradients of x (in channels_last) and of the weight, each undefined unless needed.
std::pair<Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                               const ConvolutionParams& params, bool need_x, bool need_weight);

}  // namespace fusedres::aten
