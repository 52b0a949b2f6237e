// The randomized Hadamard rotation, one row at a time in a buffer that stays in L1: dim * log2(dim)
// additions per round against dim values read and written once. Bound by arithmetic; strides of a
// vector and more are plain vector additions, the shorter ones are shuffled by the compiler.
#include "binary/binary.h"
#include "common/isa.h"
#include "common/simd.h"

namespace emblas {
namespace {

// x[j], x[j + stride] <- their sum and difference, for each pair of [0, n).
template <int64_t kStatic, class A>
inline void butterflies(A* x, int64_t n, int64_t dynamic) {
  const int64_t stride = kStatic > 0 ? kStatic : dynamic;
  for (int64_t i = 0; i < n; i += 2 * stride) {
    for (int64_t j = i; j < i + stride; ++j) {
      const A a = x[j], b = x[j + stride];
      x[j] = a + b;
      x[j + stride] = a - b;
    }
  }
}

// x <- Hx / sqrt(n), n a power of two.
template <class A>
void hadamard(A* x, int64_t n, A scale) {
  if (n > 1) butterflies<1>(x, n, 1);
  if (n > 2) butterflies<2>(x, n, 2);
  if (n > 4) butterflies<4>(x, n, 4);
  if (n > 8) butterflies<8>(x, n, 8);
  for (int64_t stride = 16; stride < n; stride *= 2) butterflies<0>(x, n, stride);
  for (int64_t i = 0; i < n; ++i) x[i] *= scale;
}

template <class A>
void flip(A* x, const int8_t* signs, int64_t dim) {
  for (int64_t i = 0; i < dim; ++i) x[i] = signs[i] < 0 ? -x[i] : x[i];
}

template <class T>
void rotate(const HadamardRotateArgs<T>& args, int64_t first, int64_t last,
            Accumulator<T>* buffer) {
  using A = Accumulator<T>;
  int64_t n = 1;
  while (2 * n <= args.dim) n *= 2;
  A scale = 1;
  if constexpr (sizeof(A) == 8) {
    scale = 1 / __builtin_sqrt(double(n));
  } else {
    scale = 1 / __builtin_sqrtf(float(n));
  }
  for (int64_t r = first; r < last; ++r) {
    const T* from = args.x + r * args.row_stride;
    for (int64_t i = 0; i < args.dim; ++i) buffer[i] = to_accumulator(from[i]);
    for (int64_t step = 0; step < args.rounds; ++step) {
      const int64_t round = args.inverse ? args.rounds - 1 - step : step;
      const int8_t* signs = args.signs + round * args.dim;
      A* block = buffer + (round % 2 ? args.dim - n : 0);
      if (!args.inverse) flip(buffer, signs, args.dim);
      hadamard(block, n, scale);
      if (args.inverse) flip(buffer, signs, args.dim);
    }
    for (int64_t i = 0; i < args.dim; ++i) from_accumulator(buffer[i], args.out + r * args.dim + i);
  }
}

}  // namespace

template <>
const HadamardRotateKernels& table_of<HadamardRotateKernels, Isa::EMBLAS_ISA>() {
  static constexpr HadamardRotateKernels table{
      {rotate<float>}, {rotate<double>}, {rotate<bfloat16>}, {rotate<float16>}};
  return table;
}

}  // namespace emblas
