// Chosen rows of attention on a CPU. Rows are few: a vector of y is read for all heads of its group
// in turn, and the bytes of y from the second-level cache limit each of the three passes.
#include "attention/attention_rows.h"
#include "attention/vectors_cpu.h"
#include "common/isa.h"

namespace emblas {
namespace {

// to += factor from
template <class T>
void add_scaled(Accumulator<T>* to, const T* from, Accumulator<T> factor, int64_t dim) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t i = 0;
  for (; i + lanes <= dim; i += lanes) store(to + i, load(to + i) + factor * load(from + i));
  for (; i < dim; ++i) to[i] += factor * to_accumulator(from[i]);
}

template <class T>
void dots(const RowsShape& shape, HeadVectors<const T> x, HeadVectors<const T> y, Accumulator<T>* s,
          int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    Accumulator<T>* const scores = s + row * shape.heads * shape.max_length;
    const int64_t length = shape.lengths[row];
    for (int64_t h = 0; h < shape.heads; ++h) {
      const T* const vector = x.at(row, h);
      for (int64_t j = 0; j < length; ++j) {
        const T* const other = y.at(shape.starts[row] + j, h / shape.heads_per_group);
        scores[h * shape.max_length + j] = dot(vector, other, shape.dim);
      }
      for (int64_t j = length; j < shape.max_length; ++j) scores[h * shape.max_length + j] = 0;
    }
  }
}

template <class T>
void sums(const RowsShape& shape, const Accumulator<T>* s, HeadVectors<const T> y, HeadVectors<T> x,
          int64_t first, int64_t last, Accumulator<T>* scratch) {
  for (int64_t row = first; row < last; ++row) {
    const Accumulator<T>* const weights = s + row * shape.heads * shape.max_length;
    for (int64_t i = 0; i < shape.heads * shape.dim; ++i) scratch[i] = 0;
    for (int64_t j = 0; j < shape.lengths[row]; ++j) {
      for (int64_t h = 0; h < shape.heads; ++h) {
        add_scaled(scratch + h * shape.dim, y.at(shape.starts[row] + j, h / shape.heads_per_group),
                   weights[h * shape.max_length + j], shape.dim);
      }
    }
    for (int64_t h = 0; h < shape.heads; ++h) {
      for (int64_t i = 0; i < shape.dim; ++i) {
        from_accumulator(scratch[h * shape.dim + i], x.at(row, h) + i);
      }
    }
  }
}

template <class T>
void outer(const RowsShape& shape, const Accumulator<T>* s, HeadVectors<const T> x, int64_t rows,
           HeadVectors<Accumulator<T>> y, int64_t first, int64_t last) {
  for (int64_t row = 0; row < rows; ++row) {
    const Accumulator<T>* const weights = s + row * shape.heads * shape.max_length;
    for (int64_t j = 0; j < shape.lengths[row]; ++j) {
      for (int64_t h = first * shape.heads_per_group; h < last * shape.heads_per_group; ++h) {
        add_scaled(y.at(shape.starts[row] + j, h / shape.heads_per_group), x.at(row, h),
                   weights[h * shape.max_length + j], shape.dim);
      }
    }
  }
}

template <class T>
constexpr AttentionRows<T> kernel{dots<T>, sums<T>, outer<T>};

}  // namespace

template <>
const AttentionRowsKernels& table_of<AttentionRowsKernels, Isa::EMBLAS_ISA>() {
  static constexpr AttentionRowsKernels table{kernel<float>, kernel<double>, kernel<bfloat16>,
                                              kernel<float16>};
  return table;
}

}  // namespace emblas
