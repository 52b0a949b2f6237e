#include <limits>

#include "common/isa.h"
#include "common/philox.h"
#include "native.h"
#include "pooling/attention_pool.h"
#include "pooling/finish.h"
#include "pooling/pooling.h"
#include "pooling/vocab_pool.h"

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
      std::vector<A> weights(tokens), norm(batch), scratch(2 * dim), grad_weights(tokens);
      fill(x, 1);
      fill(grad, 2);
      for (int64_t t = 0; t < tokens; ++t) weights[t] = A(t % 4) / 2;
      emblas::Segments<T> segments{};
      segments.x = x.data();
      segments.dim = segments.row_stride = dim;
      segments.begins = cu_seqlens.data();
      segments.ends = cu_seqlens.data() + 1;
      segments.weights = weights.data();
      const emblas::PoolModes mode{{emblas::PoolMode::mean}, 1};
      const emblas::SegmentPoolArgs<T> args{segments,   mode,        normalize, false,
                                            out.data(), norm.data(), nullptr};
      kernel.forward(args, 0, batch, scratch.data());
      const emblas::SegmentPoolBackwardArgs<T> back{
          segments,    mode,    normalize, false,  grad.data(),   out.data(),
          norm.data(), nullptr, batch,     tokens, grad_x.data(), grad_weights.data()};
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

// The gradient of two modes is the sum of theirs: what `max` sends to its tokens, and the mean's.
template <class T>
void check_two_modes(double unit) {
  using A = emblas::Accumulator<T>;
  const std::vector<int32_t> cu_seqlens{0, 3, 3, 12};
  const int64_t batch = 3, tokens = 12;
  const emblas::PoolModes modes{{emblas::PoolMode::max, emblas::PoolMode::mean}, 2};
  const auto& kernel = emblas::kernels<emblas::PoolingKernels>().of(T{});
  for (int64_t dim : {1, 19}) {
    std::vector<T> x(tokens * dim), out(2 * batch * dim), grad(2 * batch * dim), grad_x(x.size());
    std::vector<A> scratch(3 * dim);
    std::vector<int32_t> argmax(batch * dim);
    fill(x, 4);
    fill(grad, 5);
    emblas::Segments<T> segments{};
    segments.x = x.data();
    segments.dim = segments.row_stride = dim;
    segments.begins = cu_seqlens.data();
    segments.ends = cu_seqlens.data() + 1;
    kernel.forward({segments, modes, false, false, out.data(), nullptr, argmax.data()}, 0, batch,
                   scratch.data());
    kernel.backward({segments, modes, false, false, grad.data(), out.data(), nullptr, argmax.data(),
                     batch, tokens, grad_x.data(), nullptr},
                    0, batch, scratch.data());
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t t = cu_seqlens[b]; t < cu_seqlens[b + 1]; ++t) {
        for (int64_t i = 0; i < dim; ++i) {
          const T* of_segment = &grad[2 * b * dim + i];
          double expected = to_double(of_segment[dim]) / (cu_seqlens[b + 1] - cu_seqlens[b]);
          if (argmax[b * dim + i] == t) expected += to_double(of_segment[0]);
          CHECK_NEAR(to_double(grad_x[t * dim + i]), expected, 16 * unit);
        }
      }
    }
  }
}

// Every mode over rows of padded planes, with a skipped prefix and an index in turn.
template <class T>
void check_modes() {
  using A = emblas::Accumulator<T>;
  const std::vector<int32_t> begins{0, 2, 5}, ends{5, 2, 12}, skip{1, 0, 2};
  const std::vector<int32_t> index{3, 3, 0, 11, 7, 7, 1, 2, 10, 9, 8, 4};
  const std::vector<A> weights{1, 2, 1, 1, A(0.5), 1, 0, 1, 3, 1, 1, 0};
  const int64_t plane_rows = 4, batch = 3;
  for (int64_t dim : {1, 5, 16, 37}) {
    const int64_t row_stride = dim + 3, plane_stride = plane_rows * row_stride + 7;
    std::vector<T> x(2 * plane_stride + (plane_rows - 1) * row_stride + dim);
    fill(x, 3);
    std::vector<A> scratch(8 * dim), pooled(batch * 7 * dim), means(batch * dim);
    std::vector<int32_t> argmax(batch * dim);
    for (bool listed : {false, true}) {
      const emblas::Segments<T> segments{
          x.data(),      dim,          row_stride,
          plane_rows,    plane_stride, begins.data(),
          ends.data(),   skip.data(),  listed ? index.data() : nullptr,
          weights.data()};
      const auto at = [&](int64_t p, int64_t i) {
        const int64_t row = listed ? index[p] : p;
        return to_double(x[row / plane_rows * plane_stride + row % plane_rows * row_stride + i]);
      };
      emblas::PoolModes modes{{}, emblas::kPoolModes};
      for (int64_t mode = 0; mode < modes.count; ++mode) modes.at[mode] = emblas::PoolMode(mode);
      emblas::kernels<emblas::PoolingKernels>().of(T{}).forward(
          {segments, modes, false, true, pooled.data(), nullptr, argmax.data()}, 0, batch,
          scratch.data());
      emblas::kernels<emblas::SegmentGemKernels>().of(T{}).forward(
          segments, A(2.5), A(0.25), 0, batch, means.data(), scratch.data());
      for (int64_t mode = 0; mode <= modes.count; ++mode) {
        const bool gem = mode == modes.count;
        for (int64_t b = 0; b < batch; ++b) {
          for (int64_t i = 0; i < dim; ++i) {
            double sum = 0, total = 0, first = 0, last = 0, largest = 0;
            int64_t where = -1;
            bool empty = true;
            for (int64_t p = begins[b] + skip[b]; p < ends[b]; ++p) {
              if (weights[p] == 0) continue;
              const double w = mode == 3 ? weights[p] * (p - begins[b] + 1) : weights[p];
              last = at(p, i);
              if (empty) first = last;
              if (empty || last > largest) largest = last, where = p;
              empty = false;
              total += w;
              sum += w * (gem ? std::pow(std::fmax(last, 0.25), 2.5) : last);
            }
            double expected = empty ? 0 : sum / total;
            if (mode == 1) expected = sum;
            if (mode == 2 && !empty) expected = sum / std::sqrt(total);
            if (mode == 4) expected = first;
            if (mode == 5) expected = last;
            if (mode == 6) expected = largest;
            if (gem) expected = std::pow(expected, 1 / 2.5);
            CHECK(argmax[b * dim + i] == where);
            CHECK_NEAR(gem ? means[b * dim + i] : pooled[(b * 7 + mode) * dim + i], expected,
                       64 * (sizeof(A) == 4 ? 1e-6 : 1e-14));
          }
        }
      }
    }
  }
}

template <class A>
void check_finish(double unit) {
  const std::vector<int64_t> dims{3, 16, 21};
  const int64_t rows = 4, dim = 21, width = 40;
  const auto x = native::random_values<A>(rows * dim, 5);
  std::vector<A> out(rows * width), scratch(dim), ranges(2 * width), grad_x(rows * dim);
  std::vector<int8_t> levels(rows * width);
  std::vector<uint8_t> bits(rows * (1 + 2 + 3));
  for (int64_t i = 0; i < width; ++i) ranges[i] = -1, ranges[width + i] = 1;
  const emblas::FinishSettings settings{dims.data(), 3, dim, true, 0, 0};
  const auto& kernel = emblas::kernels<emblas::FinishKernels>().of(A{});
  kernel.floating(settings, x.data(), 0, rows, out.data(), scratch.data());
  kernel.int8(settings, x.data(), ranges.data(), 0, rows, levels.data(), scratch.data());
  kernel.bits(settings, x.data(), 0, rows, bits.data(), scratch.data());
  kernel.backward(settings, out.data(), x.data(), 0, rows, grad_x.data());
  for (int64_t row = 0; row < rows; ++row) {
    int64_t before = 0, byte = 0;
    for (int64_t k : dims) {
      double square = 0;
      for (int64_t i = 0; i < k; ++i) square += double(x[row * dim + i]) * x[row * dim + i];
      for (int64_t i = 0; i < k; ++i) {
        const double expected = x[row * dim + i] / std::sqrt(square);
        CHECK_NEAR(out[row * width + before + i], expected, 16 * unit);
        CHECK_NEAR(levels[row * width + before + i], std::rint((expected + 1) * 127.5) - 128, 1);
        const uint8_t code = bits[row * 6 + byte + i / 8];
        CHECK((code >> (7 - i % 8) & 1) == (expected > 0));
      }
      before += k;
      byte += (k + 7) / 8;
    }
    // y . (g - y (y . g)) = 0 for g = y
    for (int64_t i = 0; i < dim; ++i) CHECK_NEAR(grad_x[row * dim + i], 0, 64 * unit);
  }
}

// Attention pooling of one query against the definition, and a tile of vocabulary maxima.
template <class T>
void check_attention_and_vocab(double unit) {
  using A = emblas::Accumulator<T>;
  const std::vector<int32_t> cu_seqlens{0, 0, 11, 12, 29};
  const int64_t batch = 4, tokens = 29;
  for (int64_t dim : {1, 7, 37}) {
    std::vector<T> x(tokens * dim), grad_x(tokens * dim);
    fill(x, 7);
    const auto query = native::random_values<A>(dim, 8),
               grad = native::random_values<A>(batch * dim, 9);
    std::vector<A> out(batch * dim), lse(batch), grad_query(batch * dim), best(batch * dim);
    std::vector<A> scratch(emblas::kAttentionBlock * dim);
    std::vector<int32_t> argmax(batch * dim, -1);
    emblas::Segments<T> segments{};
    segments.x = x.data();
    segments.dim = segments.row_stride = dim;
    segments.begins = cu_seqlens.data();
    segments.ends = cu_seqlens.data() + 1;
    const emblas::AttentionPoolArgs<T> args{segments, query.data(), 1,          A(0.5),
                                            batch,    tokens,       out.data(), lse.data()};
    const auto& kernel = emblas::kernels<emblas::AttentionPoolKernels>().of(T{});
    kernel.forward(args, 0, batch, scratch.data());
    kernel.backward({args, grad.data(), grad_x.data(), grad_query.data()}, 0, batch,
                    scratch.data());
    for (A& value : best) value = -std::numeric_limits<A>::infinity();
    for (int64_t first : {0, 16}) {  // two tiles of tokens, the vectors as their logits
      const int64_t last = first == 0 ? 16 : tokens;
      const emblas::VocabTile<T> tile{
          x.data() + first * dim, dim, first, last, segments, batch, best.data(),
          argmax.data(),          dim};
      emblas::kernels<emblas::VocabPoolKernels>().of(T{}).fold(tile, 0, dim, scratch.data());
    }
    for (int64_t b = 0; b < batch; ++b) {
      double total = 0, along = 0;
      std::vector<double> share(tokens), pooled(dim);
      for (int64_t t = cu_seqlens[b]; t < cu_seqlens[b + 1]; ++t) {
        double score = 0;
        for (int64_t i = 0; i < dim; ++i) score += query[i] * to_double(x[t * dim + i]);
        total += share[t] = std::exp(score / 2);
      }
      for (int64_t i = 0; i < dim; ++i) {
        double largest = -INFINITY;
        for (int64_t t = cu_seqlens[b]; t < cu_seqlens[b + 1]; ++t) {
          const double value = to_double(x[t * dim + i]);
          pooled[i] += share[t] / total * value;
          if (value > largest) largest = value;
        }
        CHECK_NEAR(out[b * dim + i], pooled[i], 64 * unit);
        if (total > 0) CHECK_NEAR(best[b * dim + i], largest, unit);
        CHECK((argmax[b * dim + i] < 0) == (total == 0));
        along += pooled[i] * grad[b * dim + i];
      }
      for (int64_t t = cu_seqlens[b]; t < cu_seqlens[b + 1]; ++t) {
        double slope = -along;
        for (int64_t i = 0; i < dim; ++i) slope += grad[b * dim + i] * to_double(x[t * dim + i]);
        for (int64_t i = 0; i < dim; ++i) {
          const double expected = share[t] / total * (grad[b * dim + i] + slope / 2 * query[i]);
          CHECK_NEAR(to_double(grad_x[t * dim + i]), expected,
                     (sizeof(T) == 2 ? 1e-2 : 256 * unit) * (1 + std::fabs(expected)));
        }
      }
    }
  }
}

}  // namespace

NATIVE_TEST(attention_and_vocab_float32) { check_attention_and_vocab<float>(1e-6); }
NATIVE_TEST(attention_and_vocab_float64) { check_attention_and_vocab<double>(1e-14); }
NATIVE_TEST(attention_and_vocab_bfloat16) { check_attention_and_vocab<emblas::bfloat16>(1e-6); }
NATIVE_TEST(attention_and_vocab_float16) { check_attention_and_vocab<emblas::float16>(1e-6); }

// The known answers of Random123 (kat_vectors).
NATIVE_TEST(philox) {
  const auto zero = emblas::philox4x32({{0, 0, 0, 0}}, 0);
  CHECK(zero.word[0] == 0x6627e8d5 && zero.word[1] == 0xe169c58d && zero.word[2] == 0xbc57ac4c &&
        zero.word[3] == 0x9b00dbd8);
  const auto pi =
      emblas::philox4x32({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, 0x299f31d0a4093822);
  CHECK(pi.word[0] == 0xd16cfe09 && pi.word[1] == 0x94fdcceb && pi.word[2] == 0x5001e420 &&
        pi.word[3] == 0x24126ea1);
}
NATIVE_TEST(pool_modes_float32) { check_modes<float>(); }
NATIVE_TEST(pool_modes_float64) { check_modes<double>(); }
NATIVE_TEST(pool_modes_bfloat16) { check_modes<emblas::bfloat16>(); }
NATIVE_TEST(pool_modes_float16) { check_modes<emblas::float16>(); }
NATIVE_TEST(two_modes_float32) { check_two_modes<float>(1e-7); }
NATIVE_TEST(two_modes_float64) { check_two_modes<double>(1e-15); }
NATIVE_TEST(two_modes_bfloat16) { check_two_modes<emblas::bfloat16>(4e-3); }
NATIVE_TEST(two_modes_float16) { check_two_modes<emblas::float16>(5e-4); }
NATIVE_TEST(finish_float32) { check_finish<float>(1e-6); }
NATIVE_TEST(finish_float64) { check_finish<double>(1e-14); }
NATIVE_TEST(segment_pool_float32) { check_forward_and_backward<float>(1e-7); }
NATIVE_TEST(segment_pool_float64) { check_forward_and_backward<double>(1e-15); }
NATIVE_TEST(segment_pool_bfloat16) { check_forward_and_backward<emblas::bfloat16>(4e-3); }
NATIVE_TEST(segment_pool_float16) { check_forward_and_backward<emblas::float16>(5e-4); }
