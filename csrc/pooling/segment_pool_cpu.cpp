// Segment pooling on a CPU: rows are added one after the other into an accumulator row that stays
// in the first-level cache. Reading several rows at once would save accumulator traffic but breaks
// the one sequential stream that hardware prefetchers follow: half the speed from memory.
#include "common/isa.h"
#include "common/simd.h"
#include "pooling/pooling.h"

namespace emblas {
namespace {

// total[i] += weight * row[i]
template <class T>
void add_row(Accumulator<T>* total, const T* row, Accumulator<T> weight, int64_t dim) {
  constexpr int lanes = kLanes<T>;
  int64_t i = 0;
  for (; i + lanes <= dim; i += lanes) store(total + i, load(total + i) + weight * load(row + i));
  for (; i < dim; ++i) total[i] += weight * to_accumulator(row[i]);
}

// out[i] = factor * x[i]
template <class T>
void scale_row(T* out, const Accumulator<T>* x, Accumulator<T> factor, int64_t dim) {
  constexpr int lanes = kLanes<T>;
  int64_t i = 0;
  for (; i + lanes <= dim; i += lanes) store(out + i, factor * load(x + i));
  for (; i < dim; ++i) from_accumulator(factor * x[i], out + i);
}

template <class A>
A total_weight(const A* weights, int64_t begin, int64_t end) {
  if (!weights) return A(end - begin);
  A total = 0;
  for (int64_t t = begin; t < end; ++t) total += weights[t];
  return total;
}

template <class T>
void forward(const SegmentPoolArgs<T>& args, int64_t first, int64_t last, Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  for (int64_t b = first; b < last; ++b) {
    const int64_t begin = args.cu_seqlens[b], end = args.cu_seqlens[b + 1];
    std::memset(scratch, 0, args.dim * sizeof(A));
    for (int64_t t = begin; t < end; ++t) {
      const A weight = args.weights ? args.weights[t] : A(1);
      if (weight == 0) continue;  // a masked row may hold anything, NaN included
      add_row(scratch, args.x + t * args.row_stride, weight, args.dim);
    }
    const A total = total_weight(args.weights, begin, end);
    A factor = total == 0 ? A(0) : 1 / total;
    if (args.normalize) {
      const A norm = std::sqrt(dot(scratch, scratch, args.dim)) * std::fabs(factor);
      if (args.norm) args.norm[b] = norm;
      factor /= norm > A(kNormalizeEpsilon) ? norm : A(kNormalizeEpsilon);
    }
    T* out = args.out + b * args.dim;
    if (total == 0) {
      std::memset(out, 0, args.dim * sizeof(T));  // the weights may cancel without being zero
    } else {
      scale_row(out, scratch, factor, args.dim);
    }
  }
}

// scratch = dm_b, returns m_b . dm_b
template <class T>
Accumulator<T> mean_gradient(const SegmentPoolBackwardArgs<T>& args, int64_t b,
                             Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  const T* grad_out = args.grad_out + b * args.dim;
  const T* out = args.out + b * args.dim;
  A length = 1, along = 0;
  bool project = false;
  if (args.normalize) {
    project = args.norm[b] > A(kNormalizeEpsilon);
    length = project ? args.norm[b] : A(kNormalizeEpsilon);
    along = dot(out, grad_out, args.dim);
  }
  const A removed = project ? along : A(0);
  for (int64_t i = 0; i < args.dim; ++i) {
    scratch[i] = (to_accumulator(grad_out[i]) - removed * to_accumulator(out[i])) / length;
  }
  if (project) return 0;  // dm_b is orthogonal to m_b
  return args.grad_weights ? length * dot(out, scratch, args.dim) : A(0);
}

template <class T>
void backward(const SegmentPoolBackwardArgs<T>& args, int64_t first, int64_t last,
              Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  for (int64_t b = first; b < last; ++b) {
    const int64_t begin = args.cu_seqlens[b], end = args.cu_seqlens[b + 1];
    const A total = total_weight(args.weights, begin, end);
    const A along_mean = total == 0 ? A(0) : mean_gradient(args, b, scratch);
    for (int64_t t = begin; t < end; ++t) {
      const A w = args.weights ? args.weights[t] : A(1);
      if (args.grad_x) {
        T* grad_x = args.grad_x + t * args.dim;
        if (total == 0 || w == 0) {
          std::memset(grad_x, 0, args.dim * sizeof(T));
        } else {
          scale_row(grad_x, scratch, w / total, args.dim);
        }
      }
      if (args.grad_weights) {
        args.grad_weights[t] =
            total == 0
                ? A(0)
                : (dot(args.x + t * args.row_stride, scratch, args.dim) - along_mean) / total;
      }
    }
  }
}

template <class T>
constexpr SegmentPool<T> kernel{forward<T>, backward<T>};

}  // namespace

template <>
const PoolingKernels& table_of<PoolingKernels, Isa::EMBLAS_ISA>() {
  static constexpr PoolingKernels table{kernel<float>, kernel<double>, kernel<bfloat16>,
                                        kernel<float16>};
  return table;
}

}  // namespace emblas
