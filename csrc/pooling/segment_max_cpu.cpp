// Max pooling on a CPU: the running maximum and its row stay in the first-level cache.
#include "common/isa.h"
#include "pooling/pooling.h"
#include "pooling/rows.h"

namespace emblas {
namespace {

template <class T>
void forward(const Segments<T>& segments, int64_t first, int64_t last, T* out, int32_t* argmax,
             Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  const int64_t dim = segments.dim;
  A* best = scratch;
  A* wide = scratch + dim;
  for (int64_t b = first; b < last; ++b) {
    const Range range = range_of(segments, b, PoolMode::mean);
    int32_t* at = argmax + b * dim;
    bool empty = true;
    for (int64_t p = range.begin; p < range.end; ++p) {
      if (segments.weights && segments.weights[p] == 0) continue;
      const int32_t row = int32_t(segments.index ? segments.index[p] : p);
      const T* x = row_at(segments, p);
      if (empty) {
        widen_row(best, x, dim);
        for (int64_t i = 0; i < dim; ++i) at[i] = row;
        empty = false;
      } else if constexpr (sizeof(T) == sizeof(A)) {
        take_larger(best, at, x, row, dim);
      } else {
        widen_row(wide, x, dim);
        take_larger(best, at, wide, row, dim);
      }
    }
    if (empty) {
      std::memset(out + b * dim, 0, dim * sizeof(T));
      for (int64_t i = 0; i < dim; ++i) at[i] = -1;
    } else {
      scale_row(out + b * dim, best, A(1), dim);
    }
  }
}

template <class T>
void scatter(const MaxGradient<T>* gradients, int64_t count, T* grad_x, int64_t stride) {
  for (int64_t j = 0; j < count;) {
    const int32_t row = gradients[j].row;
    Accumulator<T> total = to_accumulator(gradients[j].value);
    for (++j; j < count && gradients[j].row == row; ++j) {
      total += to_accumulator(gradients[j].value);
    }
    from_accumulator(total, grad_x + row * stride);
  }
}

template <class T>
constexpr SegmentMax<T> kernel{forward<T>, scatter<T>};

}  // namespace

template <>
const SegmentMaxKernels& table_of<SegmentMaxKernels, Isa::EMBLAS_ISA>() {
  static constexpr SegmentMaxKernels table{kernel<float>, kernel<double>, kernel<bfloat16>,
                                           kernel<float16>};
  return table;
}

}  // namespace emblas
