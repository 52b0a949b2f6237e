// Launches the gradients of rows and weights; shapes and addresses alone decide the grids.
#include "pooling/segment_gradients_cuda.cuh"

namespace emblas::cuda {
namespace {

unsigned blocks(int64_t items, int64_t of_block) {
  return unsigned((items + of_block - 1) / of_block);
}

template <class T>
bool whole_vectors(const T* data, int64_t dim) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && dim % simt::kVector<T> == 0;
}

}  // namespace

template <class T>
void order_spans(const Contributions<T>& parts, int64_t* order, int32_t* starts, int32_t* reach,
                 void* stream) {
  simt::launch(rank_spans<T>, blocks(parts.rows.batch, kThreads), kThreads, 0, stream, parts, order,
               starts, reach);
}

template <class T>
void row_keys(const Contributions<T>& parts, int32_t* keys, void* stream) {
  simt::launch(write_row_keys<T>, blocks(parts.rows.positions, kThreads), kThreads, 0, stream,
               parts, keys);
}

template <class T>
void row_gradients(const Contributions<T>& parts, const Order& order, const Accumulator<T>* power,
                   Accumulator<T> epsilon, T* grad_x, void* stream) {
  const Segments<T>& segments = parts.rows.segments;
  const bool aligned = whole_vectors(grad_x, segments.dim) && (!power || aligned_rows(segments));
  simt::launch(aligned ? write_row_gradients<T, true> : write_row_gradients<T, false>,
               blocks(parts.rows.rows, kWarps * kWarpRows), kThreads, 0, stream, parts, order,
               power, epsilon, grad_x);
}

template <class T>
void weight_gradients(const Contributions<T>& parts, const Order& order,
                      const Accumulator<T>* power, Accumulator<T> epsilon,
                      Accumulator<T>* grad_weights, void* stream) {
  const Segments<T>& segments = parts.rows.segments;
  const bool aligned = aligned_rows(segments) && segments.dim % simt::kVector<T> == 0;
  simt::launch(aligned ? write_weight_gradients<T, true> : write_weight_gradients<T, false>,
               blocks(parts.rows.positions, kWarps * kWarpRows), kThreads, 0, stream, parts, order,
               power, epsilon, grad_weights);
}

#define EMBLAS_INSTANTIATE(T)                                                                     \
  template void order_spans<T>(const Contributions<T>&, int64_t*, int32_t*, int32_t*, void*);     \
  template void row_keys<T>(const Contributions<T>&, int32_t*, void*);                            \
  template void row_gradients<T>(const Contributions<T>&, const Order&, const Accumulator<T>*,    \
                                 Accumulator<T>, T*, void*);                                      \
  template void weight_gradients<T>(const Contributions<T>&, const Order&, const Accumulator<T>*, \
                                    Accumulator<T>, Accumulator<T>*, void*);
EMBLAS_INSTANTIATE(float)
EMBLAS_INSTANTIATE(double)
EMBLAS_INSTANTIATE(bfloat16)
EMBLAS_INSTANTIATE(float16)

}  // namespace emblas::cuda
