// Rearranging codes for the scan of scan.h: transposes of 16 bytes x 16 codes.
#pragma once

#include "binary/scan.h"
#include "common/simd.h"

namespace emblas {
namespace {

#if defined(EMBLAS_HAS_AVX2)
constexpr int kLaneGroups = 2;  // 16 codes in each half of a vector
#else
constexpr int kLaneGroups = 1;
#endif
typedef uint8_t Lanes __attribute__((vector_size(16 * kLaneGroups)));

// a0 b0 a1 b1 ... of the first, of the second half of each 16 bytes.
inline Lanes zip_low(Lanes a, Lanes b) {
#if defined(EMBLAS_HAS_AVX2)
  return (Lanes)_mm256_unpacklo_epi8((__m256i)a, (__m256i)b);
#else
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#endif
}
inline Lanes zip_high(Lanes a, Lanes b) {
#if defined(EMBLAS_HAS_AVX2)
  return (Lanes)_mm256_unpackhi_epi8((__m256i)a, (__m256i)b);
#else
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                 31);
#endif
}

// 16 bytes of each lane's code.
inline Lanes load_lanes(const uint8_t* first, [[maybe_unused]] const uint8_t* second) {
#if defined(EMBLAS_HAS_AVX2)
  return (Lanes)_mm256_inserti128_si256(
      _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)first)),
      _mm_loadu_si128((const __m128i*)second), 1);
#else
  Lanes out;
  std::memcpy(&out, first, 16);
  return out;
#endif
}

// 16 bytes of kStep codes, or the last `width` of them, to as many rows of the tile. from(i) points
// to those of the i-th code.
constexpr int64_t kStep = 16 * kLaneGroups;
template <bool whole, class From>
inline void transpose(const From& from, [[maybe_unused]] int64_t width, uint8_t* to) {
  Lanes a[16], b[16];
  for (int i = 0; i < 16; ++i) {
    if constexpr (whole) {
      a[i] = load_lanes(from(i), from(kStep - 16 + i));
    } else {
      uint8_t first[16], second[16];
      std::memcpy(first, from(i), size_t(width));
      std::memcpy(second, from(kStep - 16 + i), size_t(width));
      a[i] = load_lanes(first, second);
    }
  }
  // Each round interleaves vector i with vector i + 8; four of them are the transpose.
  const auto round = [](const Lanes(&in)[16], Lanes(&out)[16]) {
    for (int i = 0; i < 8; ++i) {
      out[2 * i] = zip_low(in[i], in[i + 8]);
      out[2 * i + 1] = zip_high(in[i], in[i + 8]);
    }
  };
  round(a, b);
  round(b, a);
  round(a, b);
  round(b, a);
  for (int i = 0; i < (whole ? 16 : width); ++i) std::memcpy(to + i * kBlock, &a[i], sizeof a[i]);
}
template <class CodeAt>
inline void transpose_codes(const CodeAt& code_at, int64_t bytes, uint8_t* to) {
  int64_t p = 0;
  const auto from = [&](int64_t i) { return code_at(i) + p; };
  for (; p + 16 <= bytes; p += 16) transpose<true>(from, 16, to + p * kBlock);
  if (p < bytes) transpose<false>(from, bytes - p, to + p * kBlock);
}

void interleave(const Rows& rows, int64_t bytes, uint8_t* tile) {
  // The last code fills its vector up.
  constexpr int64_t kVector = EMBLAS_VECTOR_BYTES;
  const int64_t end = (rows.count + kVector - 1) / kVector * kVector;
  for (int64_t first = 0; first < end; first += kStep) {
    uint8_t* to = tile + first / kBlock * kBlock * bytes + first % kBlock;
    if (!rows.rows && first + kStep <= rows.count) {
      const uint8_t* codes = rows.codes + first * rows.stride;
      transpose_codes([=](int64_t i) { return codes + i * rows.stride; }, bytes, to);
      continue;
    }
    const uint8_t* code[kStep];
    for (int64_t i = 0; i < kStep; ++i) {
      code[i] = rows.at(first + i < rows.count ? first + i : rows.count - 1);
    }
    transpose_codes([&](int64_t i) { return code[i]; }, bytes, to);
  }
}

}  // namespace
}  // namespace emblas
