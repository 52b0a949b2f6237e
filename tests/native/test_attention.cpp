#include "attention/attention.h"
#include "common/isa.h"
#include "native.h"

namespace {

template <class T>
void check_attention(int64_t dim, int64_t window, double limit) {
  const std::vector<int32_t> cu_seqlens{0, 0, 3, 4, 75};
  const int64_t batch = 4, tokens = 75, heads = 2, size = tokens * heads * dim;
  const auto q = native::random_values<T>(size, 1), k = native::random_values<T>(size, 2),
             v = native::random_values<T>(size, 3);
  std::vector<T> out(size), lse(heads * tokens);
  const T scale = T(1 / std::sqrt(double(dim)));
  const int64_t row = heads * dim;
  const emblas::VarlenAttentionArgs<T> args{{q.data(), row, dim},
                                            {k.data(), row, dim},
                                            {v.data(), row, dim},
                                            {out.data(), row, dim},
                                            lse.data(),
                                            tokens,
                                            heads,
                                            1,
                                            dim,
                                            cu_seqlens.data(),
                                            cu_seqlens.data(),
                                            scale,
                                            window,
                                            window};
  const auto& kernel = emblas::kernels<emblas::AttentionKernels>().of(T{});
  std::vector<T> scratch(kernel.scratch_size + 64);
  T* aligned = scratch.data();
  while (reinterpret_cast<uintptr_t>(aligned) % 64) ++aligned;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = cu_seqlens[b + 1] - cu_seqlens[b];
    kernel.forward(args, b, 0, heads * ((length + kernel.tile_queries - 1) / kernel.tile_queries),
                   aligned);
  }
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t begin = cu_seqlens[b], end = cu_seqlens[b + 1];
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t h = 0; h < heads; ++h) {
        std::vector<double> expected(dim);
        double total = 0;
        for (int64_t j = begin; j < end; ++j) {
          if (window >= 0 && std::abs(i - j) > window) continue;
          double score = 0;
          for (int64_t c = 0; c < dim; ++c) {
            score += double(q[i * row + h * dim + c]) * k[j * row + h * dim + c];
          }
          const double weight = std::exp(score * scale);
          total += weight;
          for (int64_t c = 0; c < dim; ++c) expected[c] += weight * v[j * row + h * dim + c];
        }
        for (int64_t c = 0; c < dim; ++c) {
          CHECK_NEAR(out[i * row + h * dim + c], expected[c] / total, limit);
        }
        CHECK_NEAR(lse[h * tokens + i], std::log(total), limit);
      }
    }
  }
}

}  // namespace

NATIVE_TEST(varlen_attention_float32) {
  for (int64_t dim : {16, 24, 32, 128}) {
    check_attention<float>(dim, -1, 1e-5);
    check_attention<float>(dim, 4, 1e-5);
  }
}
NATIVE_TEST(varlen_attention_float64) { check_attention<double>(40, -1, 1e-13); }
