// Launches the finishing of pooled vectors; shapes and addresses alone decide the grids.
#include "pooling/finish_cuda.cuh"

namespace emblas::cuda {
namespace {

template <class A>
bool aligned_rows(const FinishArgs<A>& args) {
  return reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && args.dim * sizeof(A) % 16 == 0;
}

template <FinishKind kind, class A, class Out>
void launch_finish(const FinishArgs<A>& args, const A* ranges, Out* out, void* stream) {
  int64_t width = 0;
  for (int d = 0; d < args.count; ++d) {
    width += kind == FinishKind::bits ? (args.dims[d] + 7) / 8 : args.dims[d];
  }
  const auto kernel =
      aligned_rows(args) ? finish_rows<A, Out, kind, true> : finish_rows<A, Out, kind, false>;
  simt::launch(kernel, dim3(unsigned(args.rows), unsigned(args.count)), kFinishThreads, 0, stream,
               args, width, ranges, out);
}

}  // namespace

template <class T>
void finish(const FinishArgs<Accumulator<T>>& args, T* out, void* stream) {
  const Accumulator<T>* no_ranges = nullptr;
  launch_finish<FinishKind::floating>(args, no_ranges, out, stream);
}

template <class A>
void finish_int8(const FinishArgs<A>& args, const A* ranges, int8_t* out, void* stream) {
  launch_finish<FinishKind::int8>(args, ranges, out, stream);
}

template <class A>
void finish_bits(const FinishArgs<A>& args, uint8_t* out, void* stream) {
  const A* no_ranges = nullptr;
  launch_finish<FinishKind::bits>(args, no_ranges, out, stream);
}

template <class A>
void finish_backward(const FinishArgs<A>& args, const A* grad_out, A* grad_x, void* stream) {
  int64_t width = 0;
  for (int d = 0; d < args.count; ++d) width += args.dims[d];
  const auto kernel = aligned_rows(args) ? finish_gradients<A, true> : finish_gradients<A, false>;
  simt::launch(kernel, unsigned(args.rows), kFinishThreads, 0, stream, args, width, grad_out,
               grad_x);
}

template void finish<float>(const FinishArgs<float>&, float*, void*);
template void finish<double>(const FinishArgs<double>&, double*, void*);
template void finish<bfloat16>(const FinishArgs<float>&, bfloat16*, void*);
template void finish<float16>(const FinishArgs<float>&, float16*, void*);
#define EMBLAS_INSTANTIATE(A)                                                   \
  template void finish_int8<A>(const FinishArgs<A>&, const A*, int8_t*, void*); \
  template void finish_bits<A>(const FinishArgs<A>&, uint8_t*, void*);          \
  template void finish_backward<A>(const FinishArgs<A>&, const A*, A*, void*);
EMBLAS_INSTANTIATE(float)
EMBLAS_INSTANTIATE(double)

}  // namespace emblas::cuda
