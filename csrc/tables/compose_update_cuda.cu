// Launches what is done with the rows in use of composed tables; shapes alone decide the grids.
#include "tables/launch_cuda.h"
#include "tables/lookup_gradients_cuda.cuh"
#include "tables/update_cuda.cuh"

namespace emblas::cuda {
namespace {

using namespace tables;

UsedRows used_rows(const SortedLookups& sorted) {
  return {sorted.keys, sorted.lookups, sorted.first_row, sorted.first_row + sorted.rows - 1};
}

}  // namespace

void mark_used_rows(const SortedLookups& sorted, int32_t* marks, void* stream) {
  simt::launch(mark_rows, blocks(sorted.lookups, kThreads), kThreads, 0, stream, used_rows(sorted),
               marks);
}

void list_used_rows(const SortedLookups& sorted, const int64_t* ranks, int64_t* rows,
                    int64_t* count, void* stream) {
  simt::launch(list_rows, blocks(sorted.lookups, kThreads), kThreads, 0, stream, used_rows(sorted),
               ranks, rows, count);
}

template <class A>
void count_optimizer_step(const OptimizerStep& step, int64_t* steps, A* corrections, void* stream) {
  simt::launch(count_step<A>, 1, 32, 0, stream, step, steps, corrections);
}
template void count_optimizer_step<float>(const OptimizerStep&, int64_t*, float*, void*);
template void count_optimizer_step<double>(const OptimizerStep&, int64_t*, double*, void*);

template <class T, class E>
void compose_used_gradient(const ComposeGradientArgs<T>& args, const Composed& composed,
                           const SortedLookups& sorted, bool aligned, Accumulator<T>* partial,
                           const int64_t* ranks, E* gradients, int64_t stride, void* stream) {
  const auto run = [&](const auto& source) {
    sum(aligned, source, used_rows(sorted), sorted.lookups, sorted.width, partial,
        StoreUsed<E>{gradients, stride, ranks}, stream);
  };
  if (args.forward.combine != Combine::product && !args.argmax) {
    run(LookupGradients<T, true>{args, composed, sorted.order});
  } else {
    run(LookupGradients<T, false>{args, composed, sorted.order});
  }
}

template <class T>
bool updates_in_sums(Combine combine, BagMode mode, int64_t width) {
  return combine != Combine::product && mode != BagMode::max &&
         column_tiles<T>(RowShape::of<T>(width)) == 1;
}

template <class T>
void compose_update(const ComposeGradientArgs<T>& args, const Composed& composed,
                    const SortedLookups& sorted, bool aligned, Accumulator<T>* partial,
                    const OptimizerStep& step, const OptimizerArgs<T>& optimizer, void* stream) {
  sum(aligned, LookupGradients<T, true>{args, composed, sorted.order}, used_rows(sorted),
      sorted.lookups, sorted.width, partial,
      RowStep<T>{step, optimizer, used_rows(sorted), sorted.width}, stream);
}

template <class T>
void update_used_rows(const SortedLookups& sorted, bool aligned, const Accumulator<T>* gradients,
                      int64_t stride, const OptimizerStep& step, const OptimizerArgs<T>& optimizer,
                      void* stream) {
  simt::launch(aligned ? update_rows<T, true> : update_rows<T, false>,
               blocks(sorted.lookups, kWarps), kThreads, 0, stream,
               RowStep<T>{step, optimizer, used_rows(sorted), sorted.width},
               RowShape::of<T>(sorted.width), gradients, stride);
}

#define EMBLAS_INSTANTIATE_GRADIENT(T, E)                                                   \
  template void compose_used_gradient<T, E>(const ComposeGradientArgs<T>&, const Composed&, \
                                            const SortedLookups&, bool, Accumulator<T>*,    \
                                            const int64_t*, E*, int64_t, void*);
EMBLAS_INSTANTIATE_GRADIENT(float, float)
EMBLAS_INSTANTIATE_GRADIENT(double, double)
EMBLAS_INSTANTIATE_GRADIENT(bfloat16, bfloat16)
EMBLAS_INSTANTIATE_GRADIENT(bfloat16, float)
EMBLAS_INSTANTIATE_GRADIENT(float16, float16)
EMBLAS_INSTANTIATE_GRADIENT(float16, float)

#define EMBLAS_INSTANTIATE(T)                                                                   \
  template bool updates_in_sums<T>(Combine, BagMode, int64_t);                                  \
  template void compose_update<T>(const ComposeGradientArgs<T>&, const Composed&,               \
                                  const SortedLookups&, bool, Accumulator<T>*,                  \
                                  const OptimizerStep&, const OptimizerArgs<T>&, void*);        \
  template void update_used_rows<T>(const SortedLookups&, bool, const Accumulator<T>*, int64_t, \
                                    const OptimizerStep&, const OptimizerArgs<T>&, void*);
EMBLAS_INSTANTIATE(float)
EMBLAS_INSTANTIATE(double)
EMBLAS_INSTANTIATE(bfloat16)
EMBLAS_INSTANTIATE(float16)

}  // namespace emblas::cuda
