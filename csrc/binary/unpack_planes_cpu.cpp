// Unpacking bit codes: the bits of 64 dimensions are collected, plane by plane, then scaled and
// stored as vectors. Bound by writing the values.
#include "binary/binary.h"
#include "common/isa.h"
#include "common/simd.h"

namespace emblas {
namespace {

constexpr int64_t kBytes = 8, kValues = 8 * kBytes;  // at a time

typedef int32_t Dimensions __attribute__((vector_size(32)));  // those of a byte

template <class T>
void unpack_rows(const UnpackPlanesArgs<T>& args, int64_t first, int64_t last) {
  using A = Accumulator<T>;
  const int64_t width = (args.dim + 7) / 8;
  const int32_t top = (1 << args.planes) - 1;
  const A step = A(2) / A(1 << args.planes);
  for (int64_t r = first; r < last; ++r) {
    const uint8_t* code = args.codes + r * args.row_stride;
    T* out = args.out + r * args.dim;
    for (int64_t begin = 0; begin < width; begin += kBytes) {
      const int64_t bytes = width - begin < kBytes ? width - begin : kBytes;
      Dimensions bits[kBytes] = {};
      for (int64_t plane = 0; plane < args.planes; ++plane) {
        for (int64_t b = 0; b < bytes; ++b) {
          const int32_t byte = code[plane * width + begin + b];
          const Dimensions set = (byte & Dimensions{128, 64, 32, 16, 8, 4, 2, 1}) != 0;  // -1 or 0
          bits[b] += bits[b] - set;
        }
      }
      A values[kValues];
      for (int64_t b = 0; b < bytes; ++b) {
        const Dimensions scaled = 2 * bits[b] - top;
        for (int i = 0; i < 8; ++i) values[8 * b + i] = A(scaled[i]) * step;
      }
      T* const to = out + 8 * begin;
      const int64_t left = args.dim - 8 * begin, count = left < kValues ? left : kValues;
      int64_t i = 0;
      for (; i + kLanes<T> <= count; i += kLanes<T>) store(to + i, load(values + i));
      for (; i < count; ++i) from_accumulator(values[i], to + i);
    }
  }
}

}  // namespace

template <>
const UnpackPlanesKernels& table_of<UnpackPlanesKernels, Isa::EMBLAS_ISA>() {
  static constexpr UnpackPlanesKernels table{
      {unpack_rows<float>}, {unpack_rows<double>}, {unpack_rows<bfloat16>}, {unpack_rows<float16>}};
  return table;
}

}  // namespace emblas
