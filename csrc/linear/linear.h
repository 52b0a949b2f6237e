// Linear layers over the tokens of a packed batch:
//
//   out[i][j] = f(bias[j] + sum_k x[i][k] weight[j][k]) + residual[i][j]
//
// with an activation f, which is applied to sums that still lie in the first-level cache: what a
// layer holds between its two products goes to memory and back once, not three times.
//
// The sum runs over k in order, whatever rows are computed beside row i: a token's bits depend
// neither on its batch nor on the number of threads, which those of a BLAS do.
//
// Bytes: each weight is multiplied with all rows, so that multiply-adds are the only limit as long
// as the operands come from near caches. The weights are first packed into panels of columns, each
// a k after the other, cut along k into pieces. A group of panels of one piece stays in the
// second-level cache while all rows pass by; a few rows of the piece are in the first-level cache,
// and their sums with one panel in registers. Between pieces, sums rest in `out`.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace emblas {

// Columns of a panel: two of the widest vectors. The layout is the same for all instruction sets.
template <class T>
inline constexpr int64_t kPanel = 128 / sizeof(T);
// Elements along k of a piece.
template <class T>
inline constexpr int64_t kPiece = 1536 / sizeof(T);

template <class T>
constexpr int64_t panels(int64_t columns) {
  return (columns + kPanel<T> - 1) / kPanel<T>;
}

enum class Activation { none, relu, gelu, gelu_tanh, silu };

template <class T>
struct LinearArgs {
  const T* x;  // [rows][depth]
  int64_t x_stride;
  const T* weight;  // [columns][depth]
  int64_t weight_stride;
  const T* bias;      // [columns]; null: zeros
  const T* residual;  // [rows][columns]; null: zeros
  int64_t residual_stride;
  Activation activation;
  int64_t columns, depth;
  T* packed;  // [panels * kPanel * depth]: by piece, panel, k, column
  T* out;     // [rows][columns]
};

template <class T>
struct Linear {
  int64_t rows;  // that are multiplied together
  int64_t scratch_size;
  // Fill the panels [first, last) of `packed`.
  void (*pack)(const LinearArgs<T>&, int64_t first, int64_t last);
  // Rows [first, last) of `out`, out of `packed`.
  void (*multiply)(const LinearArgs<T>&, int64_t first, int64_t last, T* scratch);
};
struct LinearKernels {
  Linear<float> float32;
  Linear<double> float64;

  const Linear<float>& of(float) const { return float32; }
  const Linear<double>& of(double) const { return float64; }
};

}  // namespace emblas
