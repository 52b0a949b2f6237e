// Segment pooling on a CPU: rows are added one after the other into an accumulator row that stays
// in the first-level cache. Reading several rows at once would save accumulator traffic but breaks
// the one sequential stream that hardware prefetchers follow: half the speed from memory. Several
// modes have a row each, into which a token goes while it is in that cache too.
#include "common/fetch.h"
#include "common/isa.h"
#include "pooling/pooling.h"
#include "pooling/rows.h"

namespace emblas {
namespace {

template <class T>
Accumulator<T> total_weight(const Segments<T>& segments, const Range& range, PoolMode mode) {
  using A = Accumulator<T>;
  if (!segments.weights && mode != PoolMode::weighted_mean) return A(range.end - range.begin);
  A total = 0;
  for (int64_t p = range.begin; p < range.end; ++p) total += weight_at(segments, range, p, mode);
  return total;
}

// 1 / d_b; 0 where "empty means zero"
template <class A>
A inverse_divisor(A total, PoolMode mode) {
  if (mode == PoolMode::sum) return 1;
  if (total == 0) return 0;
  if (mode == PoolMode::max) return 1;
  return mode == PoolMode::mean_sqrt_len ? 1 / std::sqrt(std::fabs(total)) : 1 / total;
}

// Takes a row into the maxima of those before it, if there are any; `wide` is scratch.
template <class T>
void take_row(Accumulator<T>* best, int32_t* argmax, bool any, const T* row, int64_t p, int64_t dim,
              Accumulator<T>* wide) {
  const int32_t at = int32_t(p);
  if (!any) {
    widen_row(best, row, dim);
    for (int64_t i = 0; i < dim; ++i) argmax[i] = at;
  } else if constexpr (sizeof(T) == sizeof(Accumulator<T>)) {
    take_larger(best, argmax, row, at, dim);
  } else {
    widen_row(wide, row, dim);
    take_larger(best, argmax, wide, at, dim);
  }
}

// Divides what there is of a segment in the mode of this place, and stores it.
template <class T, class Out>
void finish(const SegmentPoolArgs<T>& args, int64_t b, int64_t place, const Range& range,
            const Accumulator<T>* pooled) {
  using A = Accumulator<T>;
  const int64_t dim = args.segments.dim;
  const PoolMode mode = args.modes.at[place];
  A factor = inverse_divisor(total_weight(args.segments, range, mode), mode);
  Out* out = static_cast<Out*>(args.out) + (b * args.modes.count + place) * dim;
  const bool empty = factor == 0;  // the weights may cancel without being zero
  if (args.normalize) {
    const A norm = empty ? A(0) : std::sqrt(dot(pooled, pooled, dim)) * std::fabs(factor);
    if (args.norm) args.norm[b] = norm;
    factor /= norm > A(kNormalizeEpsilon) ? norm : A(kNormalizeEpsilon);
  }
  if (!empty) return scale_row(out, pooled, factor, dim);
  std::memset(out, 0, dim * sizeof(Out));
  for (int64_t i = 0; mode == PoolMode::max && i < dim; ++i) args.argmax[b * dim + i] = -1;
}

template <class T, class Out>
void forward_to(const SegmentPoolArgs<T>& args, int64_t first, int64_t last,
                Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  const Segments<T>& segments = args.segments;
  const PoolModes& modes = args.modes;
  const int64_t dim = segments.dim;
  for (int64_t b = first; b < last; ++b) {
    Range ranges[kPoolModes];
    for (int64_t m = 0; m < modes.count; ++m) ranges[m] = range_of(segments, b, modes.at[m]);
    std::memset(scratch, 0, modes.count * dim * sizeof(A));
    bool any = false;  // in the maxima
    const Range range = range_of(segments, b, modes);
    for (int64_t p = range.begin; p < range.end; ++p) {
      fetch_page_ahead(row_at(segments, p), dim * int64_t(sizeof(T)));
      // No share of a masked row, which may hold anything, NaN included.
      for_shares(segments, modes, ranges, 0, args.argmax, p, [&](const RowShare<A>& share) {
        A* pooled = scratch + share.number * dim;
        const T* row = row_at(segments, p);
        if (modes.at[share.number] != PoolMode::max) {
          return add_row(pooled, row, share.factor, dim);
        }
        take_row(pooled, args.argmax + b * dim, any, row, p, dim, scratch + modes.count * dim);
        any = true;
      });
    }
    for (int64_t m = 0; m < modes.count; ++m) {
      finish<T, Out>(args, b, m, ranges[m], scratch + m * dim);
    }
  }
}

template <class T>
void forward(const SegmentPoolArgs<T>& args, int64_t first, int64_t last, Accumulator<T>* scratch) {
  if (args.wide) {
    forward_to<T, Accumulator<T>>(args, first, last, scratch);
  } else {
    forward_to<T, T>(args, first, last, scratch);
  }
}

template <class T, class Out>
Accumulator<T> share_from(const SegmentPoolBackwardArgs<T>& args, int64_t b, int64_t place,
                          Accumulator<T>* shared) {
  using A = Accumulator<T>;
  const int64_t dim = args.segments.dim, number = b * args.modes.count + place;
  const PoolMode mode = args.modes.at[place];
  const A total = total_weight(args.segments, range_of(args.segments, b, mode), mode);
  const A factor = inverse_divisor(total, mode);
  if (factor == 0) {
    std::memset(shared, 0, dim * sizeof(A));
    return 0;
  }
  const Out* grad_out = static_cast<const Out*>(args.grad_out) + number * dim;
  const Out* out = static_cast<const Out*>(args.out) + number * dim;
  A length = 1, removed = 0;
  bool project = false;
  if (args.normalize) {
    project = args.norm[b] > A(kNormalizeEpsilon);
    length = project ? args.norm[b] : A(kNormalizeEpsilon);
    if (project) removed = dot(out, grad_out, dim);
  }
  for (int64_t i = 0; i < dim; ++i) {
    shared[i] =
        (to_accumulator(grad_out[i]) - removed * to_accumulator(out[i])) * (factor / length);
  }
  if (!args.grad_weights || !weighs(mode) || mode == PoolMode::sum) return 0;
  if (project) return 0;  // dm_b . m_b = 0
  const A along = length * dot(out, shared, dim) / factor / total;
  return mode == PoolMode::mean_sqrt_len ? along / 2 : along;
}

template <class T>
Accumulator<T> share(const SegmentPoolBackwardArgs<T>& args, int64_t b, int64_t place,
                     Accumulator<T>* shared) {
  return args.wide ? share_from<T, Accumulator<T>>(args, b, place, shared)
                   : share_from<T, T>(args, b, place, shared);
}

template <class T>
void clear(const SegmentPoolBackwardArgs<T>& args, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const int64_t count = end - begin, dim = args.segments.dim;
  if (args.grad_x) std::memset(args.grad_x + begin * dim, 0, count * dim * sizeof(T));
  if (args.grad_weights) {
    std::memset(args.grad_weights + begin, 0, count * sizeof(Accumulator<T>));
  }
}

template <class T>
void combine(const Accumulator<T>* rows, int64_t dim, const RowShare<Accumulator<T>>* shares,
             int64_t count, T* out, Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  if (count == 0) {
    std::memset(out, 0, dim * sizeof(T));
  } else if (count == 1 && !shares->argmax) {
    scale_row(out, rows + shares->number * dim, shares->factor, dim);
  } else {
    sum_rows(rows, dim, shares, count, scratch);
    scale_row(out, scratch, A(1), dim);
  }
}

template <class T>
void backward(const SegmentPoolBackwardArgs<T>& args, int64_t first, int64_t last,
              Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  const Segments<T>& segments = args.segments;
  const PoolModes& modes = args.modes;
  const int64_t dim = segments.dim;
  for (int64_t b = first; b < last; ++b) {
    Range ranges[kPoolModes];
    A along[kPoolModes];
    for (int64_t m = 0; m < modes.count; ++m) {
      ranges[m] = range_of(segments, b, modes.at[m]);
      along[m] = share(args, b, m, scratch + m * dim);
    }
    const Range range = range_of(segments, b, modes);
    clear(args, b == 0 ? 0 : int64_t(segments.ends[b - 1]), range.begin);
    for (int64_t p = range.begin; p < range.end; ++p) {
      if (args.grad_x) {
        const int32_t* argmax = args.argmax ? args.argmax + b * dim : nullptr;
        RowShare<A> shares[kPoolModes];
        int64_t count = 0;
        for_shares(segments, modes, ranges, 0, argmax, p,
                   [&](const RowShare<A>& share) { shares[count++] = share; });
        combine(scratch, dim, shares, count, args.grad_x + p * dim, scratch + modes.count * dim);
      }
      if (args.grad_weights) {
        A slope = 0;
        for (int64_t m = 0; m < modes.count; ++m) {
          if (!weighs(modes.at[m])) continue;
          slope += steps_at<A>(range, p, modes.at[m]) *
                   (dot(row_at(segments, p), scratch + m * dim, dim) - along[m]);
        }
        args.grad_weights[p] = slope;
      }
    }
    const bool is_last = b + 1 == args.batch;
    clear(args, range.end, is_last ? args.positions : int64_t(segments.ends[b]));
  }
}

template <class T>
constexpr SegmentPool<T> kernel{forward<T>, backward<T>, share<T>, combine<T>,
                                dot<T, Accumulator<T>>};

}  // namespace

template <>
const PoolingKernels& table_of<PoolingKernels, Isa::EMBLAS_ISA>() {
  static constexpr PoolingKernels table{kernel<float>, kernel<double>, kernel<bfloat16>,
                                        kernel<float16>};
  return table;
}

}  // namespace emblas
