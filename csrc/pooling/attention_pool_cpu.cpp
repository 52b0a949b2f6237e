// Attention pooling on a CPU: a block of tokens small enough for the first cache is scored and then
// added, so each token comes from memory once.
#include "common/fetch.h"
#include "common/isa.h"
#include "pooling/attention_pool.h"
#include "pooling/rows.h"

namespace emblas {
namespace {

// Rows that are accumulators already are used where they are.
template <class T>
const Accumulator<T>* widened(const T* x, int64_t dim, Accumulator<T>* buffer) {
  if constexpr (sizeof(T) == sizeof(Accumulator<T>)) {
    return x;
  } else {
    widen_row(buffer, x, dim);
    return buffer;
  }
}

template <class T>
void forward(const AttentionPoolArgs<T>& args, int64_t first, int64_t last,
             Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  const Segments<T>& segments = args.segments;
  const int64_t dim = segments.dim;
  for (int64_t b = first; b < last; ++b) {
    const Range range = range_of(segments, b, PoolMode::mean);
    A* out = args.out + b * args.heads * dim;
    A* lse = args.lse + b * args.heads;
    std::memset(out, 0, args.heads * dim * sizeof(A));
    A total[kMaxPoolQueries] = {}, largest[kMaxPoolQueries];
    bool empty = true;
    for (int64_t p = range.begin; p < range.end;) {
      const A* rows[kAttentionBlock];
      int64_t count = 0;
      for (; p < range.end && count < kAttentionBlock; ++p) {
        if (segments.weights && segments.weights[p] == 0) continue;
        const T* row = row_at(segments, p);
        fetch_page_ahead(row, dim * int64_t(sizeof(T)));
        rows[count] = widened(row, dim, scratch + count * dim);
        ++count;
      }
      if (count == 0) break;
      for (int64_t h = 0; h < args.heads; ++h) {
        A score[kAttentionBlock];
        A block_largest = 0;
        for (int64_t t = 0; t < count; ++t) {
          score[t] = args.scale * dot(args.queries + h * dim, rows[t], dim);
          if (t == 0 || score[t] > block_largest) block_largest = score[t];
        }
        if (empty) {
          largest[h] = block_largest;
        } else if (block_largest > largest[h]) {
          const A shrink = std::exp(largest[h] - block_largest);
          scale_row(out + h * dim, out + h * dim, shrink, dim);
          total[h] *= shrink;
          largest[h] = block_largest;
        }
        for (int64_t t = 0; t < count; ++t) {
          const A share = std::exp(score[t] - largest[h]);
          total[h] += share;
          add_row(out + h * dim, rows[t], share, dim);
        }
      }
      empty = false;
    }
    for (int64_t h = 0; h < args.heads; ++h) {
      lse[h] = empty ? A(0) : largest[h] + std::log(total[h]);
      if (!empty) scale_row(out + h * dim, out + h * dim, 1 / total[h], dim);
    }
  }
}

template <class T>
void clear(T* grad_x, int64_t begin, int64_t end, int64_t dim) {
  if (begin < end) std::memset(grad_x + begin * dim, 0, (end - begin) * dim * sizeof(T));
}

template <class T>
void backward(const AttentionPoolBackwardArgs<T>& back, int64_t first, int64_t last,
              Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  const AttentionPoolArgs<T>& args = back.forward;
  const Segments<T>& segments = args.segments;
  const int64_t dim = segments.dim, heads = args.heads;
  A *gradient = scratch, *buffer = scratch + dim;
  for (int64_t b = first; b < last; ++b) {
    const Range range = range_of(segments, b, PoolMode::mean);
    const A* grad_out = back.grad_out + b * heads * dim;
    A* grad_queries = back.grad_queries + b * heads * dim;
    std::memset(grad_queries, 0, heads * dim * sizeof(A));
    A along[kMaxPoolQueries];
    for (int64_t h = 0; h < heads; ++h) {
      along[h] = dot(grad_out + h * dim, args.out + (b * heads + h) * dim, dim);
    }
    clear(back.grad_x, b == 0 ? 0 : int64_t(segments.ends[b - 1]), range.begin, dim);
    for (int64_t p = range.begin; p < range.end; ++p) {
      if (segments.weights && segments.weights[p] == 0) {
        clear(back.grad_x, p, p + 1, dim);
        continue;
      }
      fetch_page_ahead(row_at(segments, p), dim * int64_t(sizeof(T)));
      const A* row = widened(row_at(segments, p), dim, buffer);
      std::memset(gradient, 0, dim * sizeof(A));
      for (int64_t h = 0; h < heads; ++h) {
        const A *query = args.queries + h * dim, *grad = grad_out + h * dim;
        const A share = std::exp(args.scale * dot(query, row, dim) - args.lse[b * heads + h]);
        const A slope = args.scale * share * (dot(grad, row, dim) - along[h]);
        add_row(gradient, grad, share, dim);
        add_row(gradient, query, slope, dim);
        add_row(grad_queries + h * dim, row, slope, dim);
      }
      scale_row(back.grad_x + p * dim, gradient, A(1), dim);
    }
    clear(back.grad_x, range.end, b + 1 == args.batch ? args.tokens : int64_t(segments.ends[b]),
          dim);
  }
}

template <class T>
constexpr AttentionPool<T> kernel{forward<T>, backward<T>};

}  // namespace

template <>
const AttentionPoolKernels& table_of<AttentionPoolKernels, Isa::EMBLAS_ISA>() {
  static constexpr AttentionPoolKernels table{kernel<float>, kernel<double>, kernel<bfloat16>,
                                              kernel<float16>};
  return table;
}

}  // namespace emblas
