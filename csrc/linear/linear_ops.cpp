// Linear layers as a torch operator on CPU tensors.
#include <memory>
#include <optional>

#include "common/aligned.h"
#include "common/isa.h"
#include "common/tensor.h"
#include "linear/linear.h"

namespace emblas {
namespace {

template <class T>
Tensor linear_of(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& residual, Activation activation) {
  const int64_t rows = x.size(0), columns = weight.size(0), depth = x.size(1);
  check(has_dtype<T>(weight), "weight must have the dtype of x");
  if (bias) check_vector<T>(*bias, columns, "bias must be a contiguous vector, one per column");
  if (residual) {
    check_rows(*residual, "residual must be a CPU tensor with a contiguous last dimension");
    check(has_dtype<T>(*residual) && residual->size(0) == rows && residual->size(1) == columns,
          "residual must have the dtype of x, and the shape of the result");
  }
  Tensor out = empty_cpu<2>(kScalarType<T>, {rows, columns});
  if (rows == 0 || columns == 0) return out;
  const Tensor packed = empty_cpu<1>(kScalarType<T>, {panels<T>(columns) * kPanel<T> * depth});
  const LinearArgs<T> args{.x = read<T>(x),
                           .x_stride = x.stride(0),
                           .weight = read<T>(weight),
                           .weight_stride = weight.stride(0),
                           .bias = bias ? read<T>(*bias) : nullptr,
                           .residual = residual ? read<T>(*residual) : nullptr,
                           .residual_stride = residual ? residual->stride(0) : 0,
                           .activation = activation,
                           .columns = columns,
                           .depth = depth,
                           .packed = write<T>(packed),
                           .out = write<T>(out)};
  const auto& kernel = kernels<LinearKernels>().of(T{});
  parallel_for(panels<T>(columns), kPanel<T> * depth * int64_t(sizeof(T)),
               [&](int64_t first, int64_t last) { kernel.pack(args, first, last); });
  // A block's multiply-adds take as long as reading a 16th of so many bytes.
  const int64_t blocks = (rows + kernel.rows - 1) / kernel.rows;
  const int64_t bytes = kernel.rows * columns * depth * int64_t(sizeof(T)) / 16;
  parallel_for(blocks, bytes, [&](int64_t first, int64_t last) {
    const AlignedArray<T> scratch = aligned_array<T>(kernel.scratch_size);
    kernel.multiply(args, first * kernel.rows, std::min(last * kernel.rows, rows), scratch.get());
  });
  return out;
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& residual, int64_t activation) {
  check_rows(x, "x must be a CPU tensor (rows, depth) with a contiguous last dimension");
  check_rows(weight, "weight must be a CPU tensor (columns, depth) with a contiguous last one");
  check(weight.size(1) == x.size(1), "weight must have as many elements in a row as x");
  check(0 <= activation && activation <= int64_t(Activation::silu), "activation must be 0 to 4");
  const auto f = Activation(activation);
  if (x.scalar_type() == ScalarType::Double) {
    return linear_of<double>(x, weight, bias, residual, f);
  }
  check(has_dtype<float>(x), "x must be float32 or float64");
  return linear_of<float>(x, weight, bias, residual, f);
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(emblas, library) {
  library.def(
      "linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, "
      "int activation=0) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(emblas, CPU, library) {
  library.impl("linear", TORCH_BOX(&emblas::linear));
}
