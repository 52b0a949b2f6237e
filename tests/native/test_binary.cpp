#include <algorithm>

#include "binary/search.h"
#include "native.h"

namespace {

int distance(const uint8_t* a, const uint8_t* b, int64_t bytes) {
  int bits = 0;
  for (int64_t i = 0; i < bytes; ++i) bits += __builtin_popcount(a[i] ^ b[i]);
  return bits;
}

void check_search(int64_t queries, int64_t rows, int64_t bytes, int64_t k) {
  const auto query_codes = native::random_bits<uint8_t>(queries * bytes, 1);
  const auto codes = native::random_bits<uint8_t>(rows * bytes, 2);
  std::vector<int32_t> distances(queries * k);
  std::vector<int64_t> ids(queries * k);
  const emblas::HammingTopk args{
      query_codes.data(), bytes,     queries, codes.data(), bytes, rows, bytes, k,
      distances.data(),   ids.data()};
  emblas::hamming_topk(args, [](int64_t count, int64_t, const auto& body) {
    body(0, count / 3);
    body(count / 3, count);
  });
  for (int64_t q = 0; q < queries; ++q) {
    std::vector<std::pair<int, int64_t>> all;
    for (int64_t r = 0; r < rows; ++r) {
      all.emplace_back(distance(&query_codes[q * bytes], &codes[r * bytes], bytes), r);
    }
    std::sort(all.begin(), all.end());
    for (int64_t i = 0; i < std::min(k, rows); ++i) {
      CHECK(distances[q * k + i] == all[i].first);
      CHECK(ids[q * k + i] == all[i].second);
    }
    for (int64_t i = rows; i < k; ++i) CHECK(ids[q * k + i] == -1);
  }
}

}  // namespace

NATIVE_TEST(hamming_topk) {
  for (int64_t bytes : {1, 7, 8, 33, 48, 300}) {
    check_search(1, 211, bytes, 5);
    check_search(6, 97, bytes, 120);
  }
}

NATIVE_TEST(pack_sign_float32) {
  for (int64_t dim : {1, 8, 63, 64, 200}) {
    const auto x = native::random_values<float>(3 * dim, 1);
    const auto threshold = native::random_values<float>(dim, 2);
    for (const float* limits : {(const float*)nullptr, threshold.data()}) {
      std::vector<uint8_t> codes(3 * ((dim + 7) / 8));
      emblas::kernels<emblas::PackSignKernels>().of(float{}).pack(x.data(), dim, limits, dim, 0, 3,
                                                                  codes.data());
      for (int64_t r = 0; r < 3; ++r) {
        for (int64_t i = 0; i < dim; ++i) {
          const int bit = codes[r * ((dim + 7) / 8) + i / 8] >> (7 - i % 8) & 1;
          CHECK(bit == (x[r * dim + i] > (limits ? limits[i] : 0)));
        }
      }
    }
  }
}

NATIVE_TEST(hadamard_rotate_float64) {
  for (int64_t dim : {1, 2, 5, 16, 100, 384}) {
    const auto x = native::random_values<double>(2 * dim, 1);
    const auto noise = native::random_values<double>(4 * dim, 2);
    std::vector<int8_t> signs(4 * dim);
    for (int64_t i = 0; i < 4 * dim; ++i) signs[i] = noise[i] > 0 ? 1 : -1;
    std::vector<double> rotated(2 * dim), back(2 * dim), buffer(dim);
    const auto rotate = emblas::kernels<emblas::HadamardRotateKernels>().of(double{}).rotate;
    rotate({x.data(), dim, dim, signs.data(), 4, false, rotated.data()}, 0, 2, buffer.data());
    rotate({rotated.data(), dim, dim, signs.data(), 4, true, back.data()}, 0, 2, buffer.data());
    double before = 0, after = 0;
    for (int64_t i = 0; i < 2 * dim; ++i) {
      CHECK_NEAR(back[i], x[i], 1e-12);
      before += x[i] * x[i];
      after += rotated[i] * rotated[i];
    }
    CHECK_NEAR(after, before, 1e-9);
  }
}
