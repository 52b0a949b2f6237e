// Launches segment pooling; shapes alone decide the grids.
#include "pooling/segment_pool_cuda.cuh"

namespace emblas::cuda {
namespace {

template <class T>
bool aligned_rows(const T* data, int64_t row_stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride * sizeof(T) % 16 == 0;
}

}  // namespace

template <class T>
void segment_pool(const SegmentPoolArgs<T>& args, int64_t batch, int64_t tokens,
                  Accumulator<T>* partial, void* stream) {
  const dim3 slots(unsigned(segment_pool_slots(batch, tokens)),
                   unsigned((args.dim + kTileColumns<T> - 1) / kTileColumns<T>));
  const auto sum =
      aligned_rows(args.x, args.row_stride) ? sum_chunks<T, true> : sum_chunks<T, false>;
  if (batch > 0 && tokens > 0)
    simt::launch(sum, slots, kThreads, 0, stream, args, batch, tokens, partial);
  simt::launch(finish_means<T>, unsigned(batch), kThreads, 0, stream, args, tokens, partial);
}

template <class T>
void segment_pool_backward(const SegmentPoolBackwardArgs<T>& args, int64_t batch, int64_t tokens,
                           Accumulator<T>* scratch, void* stream) {
  if (batch == 0 || tokens == 0) return;
  const MeanGradients<Accumulator<T>> means{scratch, scratch + batch * args.dim,
                                            scratch + batch * args.dim + batch};
  const bool aligned = aligned_rows(args.grad_x, args.dim) &&
                       (!args.grad_weights || aligned_rows(args.x, args.row_stride));
  const auto write = aligned ? token_gradients<T, true> : token_gradients<T, false>;
  simt::launch(mean_gradients<T>, unsigned(batch), kThreads, 0, stream, args, tokens, means);
  simt::launch(write, unsigned(segment_pool_slots(batch, tokens)), kThreads, 0, stream, args, batch,
               tokens, means);
}

#define EMBLAS_INSTANTIATE(T)                                                                 \
  template void segment_pool<T>(const SegmentPoolArgs<T>&, int64_t, int64_t, Accumulator<T>*, \
                                void*);                                                       \
  template void segment_pool_backward<T>(const SegmentPoolBackwardArgs<T>&, int64_t, int64_t, \
                                         Accumulator<T>*, void*);
EMBLAS_INSTANTIATE(float)
EMBLAS_INSTANTIATE(double)
EMBLAS_INSTANTIATE(bfloat16)
EMBLAS_INSTANTIATE(float16)

}  // namespace emblas::cuda
