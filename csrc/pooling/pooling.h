// Pooling: the token vectors of a segment to one vector, in one pass over the tokens.
//
// Linear modes, over the positions t of segment b, with W_b = sum_t w_t:
//   m_b   = sum_t w_t x_t / d_b       d_b = W_b          mean, weighted_mean, cls, last
//                                           1            sum
//                                           |W_b|^(1/2)  mean_sqrt_len
//   out_b = m_b, or with normalize m_b / max(|m_b|, epsilon)
// w_t is 1 or the caller's weight; times the position 1, 2, ... in the segment for weighted_mean
// (SGPT, arXiv 2202.08904, section 3.2); 1 at the first (last) token whose weight is not zero and 0
// elsewhere for cls (last). m_b = 0 where d_b = 0: "empty means zero".
//
// Backward, g = d loss / d out, n_b = max(|m_b|, epsilon), a = 1, 0, 1/2 for the d_b above:
//   dm_b = g, or with normalize (g - out (out . g)) / n_b; where |m_b| <= epsilon: g / epsilon
//   dx_t = w_t dm_b / d_b             dw_t = x_t . dm_b / d_b - a (m_b . dm_b) / W_b
// and sums of these where segments share a token, and over the modes where there are several.
//
// max:   out_b[i] = max_t x_t[i] over tokens of weight other than 0; the first maximum takes the
//        gradient. NaN counts as larger than any number, as in torch.
// gem:   out_b[i] = (sum_t w_t f(x_t[i]) / W_b)^(1/p), f(x) = max(x, epsilon)^p: the generalized
//        mean (arXiv 1711.02512, equation 3). dw_t is that of the mean of f(x), with the gradient
//        by that mean: sum_i s_b[i] f(x_t[i]) - (g . out_b) / (p W_b), s_b = g out_b^(1-p) / (p
//        W_b).
//
// Bytes: x is read once and out written once; nothing of size (tokens, dim) is made. Both
// directions are bound by memory bandwidth (one add per element read or written), gem by its
// exponentials.
#pragma once

#include "pooling/segments.h"

namespace emblas {

inline constexpr double kNormalizeEpsilon = 1e-12;

// out is stored as T or, with `wide`, as the accumulator; so are its gradients.
template <class T>
struct SegmentPoolArgs {
  Segments<T> segments;
  PoolModes modes;
  bool normalize;  // one linear mode only
  bool wide;
  void* out;             // [batch, modes, dim]
  Accumulator<T>* norm;  // [batch] |m_b|, written if normalize; may be null
  int32_t* argmax;       // [batch, dim] positions of the maxima (-1 in empty segments), if a mode
};

template <class T>
struct SegmentPoolBackwardArgs {
  Segments<T> segments;
  PoolModes modes;
  bool normalize;
  bool wide;
  const void* grad_out;        // [batch, modes, dim]
  const void* out;             // [batch, modes, dim], read if normalize or for weights
  const Accumulator<T>* norm;  // [batch], read if normalize
  const int32_t* argmax;       // [batch, dim], read if max is a mode
  int64_t batch;
  int64_t positions;
  T* grad_x;                     // [positions, dim] or null
  Accumulator<T>* grad_weights;  // [positions] or null
};

template <class T>
struct SegmentPool {
  using A = Accumulator<T>;
  // Segments [first, last); scratch holds modes + 1 rows of accumulators, as for `backward`.
  void (*forward)(const SegmentPoolArgs<T>&, int64_t first, int64_t last, A* scratch);
  // For segments in rising order that share no position: writes the rows of its segments and those
  // between them and their predecessors.
  void (*backward)(const SegmentPoolBackwardArgs<T>&, int64_t first, int64_t last, A* scratch);
  // For any segments, in the mode of this place: shared = dm_b / d_b [dim], returns
  // a (m_b . dm_b) / W_b.
  A (*share)(const SegmentPoolBackwardArgs<T>&, int64_t b, int64_t place, A* shared);
  // out = the sum of shares of rows [dim]; scratch holds as many values.
  void (*combine)(const A* rows, int64_t dim, const RowShare<A>* shares, int64_t count, T* out,
                  A* scratch);
  A (*dot)(const T* x, const A* shared, int64_t dim);
};
using PoolingKernels = ByDtype<SegmentPool>;

template <class T>
struct MaxGradient {
  int32_t row;
  T value;
};

template <class T>
struct SegmentMax {
  // A column of grad_x, `stride` apart: the sum of the values of each row. Equal rows are adjacent.
  void (*scatter)(const MaxGradient<T>* gradients, int64_t count, T* grad_x, int64_t stride);
};
using SegmentMaxKernels = ByDtype<SegmentMax>;

template <class T>
struct SegmentGem {
  using A = Accumulator<T>;
  // Segments [first, last) to out [batch, dim]; scratch holds 2 dim accumulators.
  void (*forward)(const Segments<T>&, A power, A epsilon, int64_t first, int64_t last, A* out,
                  A* scratch);
  // shared [dim] = d loss / d (sum_t w_t f(x_t)) from rows of grad_out and out, and along [1], what
  // the gradients of weights lose; returns the segment's share of d loss / dp. scratch: dim.
  A (*share)(const Segments<T>&, A power, A epsilon, int64_t b, const A* grad_out, const A* out,
             A* shared, A* along, A* scratch);
  // grad_x[i] = f'(x[i]) times the sum of shares of rows; scratch: 2 dim.
  void (*combine)(const A* rows, int64_t dim, const RowShare<A>* shares, int64_t count, const T* x,
                  A power, A epsilon, T* grad_x, A* scratch);
  A (*dot)(const T* x, const A* shared, int64_t dim, A power, A epsilon);  // f(x) . shared
};
using SegmentGemKernels = ByDtype<SegmentGem>;

}  // namespace emblas
