// Launches the generalized mean; shapes and addresses alone decide the grids.
#include "pooling/segment_gem_cuda.cuh"

namespace emblas::cuda {

template <class T>
void segment_gem(const SegmentSums<T>& sums, Accumulator<T>* out, void* stream) {
  launch_sums<true>(sums, stream);
  simt::launch(finish_roots<T>, unsigned(sums.rows.batch), kThreads, 0, stream, sums, out);
}

template <class T>
void segment_gem_contributions(const Contributions<T>& parts, const Accumulator<T>* power,
                               Accumulator<T> epsilon, const Accumulator<T>* grad_out,
                               const Accumulator<T>* out, Accumulator<T>* grad_power,
                               void* stream) {
  const GemBackwardArgs<T> args{parts, power, epsilon, grad_out, out, grad_power};
  const auto kernel =
      aligned_rows(parts.rows.segments) ? gem_contributions<T, true> : gem_contributions<T, false>;
  simt::launch(kernel, unsigned(parts.rows.batch), kThreads, 0, stream, args);
}

#define EMBLAS_INSTANTIATE(T)                                                                \
  template void segment_gem<T>(const SegmentSums<T>&, Accumulator<T>*, void*);               \
  template void segment_gem_contributions<T>(const Contributions<T>&, const Accumulator<T>*, \
                                             Accumulator<T>, const Accumulator<T>*,          \
                                             const Accumulator<T>*, Accumulator<T>*, void*);
EMBLAS_INSTANTIATE(float)
EMBLAS_INSTANTIATE(double)
EMBLAS_INSTANTIATE(bfloat16)
EMBLAS_INSTANTIATE(float16)

}  // namespace emblas::cuda
