// The door between torch and the CUDA kernels: one DeviceCall per operator call holds the device,
// the stream and the memory that its kernels may use. No operator waits for the GPU, but those
// whose results have a size that only the GPU knows.
//
// In the emulated build (EMBLAS_SIMT, tests only) the same adapters take CPU tensors, register in a
// namespace of their own, and a DeviceCall tells the emulator which bytes kernels may touch.
#pragma once

#include <array>
#include <cstring>
#include <optional>

#include "common/tensor.h"

#if defined(EMBLAS_SIMT)
#include "simt/engine.h"
#define EMBLAS_CUDA_NAMESPACE emblas_simt
#define EMBLAS_CUDA_KEY CPU
#else
#include <torch/csrc/stable/accelerator.h>
#define EMBLAS_CUDA_NAMESPACE emblas
#define EMBLAS_CUDA_KEY CUDA
#endif

namespace emblas {

class DeviceCall {
 public:
  // On the device and the current stream of `tensor`.
  explicit DeviceCall(const Tensor& tensor)
#if defined(EMBLAS_SIMT)
  {
    check(tensor.is_cpu(), "emulated operators take CPU tensors");
  }
  ~DeviceCall() { simt::engine::forget_memory(); }
  bool holds(const Tensor& tensor) const { return tensor.is_cpu(); }
  void* stream() const { return nullptr; }
#else
      : device_(on_cuda(tensor)), guard_(device_) {
    check_torch(aoti_torch_get_current_cuda_stream(device_, &stream_));
  }
  bool holds(const Tensor& tensor) const {
    return tensor.is_cuda() && tensor.get_device_index() == device_;
  }
  void* stream() const { return stream_; }
#endif
  DeviceCall(const DeviceCall&) = delete;
  DeviceCall& operator=(const DeviceCall&) = delete;

  // Rows of a 2-D tensor whose last dimension is contiguous, on this device.
  void check_rows(const Tensor& tensor, const char* message) const {
    check(holds(tensor) && is_rows(tensor), message);
  }
  template <class T>
  void check_vector(const Tensor& tensor, int64_t size, const char* message) const {
    check(holds(tensor) && is_vector<T>(tensor, size), message);
  }

  // Element pointers of an input. The dtype must have been checked.
  template <class T>
  const T* read(const Tensor& tensor) const {
    allow(tensor, true);
    return emblas::read<T>(tensor);
  }
  template <class T>
  const T* read(const std::optional<Tensor>& tensor) const {
    return tensor ? read<T>(*tensor) : nullptr;
  }
  // Element pointers of an output or workspace made by empty().
  template <class T>
  T* write(const Tensor& tensor) const {
    allow(tensor, false);
    return emblas::write<T>(tensor);
  }
  // Element pointers of an argument that the operator changes in place.
  template <class T>
  T* change(const Tensor& tensor) const {
    allow(tensor, true);
    return emblas::write<T>(tensor);
  }

  // The last number of an int64 vector; waits for the GPU.
  int64_t wait_for_last(Tensor numbers) const {
    const Tensor last = torch::stable::narrow(numbers, 0, numbers.size(0) - 1, 1);
    int64_t value;
    check_torch(aoti_torch_item_int64(last.get(), &value));
    return value;
  }

  // An uninitialized contiguous tensor on this device, for an output or a workspace.
  template <size_t n>
  Tensor empty(ScalarType dtype, const std::array<int64_t, n>& sizes) const {
#if defined(EMBLAS_SIMT)
    Tensor tensor = empty_cpu(dtype, sizes);
    std::memset(tensor.mutable_data_ptr(), 0xff, tensor.numel() * tensor.element_size());  // NaN
    return tensor;
#else
    return emblas::empty(dtype, sizes, aoti_torch_device_type_cuda(), device_);
#endif
  }

 private:
#if defined(EMBLAS_SIMT)
  static void allow(const Tensor& tensor, bool initialized) {
    simt::engine::register_memory(tensor.const_data_ptr(), tensor.sizes().data(),
                                  tensor.strides().data(), tensor.dim(), tensor.element_size(),
                                  initialized);
  }
#else
  static void allow(const Tensor&, bool) {}
  static int32_t on_cuda(const Tensor& tensor) {
    check(tensor.is_cuda(), "the first argument must be a CUDA tensor");
    return tensor.get_device_index();
  }

  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
#endif
};

}  // namespace emblas
