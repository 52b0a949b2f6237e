#include "attention/attention.h"
#include "attention/attention_rows.h"
#include "attention/rotary.h"
#include "common/isa.h"
#include "native.h"

namespace {

template <class T>
T* aligned(std::vector<T>& memory) {
  T* data = memory.data();
  while (reinterpret_cast<uintptr_t>(data) % 64) ++data;
  return data;
}

// Forward and backward beside the definition; grouped heads, values of another width.
template <class T>
void check_attention(int64_t dim, int64_t value_dim, int64_t window, double limit) {
  const std::vector<int32_t> cu_seqlens{0, 0, 3, 4, 75};
  const int64_t batch = 4, tokens = 75, heads = 2;
  const auto q = native::random_values<T>(tokens * heads * dim, 1);
  const auto k = native::random_values<T>(tokens * dim, 2);
  const auto v = native::random_values<T>(tokens * value_dim, 3);
  const auto grad_out = native::random_values<T>(tokens * heads * value_dim, 4);
  const auto grad_lse = native::random_values<T>(heads * tokens, 5);
  std::vector<T> out(grad_out.size()), lse(heads * tokens), grad_q(q.size()), grad_k(k.size()),
      grad_v(v.size());
  const T scale = T(1 / std::sqrt(double(dim)));
  const emblas::VarlenAttentionBackwardArgs<T> args{
      .forward = {.q = {q.data(), heads * dim, dim},
                  .k = {k.data(), dim, dim},
                  .v = {v.data(), value_dim, value_dim},
                  .out = {out.data(), heads * value_dim, value_dim},
                  .lse = lse.data(),
                  .lse_stride = tokens,
                  .heads = heads,
                  .heads_per_group = heads,
                  .head_dim = dim,
                  .value_dim = value_dim,
                  .cu_seqlens_q = cu_seqlens.data(),
                  .cu_seqlens_k = cu_seqlens.data(),
                  .scale = scale,
                  .window_left = window,
                  .window_right = window},
      .grad_out = {grad_out.data(), heads * value_dim, value_dim},
      .grad_lse = grad_lse.data(),
      .grad_q = {grad_q.data(), heads * dim, dim},
      .grad_k = {grad_k.data(), dim, dim},
      .grad_v = {grad_v.data(), value_dim, value_dim}};
  const auto& forward = emblas::kernels<emblas::AttentionKernels>().of(T{});
  const auto& backward = emblas::kernels<emblas::AttentionBackwardKernels>().of(T{});
  std::vector<T> scratch(forward.scratch_size(args.forward, batch) +
                         backward.scratch_size(args, batch) + 64);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = cu_seqlens[b + 1] - cu_seqlens[b];
    forward.forward(args.forward, b, 0,
                    heads * ((length + forward.tile_queries - 1) / forward.tile_queries),
                    aligned(scratch));
    backward.backward(args, b, 0, 1, aligned(scratch));
  }

  std::vector<double> expected_q(q.size()), expected_k(k.size()), expected_v(v.size());
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t begin = cu_seqlens[b], end = cu_seqlens[b + 1];
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t h = 0; h < heads; ++h) {
        const T* const query = &q[(i * heads + h) * dim];
        const T* const gradient = &grad_out[(i * heads + h) * value_dim];
        std::vector<double> weight(tokens), expected(value_dim);
        double total = 0, along = -double(grad_lse[h * tokens + i]);
        for (int64_t j = begin; j < end; ++j) {
          if (window >= 0 && std::abs(i - j) > window) continue;
          double score = 0;
          for (int64_t c = 0; c < dim; ++c) score += double(query[c]) * k[j * dim + c];
          total += weight[j] = std::exp(score * scale);
        }
        for (int64_t j = begin; j < end; ++j) {
          weight[j] /= total;
          for (int64_t c = 0; c < value_dim; ++c) expected[c] += weight[j] * v[j * value_dim + c];
        }
        for (int64_t c = 0; c < value_dim; ++c) {
          CHECK_NEAR(out[(i * heads + h) * value_dim + c], expected[c], limit);
          along += expected[c] * gradient[c];
        }
        CHECK_NEAR(lse[h * tokens + i], std::log(total), limit);
        for (int64_t j = begin; j < end; ++j) {
          double ds = -along;
          for (int64_t c = 0; c < value_dim; ++c) {
            ds += double(gradient[c]) * v[j * value_dim + c];
            expected_v[j * value_dim + c] += weight[j] * gradient[c];
          }
          ds *= weight[j] * scale;
          for (int64_t c = 0; c < dim; ++c) {
            expected_q[(i * heads + h) * dim + c] += ds * k[j * dim + c];
            expected_k[j * dim + c] += ds * query[c];
          }
        }
      }
    }
  }
  for (size_t i = 0; i < q.size(); ++i) CHECK_NEAR(grad_q[i], expected_q[i], 8 * limit);
  for (size_t i = 0; i < k.size(); ++i) CHECK_NEAR(grad_k[i], expected_k[i], 8 * limit);
  for (size_t i = 0; i < v.size(); ++i) CHECK_NEAR(grad_v[i], expected_v[i], 8 * limit);
}

// Masks, biases and softcap stay in bounds at the edges of blocks and tiles; what they compute is
// checked from Python.
template <class T>
void check_shaped(int64_t queries, int64_t keys) {
  constexpr int64_t dim = 9, radius = 3;
  const std::vector<int32_t> cu_q{0, int32_t(queries)}, cu_k{0, int32_t(keys)};
  const auto q = native::random_values<T>(queries * dim, 1),
             k = native::random_values<T>(keys * dim, 2);
  const auto table = native::random_values<T>(2 * radius + 1, 3);
  std::vector<T> out(queries * dim), lse(queries), grad_q(q.size()), grad_k(k.size()),
      grad_v(k.size()), sums(queries + keys);
  std::vector<int32_t> ids(keys);
  for (int64_t j = 0; j < keys; ++j) ids[j] = int32_t(j / 7 % 3) - 1;
  const std::vector<int32_t> prefix{5};
  // Two distances to a run, both tables and a bias for each pair.
  constexpr int64_t stride = emblas::kPositionPadding, runs = 4;
  const std::vector<int32_t> run{0, 0, 1, 1, 2, 2, 3};
  auto table_of = [](int seed) {
    auto vectors = native::random_values<T>(runs * stride, seed);
    for (int64_t i = 0; i < runs * stride; ++i) {
      if (i % stride >= dim) vectors[i] = 0;
    }
    return vectors;
  };
  const auto position_keys = table_of(4), position_queries = table_of(5);
  const auto pair_bias = native::random_values<T>(queries * keys, 6);
  std::vector<T> key_sums((queries + keys) * stride), query_sums(key_sums.size()),
      grad_pairs(pair_bias.size());
  const std::vector<int64_t> starts{0, queries * keys}, seeds{-7};
  const T slope = T(0.25);
  const emblas::VarlenAttentionBackwardArgs<T> args{
      .forward = {.q = {q.data(), dim, dim},
                  .k = {k.data(), dim, dim},
                  .v = {k.data(), dim, dim},
                  .out = {out.data(), dim, dim},
                  .lse = lse.data(),
                  .lse_stride = queries,
                  .heads = 1,
                  .heads_per_group = 1,
                  .head_dim = dim,
                  .value_dim = dim,
                  .cu_seqlens_q = cu_q.data(),
                  .cu_seqlens_k = cu_k.data(),
                  .scale = T(0.3),
                  .window_left = 40,
                  .window_right = 0,
                  .scores = {.softcap = T(2),
                             .alibi_slopes = &slope,
                             .alibi_stride = 0,
                             .distance_bias = table.data(),
                             .distance_radius = radius,
                             .prefix_len = prefix.data(),
                             .branch = ids.data(),
                             .block_ids = ids.data(),
                             .positions = {.keys = position_keys.data(),
                                           .queries = position_queries.data(),
                                           .run = run.data(),
                                           .radius = radius,
                                           .runs = runs,
                                           .stride = stride},
                             .pair_bias = {.data = pair_bias.data(),
                                           .starts = starts.data(),
                                           .head_stride = 0,
                                           .query_stride = -1},
                             .dropout = {.seeds = seeds.data(),
                                         .threshold = uint32_t(1) << 30,
                                         .factor = T(4) / 3}}},
      .grad_out = {q.data(), dim, dim},
      .grad_lse = nullptr,
      .grad_q = {grad_q.data(), dim, dim},
      .grad_k = {grad_k.data(), dim, dim},
      .grad_v = {grad_v.data(), dim, dim},
      .distance_sums = sums.data(),
      .distance_sums_stride = queries + keys,
      .position_key_sums = key_sums.data(),
      .position_query_sums = query_sums.data(),
      .position_sums_stride = (queries + keys) * stride,
      .grad_pair_bias = {.data = grad_pairs.data(),
                         .starts = starts.data(),
                         .head_stride = 0,
                         .query_stride = -1}};
  const auto& forward = emblas::kernels<emblas::AttentionKernels>().of(T{});
  const auto& backward = emblas::kernels<emblas::AttentionBackwardKernels>().of(T{});
  std::vector<T> scratch(forward.scratch_size(args.forward, 1) + backward.scratch_size(args, 1) +
                         64);
  forward.forward(args.forward, 0, 0, (queries + forward.tile_queries - 1) / forward.tile_queries,
                  aligned(scratch));
  backward.backward(args, 0, 0, 1, aligned(scratch));
  double total = 0;  // a softmax doesn't change when all its scores do
  for (const T sum : sums) total += sum;
  CHECK_NEAR(total, 0, 1e-4);
  for (const T grad : grad_pairs) total += grad;
  CHECK_NEAR(total, 0, 1e-4);
}

// Both kinds of pairs beside the definition, and back again in place.
template <class T>
void check_rotary(int64_t dim, int64_t pairs, double limit) {
  constexpr int64_t tokens = 3, heads = 2, rows = 5;
  const auto x = native::random_values<T>(tokens * heads * dim, 1);
  const auto cos = native::random_values<T>(rows * pairs, 2),
             sin = native::random_values<T>(rows * pairs, 3);
  const std::vector<int64_t> position_ids{4, 0, 3};
  const auto& kernel = emblas::kernels<emblas::RotaryKernels>().of(T{});
  std::vector<T> scratch(4 * pairs);
  for (const bool interleaved : {false, true}) {
    std::vector<T> out(x.size());
    emblas::RotaryArgs<T> args{.x = {x.data(), heads * dim, dim},
                               .out = {out.data(), heads * dim, dim},
                               .heads = heads,
                               .head_dim = dim,
                               .pairs = pairs,
                               .cos = cos.data(),
                               .sin = sin.data(),
                               .position_ids = position_ids.data(),
                               .inverse = false};
    const auto run = [&] {
      if (interleaved) {
        kernel.interleaved(args, 0, tokens, scratch.data());
      } else {
        kernel.halves(args, 0, tokens);
      }
    };
    run();
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t at = (t * heads + h) * dim;
        const T *from = x.data() + at, *to = out.data() + at;
        for (int64_t i = 0; i < pairs; ++i) {
          const int64_t a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : pairs + i;
          const double c = cos[position_ids[t] * pairs + i], s = sin[position_ids[t] * pairs + i];
          CHECK_NEAR(to[a], c * from[a] - s * from[b], limit);
          CHECK_NEAR(to[b], c * from[b] + s * from[a], limit);
        }
        for (int64_t i = 2 * pairs; i < dim; ++i) CHECK(to[i] == from[i]);
      }
    }
    args.x = {out.data(), heads * dim, dim};
    args.inverse = true;
    run();
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t i = 0; i < pairs; ++i) {
        const int64_t a = t * heads * dim + (interleaved ? 2 * i : i);
        const double c = cos[position_ids[t] * pairs + i], s = sin[position_ids[t] * pairs + i];
        CHECK_NEAR(out[a], (c * c + s * s) * x[a], 20 * limit);
      }
    }
  }
}

// Products of chosen rows beside the definition: an empty row, and rows that meet the same tokens.
template <class T>
void check_rows(int64_t dim, double limit) {
  constexpr int64_t tokens = 9, heads = 4, key_heads = 2, rows = 4, longest = 6;
  const std::vector<int64_t> starts{2, 0, 2, 8}, lengths{6, 0, 3, 1};
  const auto x = native::random_values<T>(rows * heads * dim, 1),
             y = native::random_values<T>(tokens * key_heads * dim, 2),
             s = native::random_values<T>(rows * heads * longest, 3);
  const emblas::RowsShape shape{.heads = heads,
                                .heads_per_group = heads / key_heads,
                                .dim = dim,
                                .max_length = longest,
                                .starts = starts.data(),
                                .lengths = lengths.data()};
  const auto& kernel = emblas::kernels<emblas::AttentionRowsKernels>().of(T{});
  const emblas::HeadVectors<const T> x_vectors{x.data(), heads * dim, dim},
      y_vectors{y.data(), key_heads * dim, dim};
  std::vector<T> dots(s.size(), T(7)), sums(x.size()), outer(y.size()), scratch(heads * dim);
  kernel.dots(shape, x_vectors, y_vectors, dots.data(), 0, rows);
  kernel.sums(shape, s.data(), y_vectors, {sums.data(), heads * dim, dim}, 0, rows, scratch.data());
  kernel.outer(shape, s.data(), x_vectors, rows, {outer.data(), key_heads * dim, dim}, 0, 1);
  kernel.outer(shape, s.data(), x_vectors, rows, {outer.data(), key_heads * dim, dim}, 1, 2);
  std::vector<double> expected_sums(x.size()), expected_outer(y.size());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t j = 0; j < longest; ++j) {
        const int64_t at = (r * heads + h) * longest + j;
        double dot = 0;
        for (int64_t i = 0; i < dim && j < lengths[r]; ++i) {
          const int64_t left = (r * heads + h) * dim + i;
          const int64_t right = ((starts[r] + j) * key_heads + h / 2) * dim + i;
          dot += double(x[left]) * y[right];
          expected_sums[left] += double(s[at]) * y[right];
          expected_outer[right] += double(s[at]) * x[left];
        }
        CHECK_NEAR(dots[at], dot, limit);
      }
    }
  }
  for (size_t i = 0; i < sums.size(); ++i) CHECK_NEAR(sums[i], expected_sums[i], limit);
  for (size_t i = 0; i < outer.size(); ++i) CHECK_NEAR(outer[i], expected_outer[i], limit);
}

}  // namespace

NATIVE_TEST(rotary) {
  for (int64_t pairs : {0, 1, 5, 16, 20}) {
    check_rotary<float>(2 * pairs + 3, pairs, 1e-5);
    check_rotary<double>(2 * pairs, pairs, 1e-13);
  }
}
NATIVE_TEST(attention_rows) {
  for (int64_t dim : {1, 16, 23, 80}) {
    check_rows<float>(dim, 1e-4);
    check_rows<double>(dim, 1e-12);
  }
}
NATIVE_TEST(varlen_attention_shaped) {
  for (int64_t queries : {1, 15, 48, 97}) {
    for (int64_t keys : {1, 63, 64, 65, 130}) {
      check_shaped<float>(queries, keys);
      check_shaped<double>(queries, keys);
    }
  }
}
NATIVE_TEST(varlen_attention_float32) {
  for (int64_t dim : {1, 16, 24, 32, 128}) {
    check_attention<float>(dim, dim, -1, 1e-5);
    check_attention<float>(dim, 20, 4, 1e-5);
  }
}
NATIVE_TEST(varlen_attention_float64) { check_attention<double>(40, 40, -1, 1e-13); }
