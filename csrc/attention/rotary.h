// Rotary position embedding (Su et al., 2021, arXiv 2104.09864, equation 34): the elements of a
// head are paired, and each pair (a, b) turns by an angle that grows with the token's position.
//
//   a' = a cos - b sin,   b' = b cos + a sin
//
// Half-split pairs are (x[i], x[i + pairs]), interleaved ones (x[2 i], x[2 i + 1]), i < pairs;
// elements from 2 pairs on stay as they are. The gradient is the turn back: sin changes its sign.
//
// Bytes: x is read once and written once; a row of cos and sin serves all heads of its token from
// the first-level cache. Memory is the only limit.
#pragma once

#include "attention/attention.h"

namespace emblas {

template <class T>
struct RotaryArgs {
  HeadVectors<const T> x;
  HeadVectors<T> out;  // may be x itself
  int64_t heads, head_dim;
  int64_t pairs;                   // 2 pairs <= head_dim
  const Accumulator<T>*cos, *sin;  // [rows][pairs]
  const int64_t* position_ids;     // rows of the tokens; null: the row is the token's number
  bool inverse;
};

template <class T>
struct Rotary {
  // Tokens [first, last).
  void (*halves)(const RotaryArgs<T>&, int64_t first, int64_t last);
  // scratch: 4 pairs accumulators.
  void (*interleaved)(const RotaryArgs<T>&, int64_t first, int64_t last, Accumulator<T>* scratch);
};
using RotaryKernels = ByDtype<Rotary>;

}  // namespace emblas
