// Launches pooling in several modes; shapes and addresses alone decide the grids.
#include "pooling/segment_modes_cuda.cuh"

namespace emblas::cuda {

template <class T>
void segment_pool_modes(const SegmentPoolModesArgs<T>& args, void* stream) {
  const SegmentRows<T>& rows = args.sums.rows;
  const int64_t tiles = (rows.segments.dim + kTileColumns<T> - 1) / kTileColumns<T>;
  if (rows.batch > 0 && rows.positions > 0 && (args.sums.partial || args.stepped || args.largest)) {
    simt::launch(aligned_rows(rows.segments) ? take_chunks<T, true> : take_chunks<T, false>,
                 dim3(unsigned(args.sums.slots()), unsigned(tiles)), kThreads, 0, stream, args);
  }
  simt::launch(finish_modes<T>, unsigned(rows.batch), kThreads, 0, stream, args);
}

#define EMBLAS_INSTANTIATE(T) \
  template void segment_pool_modes<T>(const SegmentPoolModesArgs<T>&, void*);
EMBLAS_INSTANTIATE(float)
EMBLAS_INSTANTIATE(double)
EMBLAS_INSTANTIATE(bfloat16)
EMBLAS_INSTANTIATE(float16)

}  // namespace emblas::cuda
