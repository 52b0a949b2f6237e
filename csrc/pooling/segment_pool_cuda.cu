// Launches segment pooling; shapes and addresses alone decide the grids.
#include "pooling/segment_pool_cuda.cuh"

namespace emblas::cuda {

template <class T>
void segment_pool(const SegmentPoolArgs<T>& args, void* stream) {
  launch_sums<false>(args.sums, stream);
  simt::launch(finish_pooled<T>, unsigned(args.sums.rows.batch), kThreads, 0, stream, args);
}

template <class T>
void segment_pool_contributions(const SegmentPoolBackwardArgs<T>& args, void* stream) {
  simt::launch(pool_contributions<T>, unsigned(args.parts.rows.batch), kThreads, 0, stream, args);
}

#define EMBLAS_INSTANTIATE(T)                                      \
  template void segment_pool<T>(const SegmentPoolArgs<T>&, void*); \
  template void segment_pool_contributions<T>(const SegmentPoolBackwardArgs<T>&, void*);
EMBLAS_INSTANTIATE(float)
EMBLAS_INSTANTIATE(double)
EMBLAS_INSTANTIATE(bfloat16)
EMBLAS_INSTANTIATE(float16)

}  // namespace emblas::cuda
