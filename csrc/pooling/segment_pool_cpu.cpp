// Segment pooling on a CPU: rows are added one after the other into an accumulator row that stays
// in the first-level cache. Reading several rows at once would save accumulator traffic but breaks
// the one sequential stream that hardware prefetchers follow: half the speed from memory.
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
  return mode == PoolMode::mean_sqrt_len ? 1 / std::sqrt(std::fabs(total)) : 1 / total;
}

template <class T, class Out>
void forward_to(const SegmentPoolArgs<T>& args, int64_t first, int64_t last,
                Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  const Segments<T>& segments = args.segments;
  const int64_t dim = segments.dim;
  for (int64_t b = first; b < last; ++b) {
    const Range range = range_of(segments, b, args.mode);
    std::memset(scratch, 0, dim * sizeof(A));
    for (int64_t p = range.begin; p < range.end; ++p) {
      const A weight = weight_at(segments, range, p, args.mode);
      if (weight == 0) continue;  // a masked row may hold anything, NaN included
      add_row(scratch, row_at(segments, p), weight, dim);
    }
    A factor = inverse_divisor(total_weight(segments, range, args.mode), args.mode);
    Out* out = static_cast<Out*>(args.out) + b * dim;
    const bool empty = factor == 0;  // the weights may cancel without being zero
    if (args.normalize) {
      const A norm = empty ? A(0) : std::sqrt(dot(scratch, scratch, dim)) * std::fabs(factor);
      if (args.norm) args.norm[b] = norm;
      factor /= norm > A(kNormalizeEpsilon) ? norm : A(kNormalizeEpsilon);
    }
    if (empty) {
      std::memset(out, 0, dim * sizeof(Out));
    } else {
      scale_row(out, scratch, factor, dim);
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
Accumulator<T> share_from(const SegmentPoolBackwardArgs<T>& args, int64_t b,
                          Accumulator<T>* shared) {
  using A = Accumulator<T>;
  const int64_t dim = args.segments.dim;
  const A total = total_weight(args.segments, range_of(args.segments, b, args.mode), args.mode);
  const A factor = inverse_divisor(total, args.mode);
  if (factor == 0) {
    std::memset(shared, 0, dim * sizeof(A));
    return 0;
  }
  const Out* grad_out = static_cast<const Out*>(args.grad_out) + b * dim;
  const Out* out = static_cast<const Out*>(args.out) + b * dim;
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
  if (project || !args.grad_weights || args.mode == PoolMode::sum) return 0;  // dm_b . m_b = 0
  const A along = length * dot(out, shared, dim) / factor / total;
  return args.mode == PoolMode::mean_sqrt_len ? along / 2 : along;
}

template <class T>
Accumulator<T> share(const SegmentPoolBackwardArgs<T>& args, int64_t b, Accumulator<T>* shared) {
  return args.wide ? share_from<T, Accumulator<T>>(args, b, shared)
                   : share_from<T, T>(args, b, shared);
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
void backward(const SegmentPoolBackwardArgs<T>& args, int64_t first, int64_t last,
              Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  const Segments<T>& segments = args.segments;
  for (int64_t b = first; b < last; ++b) {
    const Range range = range_of(segments, b, args.mode);
    const A along = share(args, b, scratch);
    clear(args, b == 0 ? 0 : int64_t(segments.ends[b - 1]), range.begin);
    for (int64_t p = range.begin; p < range.end; ++p) {
      if (args.grad_x) {
        T* grad_x = args.grad_x + p * segments.dim;
        const A weight = weight_at(segments, range, p, args.mode);
        if (weight == 0) {
          std::memset(grad_x, 0, segments.dim * sizeof(T));
        } else {
          scale_row(grad_x, scratch, weight, segments.dim);
        }
      }
      if (args.grad_weights) {
        const A steps = args.mode == PoolMode::weighted_mean ? A(p - range.origin + 1) : A(1);
        args.grad_weights[p] =
            takes_one_token(args.mode)
                ? A(0)
                : steps * (dot(row_at(segments, p), scratch, segments.dim) - along);
      }
    }
    const bool is_last = b + 1 == args.batch;
    clear(args, range.end, is_last ? args.positions : int64_t(segments.ends[b]));
  }
}

template <class T>
void combine(const Accumulator<T>* rows, int64_t dim, const int32_t* segments,
             const Accumulator<T>* factors, int64_t count, T* out, Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  if (count == 0) {
    std::memset(out, 0, dim * sizeof(T));
  } else if (count == 1) {
    scale_row(out, rows + segments[0] * dim, factors[0], dim);
  } else {
    sum_rows(rows, dim, segments, factors, count, scratch);
    scale_row(out, scratch, A(1), dim);
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
