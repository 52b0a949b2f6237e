#include "common/isa.h"
#include "native.h"
#include "pooling/pooling.h"

namespace {

template <class T>
double to_double(T x) {
  return double(x);
}
double to_double(emblas::bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}
double to_double(emblas::float16 x) {  // the tests make normal numbers only
  const int exponent = x.bits >> 10 & 31;
  const double magnitude = std::ldexp(1024 + (x.bits & 1023), exponent - 25);
  return exponent == 0 ? 0 : (x.bits & 0x8000 ? -magnitude : magnitude);
}

template <class T>
void fill(std::vector<T>& values, uint32_t seed) {
  values = native::random_values<T>(values.size(), seed);
}
template <>
void fill(std::vector<emblas::bfloat16>& values, uint32_t seed) {
  const auto bits = native::random_bits<uint16_t>(values.size(), seed);
  for (size_t i = 0; i < bits.size(); ++i) {
    values[i].bits = uint16_t((bits[i] & 0x80ff) | 0x3f00);  // magnitudes 0.5 to 2
  }
}
template <>
void fill(std::vector<emblas::float16>& values, uint32_t seed) {
  const auto bits = native::random_bits<uint16_t>(values.size(), seed);
  for (size_t i = 0; i < bits.size(); ++i) values[i].bits = uint16_t((bits[i] & 0x83ff) | 0x3c00);
}

template <class T>
void check_forward_and_backward(double unit) {
  using A = emblas::Accumulator<T>;
  const std::vector<int32_t> cu_seqlens{0, 0, 5, 6, 23};
  const int64_t batch = 4, tokens = 23;
  const auto& kernel = emblas::kernels<emblas::PoolingKernels>().of(T{});
  for (int64_t dim : {1, 3, 16, 37, 70}) {
    for (bool normalize : {false, true}) {
      std::vector<T> x(tokens * dim), out(batch * dim), grad(batch * dim), grad_x(tokens * dim);
      std::vector<A> weights(tokens), norm(batch), scratch(dim), grad_weights(tokens);
      fill(x, 1);
      fill(grad, 2);
      for (int64_t t = 0; t < tokens; ++t) weights[t] = A(t % 4) / 2;
      const emblas::SegmentPoolArgs<T> args{
          x.data(),       dim,       dim,        cu_seqlens.data(),
          weights.data(), normalize, out.data(), norm.data()};
      kernel.forward(args, 0, batch, scratch.data());
      const emblas::SegmentPoolBackwardArgs<T> back{
          grad.data(),       x.data(),       dim,       out.data(),    norm.data(),        dim,
          cu_seqlens.data(), weights.data(), normalize, grad_x.data(), grad_weights.data()};
      kernel.backward(back, 0, batch, scratch.data());
      for (int64_t b = 0; b < batch; ++b) {
        std::vector<double> mean(dim);
        double total = 0, square = 0, along = 0;
        for (int64_t t = cu_seqlens[b]; t < cu_seqlens[b + 1]; ++t) {
          total += weights[t];
          for (int64_t i = 0; i < dim; ++i) mean[i] += weights[t] * to_double(x[t * dim + i]);
        }
        for (double& m : mean) {
          m = total == 0 ? 0 : m / total;
          square += m * m;
        }
        const double length = normalize && total != 0 ? std::sqrt(square) : 1;
        for (int64_t i = 0; i < dim; ++i) {
          CHECK_NEAR(to_double(out[b * dim + i]), mean[i] / length, 64 * unit);
          along += mean[i] / length * to_double(grad[b * dim + i]);
        }
        if (!normalize) along = 0;
        for (int64_t t = cu_seqlens[b]; t < cu_seqlens[b + 1]; ++t) {
          double grad_weight = 0;
          for (int64_t i = 0; i < dim; ++i) {
            const double g =
                (to_double(grad[b * dim + i]) - along * mean[i] / length) / length / total;
            CHECK_NEAR(to_double(grad_x[t * dim + i]), weights[t] * g,
                       64 * unit * (1 + std::fabs(g)));
            grad_weight += (to_double(x[t * dim + i]) - mean[i]) * g;
          }
          CHECK_NEAR(grad_weights[t], grad_weight, 1024 * unit);
        }
      }
    }
  }
}

}  // namespace

NATIVE_TEST(segment_pool_float32) { check_forward_and_backward<float>(1e-7); }
NATIVE_TEST(segment_pool_float64) { check_forward_and_backward<double>(1e-15); }
NATIVE_TEST(segment_pool_bfloat16) { check_forward_and_backward<emblas::bfloat16>(4e-3); }
NATIVE_TEST(segment_pool_float16) { check_forward_and_backward<emblas::float16>(5e-4); }
