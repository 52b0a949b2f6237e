// Launches attention pooling; shapes and addresses alone decide the grids.
#include "pooling/attention_pool_cuda.cuh"

namespace emblas::cuda {
namespace {

template <class T>
bool whole_vectors(const AttentionArgs<T>& args) {
  const Segments<T>& segments = args.rows.segments;
  constexpr int64_t size = sizeof(T);
  return reinterpret_cast<uintptr_t>(segments.x) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(args.queries) % 16 == 0 && segments.dim * size % 16 == 0 &&
         segments.row_stride * size % 16 == 0 && segments.plane_stride * size % 16 == 0;
}

template <class T>
unsigned slots_of(const AttentionArgs<T>& args) {
  return args.rows.batch == 0 ? 0 : unsigned(chunk_slots(args.rows.batch, args.rows.positions));
}

// visit(std::integral_constant) with the number of queries of a block; four of them in double
// precision take too many registers.
template <class T, class Visit>
void visit_heads(const AttentionArgs<T>& args, const Visit& visit) {
  constexpr int most = sizeof(T) == 8 ? 1 : 4;
  const dim3 all(slots_of(args), unsigned((args.heads + most - 1) / most));
  if (args.heads == 1) {
    visit(std::integral_constant<int, 1>{}, all);
  } else {
    visit(std::integral_constant<int, most>{}, all);
  }
}

}  // namespace

template <class T>
void attention_pool(const AttentionArgs<T>& args, const AttentionParts<Accumulator<T>>& parts,
                    Accumulator<T>* out, Accumulator<T>* lse, void* stream) {
  visit_heads(args, [&](auto heads, dim3 grid) {
    const auto kernel = whole_vectors(args) ? attend<T, heads(), true> : attend<T, heads(), false>;
    simt::launch(kernel, grid, kAttendThreads, 0, stream, args, parts);
  });
  simt::launch(merge_parts<T>, dim3(unsigned(args.rows.batch), unsigned(args.heads)),
               kAttendThreads, 0, stream, args, parts, out, lse);
}

template <class T>
void attention_pool_backward(const AttentionArgs<T>& args, const AttentionGradients<T>& gradients,
                             void* stream) {
  const bool aligned = whole_vectors(args) &&
                       reinterpret_cast<uintptr_t>(gradients.grad_out) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(gradients.out) % 16 == 0;
  visit_heads(args, [&](auto heads, dim3 grid) {
    const auto kernel = aligned ? slopes<T, heads(), true> : slopes<T, heads(), false>;
    simt::launch(kernel, grid, kAttendThreads, 0, stream, args, gradients);
  });
  simt::launch(add_parts<T>, dim3(unsigned(args.rows.batch), unsigned(args.heads)), kAttendThreads,
               0, stream, args, gradients);
  const auto kernel = aligned ? row_gradients<T, true> : row_gradients<T, false>;
  simt::launch(kernel, slots_of(args), kAttendThreads, 0, stream, args, gradients);
}

#define EMBLAS_INSTANTIATE(T)                                                                     \
  template void attention_pool<T>(const AttentionArgs<T>&, const AttentionParts<Accumulator<T>>&, \
                                  Accumulator<T>*, Accumulator<T>*, void*);                       \
  template void attention_pool_backward<T>(const AttentionArgs<T>&, const AttentionGradients<T>&, \
                                           void*);
EMBLAS_INSTANTIATE(float)
EMBLAS_INSTANTIATE(double)
EMBLAS_INSTANTIATE(bfloat16)
EMBLAS_INSTANTIATE(float16)

}  // namespace emblas::cuda
