// The inner products of dots.h: kRows x kQueries pairs at a time, one vector of sums each.
#include "binary/dots.h"
#include "common/fetch.h"
#include "common/isa.h"
#include "common/simd.h"

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace emblas {
namespace {

typedef int8_t vint8_quarter __attribute__((vector_size(EMBLAS_VECTOR_BYTES / 4)));
typedef vint8_quarter vint8_quarter_unaligned __attribute__((aligned(1), may_alias));
typedef int16_t vint16_half __attribute__((vector_size(EMBLAS_VECTOR_BYTES / 2)));

inline vfloat load(const int8_t* from) {
#if defined(EMBLAS_HAS_AVX512) && !defined(EMBLAS_EMULATE_AVX512)
  const vint32 wide = (vint32)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(EMBLAS_HAS_AVX2) && !defined(EMBLAS_HAS_AVX512)
  const vint32 wide = (vint32)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  // By way of 16 bits: compilers take the direct conversion apart.
  const vint16_half halves =
      __builtin_convertvector(*(const vint8_quarter_unaligned*)from, vint16_half);
  const vint32 wide = __builtin_convertvector(halves, vint32);
#endif
  return __builtin_convertvector(wide, vfloat);
}

// Whole numbers: two products of neighbors are added to each sum.
typedef int16_t vint16 __attribute__((vector_size(EMBLAS_VECTOR_BYTES)));
typedef vint16 vint16_unaligned __attribute__((aligned(1), may_alias));
typedef int8_t vint8_half __attribute__((vector_size(EMBLAS_VECTOR_BYTES / 2)));
typedef vint8_half vint8_half_unaligned __attribute__((aligned(1), may_alias));

inline vint16 load(const int16_t* from) { return *(const vint16_unaligned*)from; }
inline vint16 load_whole(const int8_t* from) {
#if defined(EMBLAS_HAS_AVX512)
  return (vint16)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from));
#elif defined(EMBLAS_HAS_AVX2)
  return (vint16)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from));
#else
  return __builtin_convertvector(*(const vint8_half_unaligned*)from, vint16);
#endif
}

// Fewer than `step` values at the end of a vector, and zeros: they take the same instructions as
// the others, so that no compiler rounds them differently in one form of a product than in another.
template <int step, class T>
struct PaddedValues {
  T values[step] = {};
  PaddedValues(const T* from, int64_t count) {
    std::memcpy(values, from, size_t(count) * sizeof(T));
  }
};
template <int step, class T>
inline PaddedValues<step, T> padded(const T* from, int64_t count) {
  return {from, count};
}

// What a product of rows of T with queries is made of: `load` takes kStep values of a row, `add`
// multiplies them with as many of a query.
template <class Args>
struct Step;
template <class T>
struct Step<DotsArgs<T>> {
  using Sum = Accumulator<T>;
  using Sums = Vector<T>;
  static constexpr int kStep = kLanes<T>;
  static Sums load_row(const T* row) { return load(row); }
  static void add(Sums& sums, Sums query, Sums row) { sums += query * row; }
};
template <>
struct Step<RoundedDotsArgs> {
  using Sum = int32_t;
  using Sums = vint32;
  static constexpr int kStep = EMBLAS_VECTOR_BYTES / 2;
  static vint16 load_row(const int8_t* row) { return load_whole(row); }
  static void add(Sums& sums, vint16 query, vint16 row) {
#if defined(EMBLAS_HAS_AVX512)
    sums += (vint32)_mm512_madd_epi16((__m512i)query, (__m512i)row);
#elif defined(EMBLAS_HAS_AVX2)
    sums += (vint32)_mm256_madd_epi16((__m256i)query, (__m256i)row);
#elif defined(EMBLAS_HAS_NEON)
    const int16x8_t a = (int16x8_t)query, b = (int16x8_t)row;
    const int32x4_t low = vmlal_s16((int32x4_t)sums, vget_low_s16(a), vget_low_s16(b));
    sums = (vint32)vmlal_high_s16(low, a, b);
#elif defined(__x86_64__)
    sums += (vint32)_mm_madd_epi16((__m128i)query, (__m128i)row);
#else
    const vint32 x = (vint32)query, y = (vint32)row;  // pairs of 16 bits, the sign of the upper one
    sums += (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
  }
};

constexpr int kQueries = 4;
constexpr int kRows = EMBLAS_VECTOR_BYTES == 64 ? 4 : 2;  // what the registers hold

template <class Args>
inline auto row_of(const Args& args, int64_t i) {
  return args.data + (args.rows ? args.rows[i] : i) * args.stride;
}

// sum() of four vectors at once, by the same additions: one shuffle and add serves two of them.
template <class V>
inline auto to_four(V x) {
#if EMBLAS_VECTOR_BYTES == 64
  const auto half = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(half, half, 0, 1, 2, 3) +
         __builtin_shufflevector(half, half, 4, 5, 6, 7);
#elif EMBLAS_VECTOR_BYTES == 32
  return __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
#else
  return x;
#endif
}
template <class V, class Sum>
inline void sums(V a, V b, V c, V d, Sum (&out)[4]) {
  const auto w = to_four(a), x = to_four(b), y = to_four(c), z = to_four(d);
  const auto first =
      __builtin_shufflevector(w, x, 0, 4, 1, 5) + __builtin_shufflevector(w, x, 2, 6, 3, 7);
  const auto second =
      __builtin_shufflevector(y, z, 0, 4, 1, 5) + __builtin_shufflevector(y, z, 2, 6, 3, 7);
  const auto all = __builtin_shufflevector(first, second, 0, 1, 4, 5) +
                   __builtin_shufflevector(first, second, 2, 3, 6, 7);
  std::memcpy(out, &all, sizeof out);
}
inline void sums(vdouble a, vdouble b, vdouble c, vdouble d, double (&out)[4]) {
  out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
}

// `fetch`: rows follow each other, and the next ones are fetched first, as one stream: memory
// delivers half as fast to the `rows` streams that the loop would begin.
template <int queries, int rows, bool fetch = false, class Args>
inline void some(const Args& args, int64_t q0, int64_t r0) {
  using S = Step<Args>;
  using Sum = typename S::Sum;
  decltype(args.queries) query[queries];
  decltype(args.data) row[rows];
  for (int q = 0; q < queries; ++q) query[q] = args.queries + (q0 + q) * args.query_stride;
  for (int r = 0; r < rows; ++r) row[r] = row_of(args, r0 + r);
  if constexpr (fetch) {
    const auto* next = (const char*)(row[rows - 1] + args.stride);
    const int64_t bytes = args.dim * rows * int64_t(sizeof(*row[0]));
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(next + line);
  }
  typename S::Sums total[queries][rows] = {};
  const auto step = [&](auto load_query, auto load_row) __attribute__((always_inline)) {
    decltype(load_row(row[0])) values[rows];
    for (int r = 0; r < rows; ++r) values[r] = load_row(row[r]);
    for (int q = 0; q < queries; ++q) {
      const auto wanted = load_query(query[q]);
      for (int r = 0; r < rows; ++r) S::add(total[q][r], wanted, values[r]);
    }
  };
  int64_t i = 0;
  for (; i + S::kStep <= args.dim; i += S::kStep) {
    step([=](auto from) { return load(from + i); },
         [=](auto from) { return S::load_row(from + i); });
  }
  if (const int64_t rest = args.dim - i; rest > 0) {
    step([=](auto from) { return load(padded<S::kStep>(from + i, rest).values); },
         [=](auto from) { return S::load_row(padded<S::kStep>(from + i, rest).values); });
  }
  for (int r = 0; r < rows; ++r) {
    Sum result[4];
    if constexpr (queries == 4) {
      sums(total[0][r], total[1][r], total[2][r], total[3][r], result);
    } else {
      for (int q = 0; q < queries; ++q) result[q] = sum(total[q][r]);
    }
    for (int q = 0; q < queries; ++q) args.dots[(q0 + q) * args.count + r0 + r] = result[q];
  }
}

// One query with four rows, one after the other: memory is read as one stream.
template <class Args>
inline void four_rows(const Args& args, int64_t q, int64_t r0) {
  using S = Step<Args>;
  const auto* query = args.queries + q * args.query_stride;
  typename S::Sums total[4] = {};
  for (int r = 0; r < 4; ++r) {
    const auto* row = row_of(args, r0 + r);
    if (q == 0 && !args.rows) fetch_page_ahead(row, args.dim * int64_t(sizeof(*row)));
    int64_t i = 0;
    for (; i + S::kStep <= args.dim; i += S::kStep) {
      S::add(total[r], load(query + i), S::load_row(row + i));
    }
    if (const int64_t rest = args.dim - i; rest > 0) {
      S::add(total[r], load(padded<S::kStep>(query + i, rest).values),
             S::load_row(padded<S::kStep>(row + i, rest).values));
    }
  }
  typename S::Sum result[4];
  sums(total[0], total[1], total[2], total[3], result);
  for (int r = 0; r < 4; ++r) args.dots[q * args.count + r0 + r] = result[r];
}

// Whether rows [r, r + 2 * kRows) exist and follow each other.
template <class Args>
inline bool follow(const Args& args, int64_t r) {
  if (r + 2 * kRows > args.count) return false;
  return !args.rows || args.rows[r + 2 * kRows - 1] - args.rows[r] == 2 * kRows - 1;
}

template <class Args>
void dots(const Args& args) {
  int64_t q = 0;
  for (; q + kQueries <= args.query_count; q += kQueries) {
    int64_t r = 0;
    for (; r + kRows <= args.count; r += kRows) {
      if (q == 0 && follow(args, r)) {
        some<kQueries, kRows, true>(args, q, r);
      } else {
        some<kQueries, kRows>(args, q, r);
      }
    }
    for (; r < args.count; ++r) some<kQueries, 1>(args, q, r);
  }
  for (; q < args.query_count; ++q) {
    int64_t r = 0;
    for (; r + 4 <= args.count; r += 4) four_rows(args, q, r);
    for (; r < args.count; ++r) some<1, 1>(args, q, r);
  }
}

template <class T>
void squares(const DotsArgs<T>& args, Accumulator<T>* out) {
  constexpr int lanes = kLanes<T>;
  for (int64_t r = 0; r < args.count; ++r) {
    const T* row = row_of(args, r);
    Vector<T> total = {};
    int64_t i = 0;
    for (; i + lanes <= args.dim; i += lanes) {
      const Vector<T> values = load(row + i);
      total += values * values;
    }
    if (const int64_t rest = args.dim - i; rest > 0) {
      const Vector<T> values = load(padded<lanes>(row + i, rest).values);
      total += values * values;
    }
    out[r] = sum(total);
  }
}

}  // namespace

template <>
const DotsKernels& table_of<DotsKernels, Isa::EMBLAS_ISA>() {
  static constexpr DotsKernels table{{{dots<DotsArgs<float>>, squares<float>},
                                      {dots<DotsArgs<double>>, squares<double>},
                                      {dots<DotsArgs<bfloat16>>, squares<bfloat16>},
                                      {dots<DotsArgs<float16>>, squares<float16>}},
                                     {dots<DotsArgs<int8_t>>, squares<int8_t>},
                                     dots<RoundedDotsArgs>};
  return table;
}

}  // namespace emblas
