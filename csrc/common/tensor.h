// The door between torch and the kernels, through the libtorch stable ABI: argument guards,
// allocation and parallel loops. Python has already named and explained bad arguments; the guards
// here protect memory from callers that reach torch.ops.emblas directly.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <cstddef>
#include <stdexcept>
#include <string>

#include "types.h"

namespace emblas {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What torch makes of a C++ exception differs between its versions, but a runtime_error is a
// RuntimeError in all of them. The public functions know it by this prefix and raise ValueError.
inline constexpr char kErrorPrefix[] = "emblas: ";

inline void check(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(std::string(kErrorPrefix) + message);
}

// Torch's own macro for this has another name in each version.
inline void check_torch(AOTITorchError code) {
  if (code != AOTI_TORCH_SUCCESS) throw std::runtime_error("a call into torch failed, see above");
}

template <class T>
inline constexpr ScalarType kScalarType = ScalarType::Undefined;
template <>
inline constexpr ScalarType kScalarType<float> = ScalarType::Float;
template <>
inline constexpr ScalarType kScalarType<double> = ScalarType::Double;
template <>
inline constexpr ScalarType kScalarType<bfloat16> = ScalarType::BFloat16;
template <>
inline constexpr ScalarType kScalarType<float16> = ScalarType::Half;
template <>
inline constexpr ScalarType kScalarType<uint8_t> = ScalarType::Byte;
template <>
inline constexpr ScalarType kScalarType<int8_t> = ScalarType::Char;
template <>
inline constexpr ScalarType kScalarType<int32_t> = ScalarType::Int;
template <>
inline constexpr ScalarType kScalarType<int64_t> = ScalarType::Long;

template <class T>
bool has_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == kScalarType<T>;
}

// Element pointers. The dtype must have been checked.
template <class T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Rows of a 2-D tensor whose last dimension is contiguous; rows may be any stride apart.
inline bool is_rows(const Tensor& tensor) {
  return tensor.dim() == 2 && (tensor.size(1) <= 1 || tensor.stride(1) == 1 || tensor.numel() == 0);
}
// A contiguous vector; any size if `size` is negative.
template <class T>
bool is_vector(const Tensor& tensor, int64_t size) {
  return has_dtype<T>(tensor) && tensor.dim() == 1 && tensor.is_contiguous() &&
         (size < 0 || tensor.size(0) == size);
}
inline void check_rows(const Tensor& tensor, const char* message) {
  check(tensor.is_cpu() && is_rows(tensor), message);
}
template <class T>
void check_vector(const Tensor& tensor, int64_t size, const char* message) {
  check(tensor.is_cpu() && is_vector<T>(tensor, size), message);
}

// Large fresh memory costs more in page faults than a kernel takes to fill it: ask for huge pages,
// as numpy does.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = 4096;
  if (bytes < 4 << 20) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: may fail
#else
  (void)data, (void)bytes;
#endif
}

// An uninitialized contiguous tensor. Through the C shim: torch::stable::empty looks its operator
// up by name at every call, which costs more than a small kernel.
template <size_t n>
Tensor empty(ScalarType dtype, const std::array<int64_t, n>& sizes, int32_t device_type,
             int32_t device_index) {
  std::array<int64_t, n> strides;
  int64_t stride = 1;
  for (size_t i = n; i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  AtenTensorHandle handle;
  check_torch(aoti_torch_empty_strided(n, sizes.data(), strides.data(), static_cast<int32_t>(dtype),
                                       device_type, device_index, &handle));
  return Tensor(handle);
}
template <size_t n>
Tensor empty_cpu(ScalarType dtype, const std::array<int64_t, n>& sizes) {
  Tensor tensor = empty(dtype, sizes, aoti_torch_device_type_cpu(), 0);
  prefer_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size());
  return tensor;
}

// body(first, last) over [0, count) on torch's own threads; a task gets at least about 128 KiB.
// The split depends on the thread count, so a body's result must not depend on the split.
template <class Body>
void parallel_for(int64_t count, int64_t bytes_per_item, const Body& body) {
  constexpr int64_t task_bytes = 128 << 10;
  const int64_t grain = std::max<int64_t>(1, task_bytes / std::max<int64_t>(1, bytes_per_item));
  torch::stable::parallel_for(0, count, grain, body);
}

// visit(T{}) with the element type of a floating-point dtype.
template <class Visit>
auto visit_float(ScalarType dtype, const char* message, const Visit& visit) {
  switch (dtype) {
    case ScalarType::Double:
      return visit(double{});
    case ScalarType::BFloat16:
      return visit(bfloat16{});
    case ScalarType::Half:
      return visit(float16{});
    default:
      check(dtype == ScalarType::Float, message);
      return visit(float{});
  }
}

}  // namespace emblas
