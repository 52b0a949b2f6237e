// The random rotation of binary.h on a GPU: x -> H D_r ... H D_1 x.
//
// A block rotates one row in shared memory: a round flips signs, then adds and subtracts pairs of
// values, log2(dim) times, with a barrier in between. Bytes: x once and the result once; the signs
// come from the L2 cache. Shared memory is the limit: 4 accesses for each pair and step.
#pragma once

#include "binary/binary_cuda.h"
#include "common/cuda/simt.h"

namespace emblas::cuda {

inline constexpr int kRotateThreads = 256;  // at most

// Grid (rows). `size`: the largest power of two of dimensions that fits; `scale`: 1 / sqrt(size).
// `aligned`: rows start at multiples of 16 bytes.
template <class T, bool aligned>
__global__ void __launch_bounds__(kRotateThreads)
    rotate_rows(HadamardRotateArgs<T> args, int size, Accumulator<T> scale) {
  using A = Accumulator<T>;
  constexpr int vector = simt::kVector<T>;
  SIMT_DYNAMIC_SHARED(A, values);
  const int thread = threadIdx.x, threads = blockDim.x, dim = int(args.dim);
  const T* x = args.x + blockIdx.x * args.row_stride;
  for (int c = thread * vector; c < dim; c += threads * vector) {
    if (aligned && c + vector <= dim) {
      const simt::Vector<T> loaded = simt::load_vector(x + c);
      for (int i = 0; i < vector; ++i) values[c + i] = simt::to_accumulator(loaded.at[i]);
    } else {
      for (int i = c; i < c + vector && i < dim; ++i) values[i] = simt::to_accumulator(x[i]);
    }
  }
  __syncthreads();
  for (int64_t r = 0; r < args.rounds; ++r) {
    const int64_t round = args.inverse ? args.rounds - 1 - r : r;
    const int first = round % 2 ? dim - size : 0;
    const auto weigh = [&] {
      for (int c = thread; c < dim; c += threads) {
        const A factor = c >= first && c < first + size ? scale : A(1);
        values[c] *= factor * A(args.signs[round * dim + c]);
      }
      __syncthreads();
    };
    if (!args.inverse) weigh();
    for (int stride = 1; stride < size; stride *= 2) {
      for (int p = thread; p < size / 2; p += threads) {
        const int low = first + p + (p & -stride);  // blocks of 2 * stride values
        const A a = values[low], b = values[low + stride];
        values[low] = a + b;
        values[low + stride] = a - b;
      }
      __syncthreads();
    }
    if (args.inverse) weigh();
  }
  for (int c = thread; c < dim; c += threads) {
    simt::from_accumulator(values[c], args.out + blockIdx.x * args.dim + c);
  }
}

}  // namespace emblas::cuda
