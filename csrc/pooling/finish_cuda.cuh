// Finishing pooled vectors on a GPU; the formulas stand in finish.h.
//
// Forward. A block owns a row and one of the nested dims: it adds up the squares with 16-byte
// loads, then takes a column for each thread, so that stores are contiguous over a warp. Eight
// signs of a warp's vote are a byte. Noise is a function of its place, so whoever stores a value
// makes its own. Backward. A block owns a row: it finds length and projection for each of dims,
// then adds, column by column, what each of them that holds the column has to say.
//
// Bytes: x and the result once; later passes over a row find it in the first-level cache. Rows are
// few, one for each document: the launch is the limit, and noise in double precision.
#pragma once

#include "pooling/finish_cuda.h"
#include "pooling/noise_cuda.cuh"
#include "pooling/pooling.h"

namespace emblas::cuda {

inline constexpr int kFinishWarps = 4;
inline constexpr int kFinishThreads = 32 * kFinishWarps;

// One of the nested prefixes, and where its results are in a row of them.
struct Prefix {
  int64_t dim;
  int64_t before, bytes_before;
};
template <class A>
__device__ inline Prefix prefix_of(const FinishArgs<A>& args, int number) {
  Prefix prefix{args.dims[number], 0, 0};
  for (int d = 0; d < number; ++d) {
    prefix.before += args.dims[d];
    prefix.bytes_before += (args.dims[d] + 7) / 8;
  }
  return prefix;
}

// The smallest length that is divided by is epsilon; NaN stays.
template <class A>
__device__ inline A divisor_of(A square) {
  const A length = sqrt(square);
  return length < A(kNormalizeEpsilon) ? A(kNormalizeEpsilon) : length;
}

// The sum of this thread's squares. `aligned`: x is a multiple of 16 bytes.
template <class A, bool aligned>
__device__ inline A sum_of_squares(const A* x, int64_t dim) {
  constexpr int vector = aligned ? simt::kVector<A> : 1;
  A square = 0;
  for (int64_t c = threadIdx.x * vector; c < dim; c += kFinishThreads * vector) {
    if (aligned && c + vector <= dim) {
      const simt::Vector<A> values = simt::load_vector(x + c);
      for (int i = 0; i < vector; ++i) square += values.at[i] * values.at[i];
    } else {
      for (int64_t i = c; i < c + vector && i < dim; ++i) square += x[i] * x[i];
    }
  }
  return square;
}

// Grid (rows, dims). `ranges`: of int8. `aligned`: rows of x start at multiples of 16 bytes.
template <class A, class Out, FinishKind kind, bool aligned>
__global__ void __launch_bounds__(kFinishThreads)
    finish_rows(FinishArgs<A> args, int64_t width, const A* ranges, Out* out) {
  const int64_t row = blockIdx.x;
  const Prefix prefix = prefix_of(args, blockIdx.y);
  const A* x = args.x + row * args.dim;
  A scale = 1;
  if (args.normalize) {
    const A square = sum_of_squares<A, aligned>(x, prefix.dim);
    scale = 1 / divisor_of(simt::block_sum<kFinishWarps>(square));
  }
  // Whole warps, for the votes.
  for (int64_t first = 0; first < prefix.dim; first += kFinishThreads) {
    const int64_t c = first + threadIdx.x;
    const bool inside = c < prefix.dim;
    A z = inside ? scale * x[c] : A(0);
    if (args.noise != 0 && inside) {
      z += A(args.noise * normal_at(args.seed, row, blockIdx.y, c));
    }
    const int64_t at = prefix.before + c;
    if constexpr (kind == FinishKind::floating) {
      if (inside) simt::from_accumulator(z, out + row * width + at);
    } else if constexpr (kind == FinishKind::int8) {
      if (inside) {
        const A low = ranges[at], span = ranges[width + at] - low;
        const A level = rint((z - low) * (span > 0 ? 255 / span : A(0)));
        // NaN gives the lowest code.
        out[row * width + at] = int8_t((level > 0 ? level < 255 ? int(level) : 255 : 0) - 128);
      }
    } else {
      const unsigned signs = __ballot_sync(simt::kAllLanes, z > 0);
      if (inside && c % 8 == 0) {
        const unsigned byte = __brev(signs >> threadIdx.x % 32 << 24);  // the first is the highest
        out[row * width + prefix.bytes_before + c / 8] = uint8_t(byte);
      }
    }
  }
}

// Grid (rows). `aligned`: rows of x start at multiples of 16 bytes.
template <class A, bool aligned>
__global__ void __launch_bounds__(kFinishThreads)
    finish_gradients(FinishArgs<A> args, int64_t width, const A* grad_out, A* grad_x) {
  // dx = sum over dims of g share - x projection
  SIMT_SHARED(A, share, [kMaxFinishDims]);
  SIMT_SHARED(A, projection, [kMaxFinishDims]);
  const A* x = args.x + blockIdx.x * args.dim;
  const A* grad = grad_out + blockIdx.x * width;
  if (args.normalize) {
    int64_t before = 0;
    for (int d = 0; d < args.count; ++d) {
      const int64_t dim = args.dims[d];
      const A square = simt::block_sum<kFinishWarps>(sum_of_squares<A, aligned>(x, dim));
      A along = 0;
#pragma unroll 2  // more than that spills registers of doubles
      for (int64_t c = threadIdx.x; c < dim; c += kFinishThreads) along += x[c] * grad[before + c];
      along = simt::block_sum<kFinishWarps>(along);
      if (threadIdx.x == 0) {
        const A length = divisor_of(square);
        share[d] = 1 / length;
        // A row that is not longer than epsilon is divided by a constant.
        projection[d] =
            sqrt(square) <= A(kNormalizeEpsilon) ? A(0) : along / length / length / length;
      }
      before += dim;
    }
    __syncthreads();
  }
  for (int64_t c = threadIdx.x; c < args.dim; c += kFinishThreads) {
    A total = 0;
    int64_t before = 0;
    for (int d = 0; d < args.count; ++d) {
      if (c < args.dims[d]) {
        const A g = grad[before + c];
        total += args.normalize ? g * share[d] - x[c] * projection[d] : g;
      }
      before += args.dims[d];
    }
    grad_x[blockIdx.x * args.dim + c] = total;
  }
}

}  // namespace emblas::cuda
