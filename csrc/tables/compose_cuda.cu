// Launches the kernels of composed tables; shapes alone decide the grids.
#include "tables/compose_backward_cuda.cuh"
#include "tables/launch_cuda.h"
#include "tables/lookup_gradients_cuda.cuh"

namespace emblas::cuda {

using namespace tables;

template <class T>
void compose_bag(const ComposeBagArgs<T>& args, const Composed& composed, bool aligned, T* out,
                 int32_t* argmax, void* stream) {
  unsigned tiles = 0;
  for (int p = 0; p < composed.num_parts; p += composed.parts[p].slot_size) {
    tiles += column_tiles<T>(RowShape::of<T>(composed.parts[p].width));
  }
  const int64_t bags = args.ids.bags;
  if (!args.ids.offsets) {
    simt::launch(aligned ? compose_ids<T, true> : compose_ids<T, false>,
                 dim3(blocks(bags, kWarps * kSlotIds), tiles), kThreads, 0, stream, args, composed,
                 out);
  } else if (args.mode == BagMode::max) {
    simt::launch(aligned ? compose_bags<T, true, true> : compose_bags<T, false, true>,
                 dim3(blocks(bags, kWarps), tiles), kThreads, 0, stream, args, composed, out,
                 argmax);
  } else {
    simt::launch(aligned ? compose_bags<T, true, false> : compose_bags<T, false, false>,
                 dim3(blocks(bags, kWarps), tiles), kThreads, 0, stream, args, composed, out,
                 argmax);
  }
}

void compose_lookups(const ComposedIds& ids, const Composed& composed, const int32_t* segment_of,
                     int64_t rows, uint32_t* numbers, int32_t* keys, void* stream) {
  simt::launch(write_lookups, dim3(blocks(ids.count, kThreads), composed.most_parts), kThreads, 0,
               stream, ids, composed, segment_of, rows, numbers, keys);
}

template <class A>
void bag_scales(const ComposedIds& ids, const Composed& composed, A* scale, void* stream) {
  const int64_t segments = composed.num_features * ids.bags;
  simt::launch(count_bags<A>, blocks(segments, kWarps), kThreads, 0, stream, ids, segments, scale);
}
template void bag_scales<float>(const ComposedIds&, const Composed&, float*, void*);
template void bag_scales<double>(const ComposedIds&, const Composed&, double*, void*);

template <class T>
void compose_table_gradient(const ComposeGradientArgs<T>& args, const Composed& composed,
                            const TableGradient<T>& table, bool aligned, Accumulator<T>* partial,
                            void* stream) {
  const Segments segments{table.bounds, table.rows, table.lookups};
  const bool whole = args.forward.combine != Combine::product && !args.argmax;
  const auto run = [&](const auto& source) {
    sum(aligned, source, segments, table.lookups, table.width, partial,
        StoreRows<T>{table.grad, table.width}, stream);
  };
  if (whole) {
    run(LookupGradients<T, true>{args, composed, table.order});
  } else {
    run(LookupGradients<T, false>{args, composed, table.order});
  }
}

template <class T>
void compose_weight_gradient(const ComposeGradientArgs<T>& args, const Composed& composed,
                             int64_t most_width, bool aligned, Accumulator<T>* grad_weights,
                             void* stream) {
  const auto shape = RowShape::of<T>(most_width);
  simt::launch(aligned ? dot_slots<T, true> : dot_slots<T, false>,
               blocks(args.forward.ids.count, kThreads / shape.lanes), kThreads, 0, stream, args,
               composed, shape, grad_weights);
}

#define EMBLAS_INSTANTIATE(T)                                                                     \
  template void compose_bag<T>(const ComposeBagArgs<T>&, const Composed&, bool, T*, int32_t*,     \
                               void*);                                                            \
  template void compose_table_gradient<T>(const ComposeGradientArgs<T>&, const Composed&,         \
                                          const TableGradient<T>&, bool, Accumulator<T>*, void*); \
  template void compose_weight_gradient<T>(const ComposeGradientArgs<T>&, const Composed&,        \
                                           int64_t, bool, Accumulator<T>*, void*);
EMBLAS_INSTANTIATE(float)
EMBLAS_INSTANTIATE(double)
EMBLAS_INSTANTIATE(bfloat16)
EMBLAS_INSTANTIATE(float16)

}  // namespace emblas::cuda
