// Launches max pooling; shapes and addresses alone decide the grids.
#include "pooling/segment_max_cuda.cuh"

namespace emblas::cuda {

template <class T>
void segment_max(const SegmentRows<T>& rows, T* out, int32_t* argmax, void* stream) {
  constexpr int64_t tile = 32 * simt::kVector<T>;
  simt::launch(aligned_rows(rows.segments) ? find_maxima<T, true> : find_maxima<T, false>,
               dim3(unsigned(rows.batch), unsigned((rows.segments.dim + tile - 1) / tile)),
               kMaxThreads, 0, stream, rows, out, argmax);
}

template <class T>
void segment_max_backward(const T* grad_out, const int32_t* argmax, int64_t batch, int64_t rows,
                          int64_t dim, T* grad_x, void* stream) {
  const dim3 grid(unsigned((batch + kOwnSegments - 1) / kOwnSegments),
                  unsigned((dim + kMaxThreads - 1) / kMaxThreads));
  simt::launch(scatter_maxima<T>, grid, kMaxThreads, 0, stream, grad_out, argmax, batch, rows, dim,
               grad_x);
}

#define EMBLAS_INSTANTIATE(T)                                                                    \
  template void segment_max<T>(const SegmentRows<T>&, T*, int32_t*, void*);                      \
  template void segment_max_backward<T>(const T*, const int32_t*, int64_t, int64_t, int64_t, T*, \
                                        void*);
EMBLAS_INSTANTIATE(float)
EMBLAS_INSTANTIATE(double)
EMBLAS_INSTANTIATE(bfloat16)
EMBLAS_INSTANTIATE(float16)

}  // namespace emblas::cuda
