// Unpacking bit codes on a GPU: the sum of the planes of each dimension.
//
// A thread writes 16 bytes of values, the bits of which are in one byte of each plane. Bytes: codes
// once, 32 or fewer for each of theirs written; bound by memory bandwidth.
#pragma once

#include "binary/binary_cuda.h"
#include "common/cuda/simt.h"

namespace emblas::cuda {

inline constexpr int kUnpackThreads = 256;

// Grid (ceil(rows / rows_per_block)). `aligned`: rows of values are multiples of 16 bytes.
template <class T, bool aligned>
__global__ void __launch_bounds__(kUnpackThreads)
    unpack_rows(UnpackPlanesArgs<T> args, int rows_per_block) {
  using A = Accumulator<T>;
  constexpr int values = simt::kVector<T>;  // of a thread
  const int64_t width = (args.dim + 7) / 8;
  const unsigned pieces = unsigned((args.dim + values - 1) / values);  // of a row
  const int64_t first_row = int64_t(blockIdx.x) * rows_per_block;
  const unsigned rows = unsigned(min(args.rows - first_row, int64_t(rows_per_block)));
  const int top = (1 << args.planes) - 1;
  const A step = A(2) / A(1 << args.planes);
  for (unsigned at = threadIdx.x; at < rows * pieces; at += kUnpackThreads) {
    const int64_t row = first_row + at / pieces;
    const int64_t column = at % pieces * values;
    const uint8_t* byte = args.codes + row * args.row_stride + column / 8;
    int bits[values] = {};
    for (int64_t plane = 0; plane < args.planes; ++plane, byte += width) {
      const unsigned own = *byte;
      for (int i = 0; i < values; ++i) {
        bits[i] = 2 * bits[i] + int(own >> (7 - (column + i) % 8) & 1);
      }
    }
    simt::Vector<T> vector;
    for (int i = 0; i < values; ++i) {
      simt::from_accumulator(A(2 * bits[i] - top) * step, &vector.at[i]);
    }
    T* const out = args.out + row * args.dim + column;
    if constexpr (aligned) {
      simt::store_vector(out, vector);
    } else {
      for (int i = 0; i < values; ++i) {
        if (column + i < args.dim) out[i] = vector.at[i];
      }
    }
  }
}

}  // namespace emblas::cuda
