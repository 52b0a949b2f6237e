#include <algorithm>
#include <bit>

#include "binary/binary.h"
#include "binary/dense.h"
#include "binary/scores.h"
#include "binary/search.h"
#include "native.h"

namespace {

int distance(const uint8_t* a, const uint8_t* b, int64_t bytes) {
  int bits = 0;
  for (int64_t i = 0; i < bytes; ++i) bits += __builtin_popcount(a[i] ^ b[i]);
  return bits;
}

constexpr auto kTwoParts = [](int64_t count, int64_t, const auto& body) {
  body(0, count / 3);
  body(count / 3, count);
};

void check_search(int64_t queries, int64_t rows, int64_t bytes, int64_t k) {
  const auto query_codes = native::random_bits<uint8_t>(queries * bytes, 1);
  auto codes = native::random_bits<uint8_t>(rows * bytes, 2);
  for (int64_t i = 0; i < bytes; ++i) {  // the nearest and the farthest that a code can be
    codes[i] = query_codes[i];
    codes[(rows - 1) * bytes + i] = uint8_t(~query_codes[i]);
  }
  std::vector<int32_t> distances(queries * k);
  std::vector<int64_t> ids(queries * k);
  const emblas::Codes wanted{query_codes.data(), bytes, queries, bytes};
  const emblas::Codes documents{codes.data(), bytes, rows, bytes};
  const auto found = emblas::search(emblas::HammingScan(wanted, k), documents, {}, kTwoParts);
  emblas::write_topk<emblas::HammingScan>(found, k, 0, distances.data(), ids.data());
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

double value_of(const uint8_t* code, int64_t dim, int64_t planes, int64_t i) {
  double value = 0;
  for (int64_t t = 0; t < planes; ++t) {
    const int bit = code[t * ((dim + 7) / 8) + i / 8] >> (7 - i % 8) & 1;
    value += std::ldexp(bit ? 1.0 : -1.0, -int(t));
  }
  return value;
}

void check_scores(int64_t queries, int64_t rows, int64_t dim, int64_t planes, int64_t k) {
  const int64_t bytes = planes * ((dim + 7) / 8);
  std::vector<float> wanted(queries * dim);
  for (float& x : wanted) x = float(&x - wanted.data()) - 7 * float((&x - wanted.data()) % 31);
  const auto codes = native::random_bits<uint8_t>(rows * bytes, 2);
  std::vector<float> scores(queries * k);
  std::vector<int64_t> ids(queries * k);
  const emblas::ScoreScan scan(wanted.data(), dim, queries, dim, bytes, k);
  const auto found = emblas::search(scan, {codes.data(), bytes, rows, bytes}, {}, kTwoParts);
  emblas::write_topk<emblas::ScoreKey>(found, k, 0.0f, scores.data(), ids.data());
  for (int64_t q = 0; q < queries; ++q) {
    std::vector<std::pair<float, int64_t>> all;
    for (int64_t r = 0; r < rows; ++r) {
      double score = 0;
      for (int64_t i = 0; i < dim; ++i) {
        score += double(wanted[q * dim + i]) * value_of(&codes[r * bytes], dim, planes, i);
      }
      all.emplace_back(-float(score), r);
    }
    std::sort(all.begin(), all.end());
    for (int64_t i = 0; i < std::min(k, rows); ++i) {
      CHECK(scores[q * k + i] == -all[i].first);
      CHECK(ids[q * k + i] == all[i].second);
    }
  }
}

}  // namespace

NATIVE_TEST(asymmetric_topk) {
  for (int64_t planes : {1, 2, 4}) {
    for (int64_t dim : {70, 256, 384, 512, 1024}) check_scores(1, 211, dim, planes, 5);
    check_scores(6, 300, 33, planes, 20);
    check_scores(5, 150, 800, planes, 3);
  }
}

NATIVE_TEST(range_search_with_filters) {
  const int64_t bytes = 3, rows = 700, queries = 5, radius = 9;
  const auto wanted = native::random_bits<uint8_t>(queries * bytes, 1);
  const auto codes = native::random_bits<uint8_t>(rows * bytes, 2);
  const int64_t width = (rows + 7) / 8;
  for (int selective : {0, 1}) {
    auto bitmaps = native::random_bits<uint8_t>(queries * width, 3);
    if (selective) {
      for (uint8_t& byte : bitmaps) byte &= 1;
    }
    for (int64_t stride : {int64_t(0), width}) {
      emblas::SearchOptions options;
      options.filter.bitmaps = bitmaps.data();
      options.filter.bitmap_stride = stride;
      const emblas::HammingScan scan({wanted.data(), bytes, queries, bytes}, emblas::kKeepAll,
                                     radius);
      const auto found =
          emblas::search(scan, {codes.data(), bytes, rows, bytes}, options, kTwoParts);
      for (int64_t q = 0; q < queries; ++q) {
        size_t count = 0;
        for (int64_t r = 0; r < rows; ++r) {
          const bool allowed = bitmaps[q * stride + r / 8] >> (7 - r % 8) & 1;
          count += allowed && distance(&wanted[q * bytes], &codes[r * bytes], bytes) <= radius;
        }
        CHECK(found[q].keys.size() == count);
      }
    }
  }
}

NATIVE_TEST(dense_search_and_maxsim) {
  const int64_t queries = 6, rows = 301, dim = 37, k = 9;
  const auto wanted = native::random_values<float>(queries * dim, 1);
  const auto random = native::random_values<float>(rows * dim, 2);
  std::vector<int8_t> bytes(rows * dim);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = int8_t(random[i] * 30);
  const auto found =
      emblas::dense_search<int8_t>({wanted.data(), dim, queries}, {bytes.data(), dim, rows, dim}, k,
                                   emblas::Metric::dot, {}, kTwoParts);
  std::vector<float> scores(queries * k);
  std::vector<int64_t> ids(queries * k);
  emblas::write_topk<emblas::ScoreKey>(found, k, 0.0f, scores.data(), ids.data());
  const auto dot = [&](int64_t q, int64_t r, const auto* data) {
    double total = 0;
    for (int64_t i = 0; i < dim; ++i) {
      total += double(wanted[q * dim + i]) * double(data[r * dim + i]);
    }
    return total;
  };
  for (int64_t q = 0; q < queries; ++q) {
    int64_t better = 0;
    for (int64_t r = 0; r < rows; ++r) better += dot(q, r, bytes.data()) > scores[q * k + k - 1];
    CHECK(better == k - 1 || better == k);  // the k-th itself may round down
    for (int64_t i = 0; i < k; ++i) {
      CHECK_NEAR(scores[q * k + i], dot(q, ids[q * k + i], bytes.data()), 1e-3);
    }
  }
  // The same vectors as tokens: two queries of 2 and 4 tokens, documents of 1, 0 and 300.
  const std::vector<int32_t> query_offsets{0, 2, 6}, offsets{0, 1, 1, 301};
  std::vector<float> totals(2 * 3);
  std::vector<int32_t> argmax(queries * 3);
  const emblas::MaxSimArgs<float> args{
      wanted.data(), query_offsets.data(), 2, queries,       dim,          random.data(),
      dim,           offsets.data(),       3, totals.data(), argmax.data()};
  emblas::MaxSimQueries<float>(args).run(0, 3);
  for (int b = 0; b < 2; ++b) {
    for (int n = 0; n < 3; ++n) {
      double total = 0;
      for (int i = query_offsets[b]; i < query_offsets[b + 1]; ++i) {
        double best = n == 1 ? 0 : -1e9;
        for (int r = offsets[n]; r < offsets[n + 1]; ++r) {
          best = std::max(best, dot(i, r, random.data()));
        }
        total += best;
        const int32_t j = argmax[i * 3 + n];
        CHECK(n == 1 ? j == -1 : j >= offsets[n] && j < offsets[n + 1]);
        if (j >= 0) CHECK_NEAR(dot(i, j, random.data()), best, 1e-4);
      }
      CHECK_NEAR(totals[b * 3 + n], total, 1e-3);
    }
  }
}

namespace {

double value_of(const uint8_t* code, int64_t dim, int64_t i) { return value_of(code, dim, 1, i); }
double value_of(const float* token, int64_t, int64_t i) { return double(token[i]); }
double value_of(const double* token, int64_t, int64_t i) { return token[i]; }

// Scores and places of documents of 1, 0, 2, 61 and 150 tokens against the largest products.
template <class Query, class Token, class Score, class Run>
void check_maxsim(const Query* queries, int64_t query_stride, const std::vector<int32_t>& sets,
                  const Token* tokens, int64_t stride, int64_t dim, const Run& run) {
  const std::vector<int32_t> offsets{0, 1, 1, 3, 64, 214};
  const int64_t documents = 5, total = sets.back();
  for (bool places : {false, true}) {
    std::vector<Score> scores((sets.size() - 1) * documents, -1);
    std::vector<int32_t> argmax(total * documents, -2);
    run(offsets, scores.data(), places ? argmax.data() : nullptr);
    for (size_t b = 0; b + 1 < sets.size(); ++b) {
      for (int64_t n = 0; n < documents; ++n) {
        double sum = 0;
        for (int64_t i = sets[b]; i < sets[b + 1]; ++i) {
          double best = offsets[n] == offsets[n + 1] ? 0 : -1e9;
          std::vector<double> products;
          for (int64_t j = offsets[n]; j < offsets[n + 1]; ++j) {
            double product = 0;
            for (int64_t c = 0; c < dim; ++c) {
              product += value_of(queries + i * query_stride, dim, c) *
                         value_of(tokens + j * stride, dim, c);
            }
            products.push_back(product);
            best = std::max(best, product);
          }
          sum += best;
          if (!places) continue;
          const int32_t at = argmax[i * documents + n];
          CHECK(products.empty() ? at == -1 : at >= offsets[n] && at < offsets[n + 1]);
          if (at >= 0) CHECK_NEAR(products[at - offsets[n]], best, 1e-4);
        }
        CHECK_NEAR(scores[b * documents + n], sum, 1e-3);
      }
    }
  }
}

}  // namespace

NATIVE_TEST(maxsim) {
  for (int64_t dim : {1, 7, 32, 67, 130}) {
    for (const std::vector<int32_t>& sets : {std::vector<int32_t>{0, 1}, {0, 3, 3, 19, 52}}) {
      const int64_t total = sets.back(), count = int64_t(sets.size()) - 1, bytes = (dim + 7) / 8;
      const auto run = [&](const auto* queries, const auto* tokens, int64_t stride) {
        return [=, &sets](const std::vector<int32_t>& offsets, auto* scores, int32_t* argmax) {
          using T = std::decay_t<decltype(*tokens)>;
          const emblas::MaxSimArgs<T> args{queries, sets.data(),    count, total,  dim,   tokens,
                                           stride,  offsets.data(), 5,     scores, argmax};
          const emblas::MaxSimQueries<T> packed(args);
          packed.run(0, 2);
          packed.run(2, 5);
        };
      };
      const auto queries = native::random_values<float>(total * dim, 1);
      const auto tokens = native::random_values<float>(213 * (dim + 3) + dim, 2);
      check_maxsim<float, float, float>(queries.data(), dim, sets, tokens.data(), dim + 3, dim,
                                        run(queries.data(), tokens.data(), dim + 3));
      const auto wide_queries = native::random_values<double>(total * dim, 3);
      const auto wide = native::random_values<double>(214 * dim, 4);
      check_maxsim<double, double, double>(wide_queries.data(), dim, sets, wide.data(), dim, dim,
                                           run(wide_queries.data(), wide.data(), dim));
      const auto codes = native::random_bits<uint8_t>(214 * bytes, 5);
      check_maxsim<float, uint8_t, float>(queries.data(), dim, sets, codes.data(), bytes, dim,
                                          run(queries.data(), codes.data(), bytes));
      auto query_codes = native::random_bits<uint8_t>(total * bytes, 6);
      auto token_codes = codes;  // of which the bits after the last dimension are 0
      const auto clear = [&](std::vector<uint8_t>& all) {
        for (size_t at = size_t(bytes) - 1; dim % 8 && at < all.size(); at += size_t(bytes)) {
          all[at] = uint8_t(all[at] >> (8 - dim % 8) << (8 - dim % 8));
        }
      };
      clear(query_codes), clear(token_codes);
      const emblas::Codes left{query_codes.data(), bytes, total, bytes};
      const emblas::Codes right{token_codes.data(), bytes, 214, bytes};
      const emblas::MaxSimCodes both(left, right, dim);
      check_maxsim<uint8_t, uint8_t, float>(
          query_codes.data(), bytes, sets, token_codes.data(), bytes, dim,
          [&](const std::vector<int32_t>& offsets, float* scores, int32_t* argmax) {
            emblas::Tile tile = both.tile();
            emblas::maxsim_documents(sets.data(), count, total, offsets.data(), 5, 0, 5, scores,
                                     argmax,
                                     [&](int64_t begin, int64_t end, float* best, int32_t* where) {
                                       both.best(begin, end, tile, best, where);
                                     });
          });
    }
  }
}

NATIVE_TEST(hamming_distance) {
  for (int64_t bytes : {1, 16, 35}) {
    const int64_t rows = 200, queries = 7;
    const auto a = native::random_bits<uint8_t>(queries * bytes, 1);
    const auto b = native::random_bits<uint8_t>(rows * bytes, 2);
    std::vector<int32_t> out(queries * rows);
    const emblas::Codes left{a.data(), bytes, queries, bytes}, right{b.data(), bytes, rows, bytes};
    emblas::hamming_distances(left, right, 0, 77, out.data());
    emblas::hamming_distances(left, right, 77, rows, out.data());
    for (int64_t q = 0; q < queries; ++q) {
      for (int64_t r = 0; r < rows; ++r) {
        CHECK(out[q * rows + r] == distance(&a[q * bytes], &b[r * bytes], bytes));
      }
    }
  }
}

NATIVE_TEST(hamming_topk) {
  for (int64_t bytes : {1, 7, 8, 32, 33, 48, 64, 128, 300}) {
    check_search(1, 211, bytes, 5);
    check_search(6, 97, bytes, 120);
  }
}

double widened(double x) { return x; }
double widened(emblas::bfloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

template <class T>
void check_unpack(int64_t dim, int64_t planes) {
  const int64_t width = (dim + 7) / 8, stride = planes * width + 3;
  const auto codes = native::random_bits<uint8_t>(3 * stride, 1);
  std::vector<T> out(3 * dim);
  emblas::kernels<emblas::UnpackPlanesKernels>().of(T{}).unpack(
      {codes.data(), stride, 3, dim, planes, out.data()}, 0, 3);
  for (int64_t r = 0; r < 3; ++r) {
    for (int64_t i = 0; i < dim; ++i) {
      double value = 0;
      for (int64_t p = 0; p < planes; ++p) {
        const int bit = codes[r * stride + p * width + i / 8] >> (7 - i % 8) & 1;
        value += std::ldexp(2 * bit - 1, -int(p));
      }
      CHECK(widened(out[r * dim + i]) == value);
    }
  }
}

NATIVE_TEST(unpack_planes) {
  for (int64_t dim : {1, 8, 63, 64, 200}) {
    for (int64_t planes : {1, 2, 4}) {
      check_unpack<float>(dim, planes);
      check_unpack<double>(dim, planes);
      check_unpack<emblas::bfloat16>(dim, planes);
    }
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
