// What is done to pooled vectors before they are stored, in one pass over each.
//
// For each k of `dims`, from a row x of D values (Matryoshka: nested prefixes, arXiv 2205.13147):
//   y = x[:k], or with normalize y = x[:k] / max(|x[:k]|, epsilon)
//   z = y + noise N(row, k)                       independent normal numbers for each row and k
//   stored as float (any dtype), as int8 or as sign bits; the results of all dims lie side by side
// int8: clamp(round((z - low) / step) - 128), step = (high - low) / 255, with a range (low, high)
// for each column. Bits: z > 0, most significant first, each k filled up to whole bytes with 0.
//
// Backward (float only), n_k = max(|x[:k]|, epsilon): dx = sum over k of (g_k - y (y . g_k)) / n_k.
//
// Bytes: rows are few (one per document), so all of this stays in the second-level cache.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace emblas {

// The values are part of the operator's schema.
enum class FinishKind : int64_t { floating, int8, bits };

struct FinishSettings {
  const int64_t* dims;
  int64_t count;  // of dims
  int64_t dim;    // of a row of x
  bool normalize;
  double noise;  // standard deviation; 0: none
  uint64_t seed;
};

template <class T>
struct Finish {
  using A = Accumulator<T>;
  // Rows [first, last); scratch holds dim accumulators.
  void (*floating)(const FinishSettings&, const A* x, int64_t first, int64_t last, T* out,
                   A* scratch);
  // ranges: [2, sum of dims], the lows and the highs
  void (*int8)(const FinishSettings&, const A* x, const A* ranges, int64_t first, int64_t last,
               int8_t* out, A* scratch);
  void (*bits)(const FinishSettings&, const A* x, int64_t first, int64_t last, uint8_t* out,
               A* scratch);
  void (*backward)(const FinishSettings&, const A* grad_out, const A* x, int64_t first,
                   int64_t last, A* grad_x);
};
using FinishKernels = ByDtype<Finish>;

}  // namespace emblas
