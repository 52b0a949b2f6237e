// Codes on a GPU; the formulas stand in codes.h.
//
// A thread makes the numbers of one or two blocks of four words, 16 bytes or more, and stores them.
// Nothing is read but an id and a sequence, so what limits is arithmetic on doubles: a normal
// number takes some sixty operations.
//
// The bits are those of every other machine: each operation is rounded by itself (`Exact`), which
// the compiler must not fuse.
#pragma once

#include "common/cuda/simt.h"
#include "common/philox_cuda.cuh"
#include "tables/codes_cuda.h"

namespace emblas::cuda::tables {

inline constexpr int kCodeThreads = 256;

// Numbers that a thread makes: whole blocks of words, and whole vectors.
template <class T>
inline constexpr int kNumbers = simt::kVector<T> > 4 ? simt::kVector<T> : 4;

// A double whose operations are rounded one by one.
struct Exact {
  double value;

  __device__ Exact(double value) : value(value) {}
};
__device__ inline Exact operator+(Exact a, Exact b) { return __dadd_rn(a.value, b.value); }
__device__ inline Exact operator-(Exact a, Exact b) { return __dadd_rn(a.value, -b.value); }
__device__ inline Exact operator*(Exact a, Exact b) { return __dmul_rn(a.value, b.value); }
__device__ inline Exact operator/(Exact a, Exact b) { return __ddiv_rn(a.value, b.value); }

// The natural logarithm of (word + 1) / 2^32: of a mantissa within a factor sqrt(2) of 1,
// ln(m) = 2 artanh((m - 1) / (m + 1)).
__device__ inline Exact log_of_word(uint32_t word) {
  const double u = (word + 1.0) * 0x1p-32;
  uint64_t bits;
  memcpy(&bits, &u, sizeof bits);
  const uint64_t mantissa_bits = (bits & 0x000fffffffffffff) | 0x3fe0000000000000;
  double mantissa, exponent = double(int(bits >> 52) - 1022);
  memcpy(&mantissa, &mantissa_bits, sizeof mantissa);
  if (mantissa < 0x1.6a09e667f3bcdp-1) {  // sqrt(1/2)
    mantissa = 2 * mantissa;
    exponent = exponent - 1;
  }
  const Exact s = (Exact(mantissa) - 1) / (Exact(mantissa) + 1), square = s * s;
  Exact series = 1.0 / 21;
#pragma unroll
  for (int k = 19; k >= 1; k -= 2) series = series * square + 1.0 / k;
  return exponent * Exact(0x1.62e42fefa39efp-1) + 2 * s * series;
}

// Two independent normal numbers of two words.
__device__ inline void normal_numbers(uint32_t first, uint32_t second, double* numbers) {
  Exact radius = __dsqrt_rn((-2 * log_of_word(first)).value);
  // The angle as a multiple of pi / 2 and a rest x of -pi/4 to pi/4, whose sine and cosine are
  // Taylor series.
  const uint32_t quadrant = (second + (1u << 29)) >> 30;
  const Exact x = double(int32_t(second - (quadrant << 30))) * Exact(0x1.921fb54442d18p-30);
  const Exact square = x * x;
  double factorial = 20922789888000;  // of 16
  Exact cosine = 1 / factorial, sine = 1 / (17 * factorial);
#pragma unroll
  for (int n = 14; n >= 0; n -= 2) {
    factorial /= (n + 1) * (n + 2);
    const double sign = n % 4 == 0 ? 1 : -1;
    cosine = cosine * square + sign / factorial;
    sine = sine * square + sign / ((n + 1) * factorial);
  }
  sine = x * sine;
  if (quadrant & 2) radius = -radius.value;
  numbers[0] = (radius * (quadrant & 1 ? Exact(-sine.value) : cosine)).value;
  numbers[1] = (radius * (quadrant & 1 ? cosine : sine)).value;
}

// Grid (rows * pieces of a row / kCodeThreads); out [rows, dim]. `aligned`: rows are whole vectors.
template <class T, bool aligned>
__global__ void __launch_bounds__(kCodeThreads)
    make_codes(CodeArgs args, int64_t rows, double root, double part, T* out) {
  constexpr int numbers = kNumbers<T>, vector = simt::kVector<T>;
  const int64_t pieces = (args.dim + numbers - 1) / numbers;
  const int64_t piece = int64_t(blockIdx.x) * kCodeThreads + threadIdx.x;
  const int64_t row = piece / pieces, column = piece % pieces * numbers;
  if (row >= rows) return;
  const auto id = uint64_t(args.ids[row]);
  const auto sequence = uint32_t(args.sequences[row * args.sequence_step]);
  double values[numbers];
#pragma unroll
  for (int i = 0; i < numbers; i += 4) {
    const Words words = random_words(
        {{uint32_t((column + i) / 4), uint32_t(id), uint32_t(id >> 32), sequence}}, args.seed);
    if (args.kind == CodeKind::normal) {
      normal_numbers(words.at[0], words.at[1], values + i);
      normal_numbers(words.at[2], words.at[3], values + i + 2);
      continue;
    }
    for (int j = 0; j < 4; ++j) {
      const double w = words.at[j];
      const double sign = w < part ? -root : w < 2 * part ? root : 0;
      values[i + j] = args.kind == CodeKind::uniform ? (w + 0.5) * 0x1p-31 - 1 : sign;
    }
  }
  T* const to = out + row * args.dim + column;
  for (int i = 0; i < numbers; i += vector) {
    simt::Vector<T> some;
    for (int j = 0; j < vector; ++j) {
      simt::from_accumulator(Accumulator<T>(values[i + j]), &some.at[j]);
    }
    if constexpr (aligned) {
      if (column + i < args.dim) simt::store_vector(to + i, some);
    } else {
      for (int j = 0; j < vector; ++j) {
        if (column + i + j < args.dim) to[i + j] = some.at[j];
      }
    }
  }
}

}  // namespace emblas::cuda::tables
