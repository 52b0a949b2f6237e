// The inner products of dots.h: kRows x kQueries pairs at a time, one vector of sums each.
#include "binary/dots.h"
#include "common/isa.h"
#include "common/simd.h"

namespace emblas {
namespace {

typedef int8_t vint8 __attribute__((vector_size(EMBLAS_VECTOR_BYTES / 4)));
typedef vint8 vint8_unaligned __attribute__((aligned(1), may_alias));
typedef int16_t vint16 __attribute__((vector_size(EMBLAS_VECTOR_BYTES / 2)));

inline vfloat load(const int8_t* from) {
#if defined(EMBLAS_HAS_AVX512) && !defined(EMBLAS_EMULATE_AVX512)
  const vint32 wide = (vint32)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(EMBLAS_HAS_AVX2) && !defined(EMBLAS_HAS_AVX512)
  const vint32 wide = (vint32)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  // By way of 16 bits: compilers take the direct conversion apart.
  const vint16 halves = __builtin_convertvector(*(const vint8_unaligned*)from, vint16);
  const vint32 wide = __builtin_convertvector(halves, vint32);
#endif
  return __builtin_convertvector(wide, vfloat);
}
inline float to_accumulator(int8_t x) { return x; }

constexpr int kQueries = 4;
constexpr int kRows = EMBLAS_VECTOR_BYTES == 64 ? 4 : 2;  // what the registers hold

template <class T>
inline const T* row_of(const DotsArgs<T>& args, int64_t i) {
  return args.data + (args.rows ? args.rows[i] : i) * args.stride;
}

// sum() of four vectors at once, by the same additions: one shuffle and add serves two of them.
typedef float vfloat4 __attribute__((vector_size(16)));

inline vfloat4 to_four(vfloat x) {
#if EMBLAS_VECTOR_BYTES == 64
  typedef float vfloat8 __attribute__((vector_size(32)));
  const vfloat8 half = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                       __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(half, half, 0, 1, 2, 3) +
         __builtin_shufflevector(half, half, 4, 5, 6, 7);
#elif EMBLAS_VECTOR_BYTES == 32
  return __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
#else
  return x;
#endif
}
inline void sums(vfloat a, vfloat b, vfloat c, vfloat d, float (&out)[4]) {
  const vfloat4 w = to_four(a), x = to_four(b), y = to_four(c), z = to_four(d);
  const vfloat4 first =
      __builtin_shufflevector(w, x, 0, 4, 1, 5) + __builtin_shufflevector(w, x, 2, 6, 3, 7);
  const vfloat4 second =
      __builtin_shufflevector(y, z, 0, 4, 1, 5) + __builtin_shufflevector(y, z, 2, 6, 3, 7);
  const vfloat4 all = __builtin_shufflevector(first, second, 0, 1, 4, 5) +
                      __builtin_shufflevector(first, second, 2, 3, 6, 7);
  std::memcpy(out, &all, sizeof out);
}
inline void sums(vdouble a, vdouble b, vdouble c, vdouble d, double (&out)[4]) {
  out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
}

template <int queries, int rows, class T>
inline void some(const DotsArgs<T>& args, int64_t q0, int64_t r0) {
  using V = Vector<T>;
  constexpr int lanes = kLanes<T>;
  const Accumulator<T>* query[queries];
  const T* row[rows];
  for (int q = 0; q < queries; ++q) query[q] = args.queries + (q0 + q) * args.query_stride;
  for (int r = 0; r < rows; ++r) row[r] = row_of(args, r0 + r);
  V total[queries][rows] = {};
  int64_t i = 0;
  for (; i + lanes <= args.dim; i += lanes) {
    V values[rows];
    for (int r = 0; r < rows; ++r) values[r] = load(row[r] + i);
    for (int q = 0; q < queries; ++q) {
      const V wanted = load(query[q] + i);
      for (int r = 0; r < rows; ++r) total[q][r] += wanted * values[r];
    }
  }
  if constexpr (queries == 1 && rows == 4) {
    Accumulator<T> result[4];
    sums(total[0][0], total[0][1], total[0][2], total[0][3], result);
    for (int r = 0; r < rows; ++r) {
      for (int64_t j = i; j < args.dim; ++j) result[r] += query[0][j] * to_accumulator(row[r][j]);
      args.dots[q0 * args.count + r0 + r] = result[r];
    }
    return;
  }
  for (int r = 0; r < rows; ++r) {
    Accumulator<T> result[4];
    if constexpr (queries == 4) {
      sums(total[0][r], total[1][r], total[2][r], total[3][r], result);
    } else {
      for (int q = 0; q < queries; ++q) result[q] = sum(total[q][r]);
    }
    for (int q = 0; q < queries; ++q) {
      for (int64_t j = i; j < args.dim; ++j) result[q] += query[q][j] * to_accumulator(row[r][j]);
      args.dots[(q0 + q) * args.count + r0 + r] = result[q];
    }
  }
}

template <class T>
void dots(const DotsArgs<T>& args) {
  int64_t q = 0;
  for (; q + kQueries <= args.query_count; q += kQueries) {
    int64_t r = 0;
    for (; r + kRows <= args.count; r += kRows) some<kQueries, kRows>(args, q, r);
    for (; r < args.count; ++r) some<kQueries, 1>(args, q, r);
  }
  for (; q < args.query_count; ++q) {
    int64_t r = 0;
    for (; r + 4 <= args.count; r += 4) some<1, 4>(args, q, r);
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
    out[r] = sum(total);
    for (; i < args.dim; ++i) out[r] += to_accumulator(row[i]) * to_accumulator(row[i]);
  }
}

}  // namespace

template <>
const DotsKernels& table_of<DotsKernels, Isa::EMBLAS_ISA>() {
  static constexpr DotsKernels table{{{dots<float>, squares<float>},
                                      {dots<double>, squares<double>},
                                      {dots<bfloat16>, squares<bfloat16>},
                                      {dots<float16>, squares<float16>}},
                                     {dots<int8_t>, squares<int8_t>}};
  return table;
}

}  // namespace emblas
