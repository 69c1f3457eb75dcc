#include "aten/aten.h"

#include <stdexcept>

#include "common/memory.h"

namespace fusedres::aten {
namespace {

using Error = int32_t;

// One entry for each function: its name without the prefix aoti_torch_, its result, its arguments.
#define FUSEDRES_ATEN_FUNCTIONS(X)                                                                                  \
  X(device_type_cpu, int32_t, ())                                                                                   \
  X(dtype_float32, int32_t, ())                                                                                     \
  X(dtype_float64, int32_t, ())                                                                                     \
  X(dtype_bfloat16, int32_t, ())                                                                                    \
  X(dtype_float16, int32_t, ())                                                                                     \
  X(dtype_uint8, int32_t, ())                                                                                       \
  X(dtype_int64, int32_t, ())                                                                                       \
  X(delete_tensor_object, Error, (Handle))                                                                          \
  X(get_data_ptr, Error, (Handle, void**))                                                                          \
  X(get_dim, Error, (Handle, int64_t*))                                                                             \
  X(get_sizes, Error, (Handle, int64_t**))                                                                          \
  X(get_strides, Error, (Handle, int64_t**))                                                                        \
  X(get_dtype, Error, (Handle, int32_t*))                                                                           \
  X(get_device_type, Error, (Handle, int32_t*))                                                                     \
  X(get_storage_size, Error, (Handle, int64_t*))                                                                    \
  X(get_storage_offset, Error, (Handle, int64_t*))                                                                  \
  X(_reinterpret_tensor, Error, (Handle, int64_t, const int64_t*, const int64_t*, int64_t, Handle*))                \
  X(empty_strided, Error, (int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*))            \
  X(clone, Error, (Handle, Handle*))                                                                                \
  X(copy_, Error, (Handle, Handle, int32_t))                                                                        \
  X(cpu_mm_out, Error, (Handle, Handle, Handle))                                                                    \
  X(cpu_convolution, Error,                                                                                         \
    (Handle, Handle, Handle*, const int64_t*, int64_t, const int64_t*, int64_t, const int64_t*, int64_t, int32_t,   \
     const int64_t*, int64_t, int64_t, Handle*))                                                                    \
  X(cpu_convolution_backward, Error,                                                                                \
    (Handle, Handle, Handle, const int64_t**, int64_t, const int64_t*, int64_t, const int64_t*, int64_t,            \
     const int64_t*, int64_t, int32_t, const int64_t*, int64_t, int64_t, const int32_t*, int64_t, Handle*, Handle*, \
     Handle*))

struct Functions {
#define FUSEDRES_POINTER(name, result, arguments) result(*name) arguments = nullptr;
  FUSEDRES_ATEN_FUNCTIONS(FUSEDRES_POINTER)
#undef FUSEDRES_POINTER
};

struct Torch {
  Functions call;
  const char* (*what)() = nullptr;  // text of the last error; null if torch does not have it
  int32_t cpu = 0;
  int32_t dtypes[4] = {};  // indexed by DType
  int32_t uint8 = 0;
  int32_t int64 = 0;
};

Torch torch;

void check(Error error, const char* function) {
  if (error == 0) return;
  const char* reason = torch.what == nullptr ? "torch wrote the reason to stderr" : torch.what();
  throw std::runtime_error(std::string("fusedres: torch's ") + function + " failed: " + reason);
}

bool dense(const int64_t* sizes, const int64_t* strides, std::initializer_list<int> inner_first) {
  int64_t expected = 1;
  for (const int axis : inner_first) {
    if (sizes[axis] != 1 && strides[axis] != expected) return false;
    expected *= sizes[axis];
  }
  return true;
}

Tensor empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  Handle result = nullptr;
  check(torch.call.empty_strided(dim, sizes, strides, dtype, torch.cpu, 0, &result), "empty_strided");
  return Tensor(result);
}

// The size of an element in bytes.
int64_t item_size(int32_t dtype) {
  if (dtype == torch.uint8) return 1;
  if (dtype == torch.int64 || dtype == torch_dtype(DType::kFloat64)) return 8;
  return dtype == torch_dtype(DType::kFloat32) ? 4 : 2;
}

// Asks for huge pages if the tensor is large.
Tensor advised(Tensor tensor) {
  const Shape s = tensor.shape();
  const size_t bytes = static_cast<size_t>(s.rows() * s.channels * item_size(tensor.torch_dtype()));
  if (bytes >= kLargeBytes) advise_huge_pages(tensor.data(), bytes);
  return tensor;
}

// The offset counts from the tensor's own first element.
Tensor view(const Tensor& tensor, int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t offset) {
  Handle result = nullptr;
  check(torch.call._reinterpret_tensor(tensor.get(), dim, sizes, strides, offset, &result), "as_strided");
  return Tensor(result);
}

constexpr int64_t kNoOutputPadding[2] = {0, 0};

}  // namespace

const std::initializer_list<const char*>& function_names() {
#define FUSEDRES_NAME(name, result, arguments) "aoti_torch_" #name,
  static const std::initializer_list<const char*> names = {FUSEDRES_ATEN_FUNCTIONS(FUSEDRES_NAME)};
#undef FUSEDRES_NAME
  return names;
}

void connect(const std::map<std::string, uintptr_t>& addresses) {
  Torch found;
#define FUSEDRES_CONNECT(name, result, arguments) \
  found.call.name = reinterpret_cast<result(*) arguments>(addresses.at("aoti_torch_" #name));
  FUSEDRES_ATEN_FUNCTIONS(FUSEDRES_CONNECT)
#undef FUSEDRES_CONNECT
  const auto what = addresses.find(kErrorText);
  if (what != addresses.end()) found.what = reinterpret_cast<const char* (*)()>(what->second);
  found.cpu = found.call.device_type_cpu();
  found.dtypes[static_cast<int>(DType::kFloat32)] = found.call.dtype_float32();
  found.dtypes[static_cast<int>(DType::kFloat64)] = found.call.dtype_float64();
  found.dtypes[static_cast<int>(DType::kBFloat16)] = found.call.dtype_bfloat16();
  found.dtypes[static_cast<int>(DType::kFloat16)] = found.call.dtype_float16();
  found.uint8 = found.call.dtype_uint8();
  found.int64 = found.call.dtype_int64();
  torch = found;
}

Tensor::~Tensor() {
  if (handle_ != nullptr) torch.call.delete_tensor_object(handle_);
}

void* Tensor::data() const {
  void* result = nullptr;
  if (handle_ != nullptr) check(torch.call.get_data_ptr(handle_, &result), "data_ptr");
  return result;
}

int64_t Tensor::dim() const {
  int64_t result = 0;
  check(torch.call.get_dim(handle_, &result), "dim");
  return result;
}

const int64_t* Tensor::sizes() const {
  int64_t* result = nullptr;
  check(torch.call.get_sizes(handle_, &result), "sizes");
  return result;
}

const int64_t* Tensor::strides() const {
  int64_t* result = nullptr;
  check(torch.call.get_strides(handle_, &result), "strides");
  return result;
}

int32_t Tensor::torch_dtype() const {
  int32_t result = 0;
  check(torch.call.get_dtype(handle_, &result), "dtype");
  return result;
}

int64_t Tensor::bytes() const {
  int64_t count = 1;
  for (int64_t axis = dim(); axis-- > 0;) count *= sizes()[axis];
  return count * item_size(torch_dtype());
}

bool Tensor::has_dtype() const {
  const int32_t found = torch_dtype();
  for (const int32_t known : torch.dtypes) {
    if (found == known) return true;
  }
  return false;
}

bool Tensor::in_memory() const {
  if (handle_ == nullptr) return true;
  int32_t device = 0;
  check(torch.call.get_device_type(handle_, &device), "device");
  if (device != torch.cpu) return false;
  const int64_t axes = dim();
  const int64_t* size = sizes();
  const int64_t* stride = strides();
  int64_t last = 0;
  for (int64_t axis = 0; axis < axes; ++axis) {
    if (size[axis] == 0) return true;
    last += (size[axis] - 1) * stride[axis];
  }
  int64_t offset = 0;
  int64_t bytes = 0;
  check(torch.call.get_storage_offset(handle_, &offset), "storage_offset");
  check(torch.call.get_storage_size(handle_, &bytes), "storage");
  return bytes >= (offset + last + 1) * item_size(torch_dtype());
}

bool Tensor::is_vector(int64_t size) const {
  return dim() == 1 && sizes()[0] == size && (size == 1 || strides()[0] == 1);
}

DType Tensor::dtype() const {
  const int32_t found = torch_dtype();
  for (int code = 0; code < 4; ++code) {
    if (found == torch.dtypes[code]) return static_cast<DType>(code);
  }
  throw std::invalid_argument("fusedres._C: there are no kernels for this dtype");
}

Shape Tensor::shape() const {
  const int64_t* found = sizes();
  return {found[0], found[1], found[2], found[3]};
}

bool Tensor::is_contiguous() const {
  const int64_t* size = sizes();
  const int64_t* stride = strides();
  int64_t expected = 1;
  for (int64_t axis = dim() - 1; axis >= 0; --axis) {
    if (size[axis] != 1 && stride[axis] != expected) return false;
    expected *= size[axis];
  }
  return true;
}

bool Tensor::is_channels_last() const {
  return dim() == 4 && dense(sizes(), strides(), {1, 3, 2, 0});
}

bool Tensor::is_matrix() const {
  return dim() == 4 && sizes()[2] == 1 && sizes()[3] == 1 && dense(sizes(), strides(), {1, 0});
}

ChannelVector Tensor::vector() const {
  if (!defined()) return {};
  return {data(), dtype()};
}

int32_t torch_dtype(DType dtype) {
  return torch.dtypes[static_cast<int>(dtype)];
}

int32_t torch_uint8() {
  return torch.uint8;
}

int32_t torch_int64() {
  return torch.int64;
}

Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype) {
  constexpr size_t kMaxDim = 4;
  int64_t strides[kMaxDim];
  if (sizes.size() > kMaxDim) throw std::invalid_argument("fusedres._C: at most four dimensions");
  int64_t stride = 1;
  for (size_t axis = sizes.size(); axis-- > 0;) {
    strides[axis] = stride;
    stride *= sizes.begin()[axis];
  }
  return empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides, dtype);
}

Tensor empty_channels_last(const Shape& s, int32_t dtype) {
  const int64_t sizes[4] = {s.batch, s.channels, s.height, s.width};
  const int64_t strides[4] = {s.channels * s.height * s.width, 1, s.channels * s.width, s.channels};
  return advised(empty_strided(4, sizes, strides, dtype));
}

Tensor empty_like(const Tensor& tensor) {
  return advised(empty_strided(4, tensor.sizes(), tensor.strides(), tensor.torch_dtype()));
}

Tensor clone(const Tensor& tensor) {
  Handle result = nullptr;
  check(torch.call.clone(tensor.get(), &result), "clone");
  return Tensor(result);
}

void copy(const Tensor& target, const Tensor& source) {
  check(torch.call.copy_(target.get(), source.get(), 0), "copy_");
}

Tensor converted(const Tensor& tensor, int32_t dtype) {
  Tensor result = empty_strided(tensor.dim(), tensor.sizes(), tensor.strides(), dtype);
  copy(result, tensor);
  return result;
}

Tensor in_dtype(Tensor tensor, int32_t dtype) {
  return tensor.torch_dtype() == dtype ? std::move(tensor) : converted(tensor, dtype);
}

Tensor to_channels_last(Tensor tensor) {
  if (tensor.is_channels_last()) return tensor;
  Tensor result = empty_channels_last(tensor.shape(), tensor.torch_dtype());
  copy(result, tensor);
  return result;
}

Tensor row(const Tensor& matrix, int64_t index) {
  const int64_t columns = matrix.sizes()[1];
  const int64_t stride = 1;
  return view(matrix, 1, &columns, &stride, index * columns);
}

Tensor images(const Tensor& x, int64_t begin, int64_t count) {
  const Shape s = x.shape();
  const int64_t image = s.channels * s.height * s.width;
  const int64_t sizes[4] = {count, s.channels, s.height, s.width};
  const int64_t strides[4] = {image, 1, s.channels * s.width, s.channels};
  return view(x, 4, sizes, strides, begin * image);
}

Tensor matrix(const Tensor& tensor, int64_t rows, int64_t columns) {
  const int64_t sizes[2] = {rows, columns}, strides[2] = {columns, 1};
  return view(tensor, 2, sizes, strides, 0);
}

Tensor transposed(const Tensor& tensor, int64_t rows, int64_t columns) {
  const int64_t sizes[2] = {columns, rows}, strides[2] = {1, columns};
  return view(tensor, 2, sizes, strides, 0);
}

void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  check(torch.call.cpu_mm_out(out.get(), a.get(), b.get()), "mm_out");
}

Tensor convolution(const Tensor& x, const Tensor& weight, const ConvolutionParams& p, const Tensor& bias) {
  Handle result = nullptr;
  Handle bias_handle = bias.get();
  check(torch.call.cpu_convolution(x.get(), weight.get(), bias.defined() ? &bias_handle : nullptr, p.stride, 2,
                                   p.padding, 2, p.dilation, 2, 0, kNoOutputPadding, 2, p.groups, &result),
        "convolution");
  return to_channels_last(Tensor(result));
}

std::pair<Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                               const ConvolutionParams& p, bool need_x, bool need_weight) {
  if (!need_x && !need_weight) return {};
  const int32_t mask[3] = {need_x, need_weight, 0};
  Handle grad_x = nullptr;
  Handle grad_weight = nullptr;
  Handle grad_bias = nullptr;
  check(torch.call.cpu_convolution_backward(grad.get(), x.get(), weight.get(), nullptr, 0, p.stride, 2, p.padding, 2,
                                            p.dilation, 2, 0, kNoOutputPadding, 2, p.groups, mask, 3, &grad_x,
                                            &grad_weight, &grad_bias),
        "convolution_backward");
  const Tensor bias(grad_bias);
  Tensor first(grad_x);
  Tensor second(grad_weight);
  return {need_x ? to_channels_last(std::move(first)) : Tensor(), need_weight ? std::move(second) : Tensor()};
}

}  // namespace fusedres::aten
