#include "common/isa.h"
#include "native.h"
#include "tables/quantized.h"

namespace {

using emblas::BagMode;
using emblas::QuantizedArgs;

// Any integers, of a table that ends where its memory does: AddressSanitizer sees a read beyond.
template <class T>
void check_quantized(int64_t bits, int64_t dim, BagMode mode, bool has_zero, double unit) {
  const std::vector<int32_t> offsets{0, 0, 5, 6, 150};
  const int64_t bags = 4, count = 150, rows = 19, padding_id = 25;
  const bool weighted = mode == BagMode::sum;
  auto ids = native::random_bits<int64_t>(count, 1);
  for (int64_t& id : ids) id = id & 7 ? int64_t(uint64_t(id) % rows) : padding_id;
  const int64_t row_bytes = emblas::packed_bytes(dim, bits);
  const auto packed = native::random_bits<uint8_t>(rows * row_bytes, 2);
  const auto scale = native::random_values<T>(rows, 3),
             weights = native::random_values<T>(count, 4), zero = native::random_values<T>(rows, 6);
  const auto grad_out = native::random_values<T>(bags * dim, 5);
  std::vector<T> out(bags * dim), scratch(2 * emblas::padded_dim(dim)), grad_weights(count);
  const QuantizedArgs<T> args{packed.data(),
                              scale.data(),
                              rows,
                              dim,
                              bits,
                              mode,
                              ids.data(),
                              offsets.data(),
                              weighted ? weights.data() : nullptr,
                              &padding_id,
                              has_zero ? zero.data() : nullptr};
  const auto& kernel = emblas::kernels<emblas::QuantizedKernels>().quantized.of(T{});
  kernel.forward(args, 0, 2, scratch.data(), out.data());
  kernel.forward(args, 2, bags, scratch.data(), out.data());
  if (weighted) {
    kernel.grad_weights(args, 0, bags, grad_out.data(), scratch.data(), grad_weights.data());
  }

  const auto element = [&](int64_t row, int64_t k) {
    int64_t code = 0;
    for (int64_t bit = 0; bit < bits; ++bit) {
      const int64_t at = k * bits + bit;
      code |= int64_t(packed[row * row_bytes + at / 8] >> at % 8 & 1) << bit;
    }
    const double origin = has_zero ? double(zero[row]) : double(int64_t(1) << (bits - 1));
    return double(scale[row]) * (double(code) - origin);
  };
  const double largest = double(int64_t(1) << bits), limit = 1e3 * unit * largest;
  for (int64_t b = 0; b < bags; ++b) {
    std::vector<double> expected(dim), along(count);
    int64_t used = 0;
    for (int64_t i = offsets[b]; i < offsets[b + 1]; ++i) {
      if (ids[i] == padding_id) continue;
      for (int64_t k = 0; k < dim; ++k) {
        const double x = element(ids[i], k);
        const bool replaces = mode == BagMode::max && (used == 0 || x > expected[k]);
        if (mode != BagMode::max) expected[k] += weighted ? double(weights[i]) * x : x;
        if (replaces) expected[k] = x;
        along[i] += x * double(grad_out[b * dim + k]);
      }
      ++used;
    }
    for (int64_t k = 0; k < dim; ++k) {
      const double share = mode == BagMode::mean && used ? 1.0 / double(used) : 1.0;
      CHECK_NEAR(out[b * dim + k], share * expected[k], limit);
    }
    for (int64_t i = offsets[b]; weighted && i < offsets[b + 1]; ++i) {
      CHECK_NEAR(grad_weights[i], along[i], limit);
    }
  }
}

template <class T>
void check_all(double unit) {
  for (int64_t bits : {2, 4, 8, 16}) {
    for (int64_t dim : {1, 3, 8, 16, 37, 64, 70, 131}) {
      for (BagMode mode : {BagMode::sum, BagMode::mean, BagMode::max}) {
        check_quantized<T>(bits, dim, mode, dim % 3 == 1, unit);
      }
    }
  }
}

}  // namespace

NATIVE_TEST(quantized_float32) { check_all<float>(1e-7); }
NATIVE_TEST(quantized_float64) { check_all<double>(1e-15); }
