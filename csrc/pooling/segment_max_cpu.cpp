// The gradient of max pooling on a CPU; segment_pool_cpu.cpp finds the maxima.
#include "common/isa.h"
#include "pooling/pooling.h"
#include "pooling/rows.h"

namespace emblas {
namespace {

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
constexpr SegmentMax<T> kernel{scatter<T>};

}  // namespace

template <>
const SegmentMaxKernels& table_of<SegmentMaxKernels, Isa::EMBLAS_ISA>() {
  static constexpr SegmentMaxKernels table{kernel<float>, kernel<double>, kernel<bfloat16>,
                                           kernel<float16>};
  return table;
}

}  // namespace emblas
