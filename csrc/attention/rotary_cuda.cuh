// Rotary position embedding on a GPU.
//
// A thread turns the pairs of 16 bytes of a head, or of 16 bytes and the 16 bytes `pairs` elements
// further on; or it copies 16 bytes that belong to no pair. Threads follow each other along a head,
// then over the heads of a token, so that a warp reads and writes whole lines, and the rows of cos
// and sin come from the first-level cache for all heads but the first. Heads that don't start at
// multiples of 16 bytes are read element by element by the same threads.
//
// Bytes: x once, the result once, a row of each table for each token; bound by memory bandwidth.
#pragma once

#include "attention/rotary_cuda.h"
#include "common/cuda/simt.h"

namespace emblas::cuda {

inline constexpr int kRotaryThreads = 256;

// `count` elements, at most a vector's.
template <class T, bool aligned>
__device__ simt::Vector<T> load_some(const T* from, int64_t count) {
  constexpr int vector = simt::kVector<T>;
  if (aligned && count >= vector) return simt::load_vector(from);
  simt::Vector<T> x{};
  for (int i = 0; i < vector; ++i) {
    if (i < count) x.at[i] = from[i];
  }
  return x;
}
template <class T, bool aligned>
__device__ void store_some(T* to, const simt::Vector<T>& x, int64_t count) {
  constexpr int vector = simt::kVector<T>;
  if (aligned && count >= vector) return simt::store_vector(to, x);
  for (int i = 0; i < vector; ++i) {
    if (i < count) to[i] = x.at[i];
  }
}

// Threads over (token, head, part of the head): `turning` parts of pairs, then parts of the rest.
template <class T, bool interleaved, bool aligned>
__global__ void __launch_bounds__(kRotaryThreads)
    turn_pairs(RotaryArgs<T> args, int64_t tokens, int64_t rows, int64_t turning, int64_t parts) {
  using A = Accumulator<T>;
  constexpr int vector = simt::kVector<T>;
  const int64_t item = int64_t(blockIdx.x) * kRotaryThreads + threadIdx.x;
  const int64_t part = item % parts, head = item / parts % args.heads;
  const int64_t token = item / parts / args.heads;
  if (token >= tokens) return;
  const T* const from = args.x.at(token, head);
  T* const to = args.out.at(token, head);
  if (part >= turning) {
    const int64_t first = 2 * args.pairs + (part - turning) * vector;
    const int64_t count = args.head_dim - first;
    store_some<T, false>(to + first, load_some<T, false>(from + first, count), count);
    return;
  }
  int64_t row = args.position_ids ? args.position_ids[token] : token;
  row = min(max(row, int64_t(0)), rows - 1);
  const A *const cos = args.cos + row * args.pairs, *const sin = args.sin + row * args.pairs;
  const A sign = args.inverse ? -1 : 1;
  if constexpr (interleaved) {
    const int64_t first = part * vector, count = 2 * args.pairs - first;
    simt::Vector<T> x = load_some<T, aligned>(from + first, count);
    for (int i = 0; i < vector; i += 2) {
      if (i >= count) break;
      const A a = simt::to_accumulator(x.at[i]), b = simt::to_accumulator(x.at[i + 1]);
      const A c = cos[(first + i) / 2], s = sign * sin[(first + i) / 2];
      simt::from_accumulator(a * c - b * s, &x.at[i]);
      simt::from_accumulator(b * c + a * s, &x.at[i + 1]);
    }
    store_some<T, aligned>(to + first, x, count);
  } else {
    const int64_t first = part * vector, count = args.pairs - first;
    simt::Vector<T> x = load_some<T, aligned>(from + first, count);
    simt::Vector<T> y = load_some<T, aligned>(from + args.pairs + first, count);
    for (int i = 0; i < vector; ++i) {
      if (i >= count) break;
      const A a = simt::to_accumulator(x.at[i]), b = simt::to_accumulator(y.at[i]);
      const A c = cos[first + i], s = sign * sin[first + i];
      simt::from_accumulator(a * c - b * s, &x.at[i]);
      simt::from_accumulator(b * c + a * s, &y.at[i]);
    }
    store_some<T, aligned>(to + first, x, count);
    store_some<T, aligned>(to + args.pairs + first, y, count);
  }
}

}  // namespace emblas::cuda
