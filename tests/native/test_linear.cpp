#include <cmath>

#include "common/isa.h"
#include "linear/linear.h"
#include "native.h"

namespace {

// Beside the definition; rows, columns and depth that fill no block; the product alone,
// and with a bias, GELU and a residual.
template <class T>
void check_linear(int64_t rows, int64_t columns, int64_t depth, double limit) {
  const int64_t stride = depth + 3;
  const auto x = native::random_values<T>(rows * stride, 1);
  const auto weight = native::random_values<T>(columns * stride, 2);
  const auto bias = native::random_values<T>(columns, 3);
  const auto residual = native::random_values<T>(rows * (columns + 1), 4);
  const auto& kernel = emblas::kernels<emblas::LinearKernels>().of(T{});
  for (const bool whole : {false, true}) {
    const int64_t panels = emblas::panels<T>(columns);
    std::vector<T> packed(panels * emblas::kPanel<T> * depth), out(rows * columns),
        scratch(kernel.scratch_size);
    const emblas::LinearArgs<T> args{
        .x = x.data(),
        .x_stride = stride,
        .weight = weight.data(),
        .weight_stride = stride,
        .bias = whole ? bias.data() : nullptr,
        .residual = whole ? residual.data() : nullptr,
        .residual_stride = columns + 1,
        .activation = whole ? emblas::Activation::gelu : emblas::Activation::none,
        .columns = columns,
        .depth = depth,
        .packed = packed.data(),
        .out = out.data()};
    kernel.pack(args, 0, panels);
    kernel.multiply(args, 0, rows / 2, scratch.data());
    kernel.multiply(args, rows / 2, rows, scratch.data());
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        double expected = whole ? double(bias[j]) : 0;
        for (int64_t k = 0; k < depth; ++k) {
          expected += double(x[i * stride + k]) * double(weight[j * stride + k]);
        }
        if (whole) {
          expected = expected * std::erfc(-expected / std::sqrt(2.0)) / 2;
          expected += double(residual[i * (columns + 1) + j]);
        }
        CHECK_NEAR(out[i * columns + j], expected, limit);
      }
    }
  }
}

NATIVE_TEST(linear_rows) {
  for (const int64_t rows : {1, 5, 27}) {
    for (const int64_t depth : {0, 1, 64, 401}) {
      check_linear<float>(rows, 1, depth, 1e-3);
      check_linear<float>(rows, 70, depth, 1e-3);
      check_linear<double>(rows, 33, depth, 1e-11);
    }
  }
  check_linear<float>(3, 400, 9, 1e-4);  // more panels than a group
}

}  // namespace
