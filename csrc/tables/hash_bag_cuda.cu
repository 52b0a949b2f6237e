// Launches the kernels of hashed tables; shapes alone decide the grids.
#include "tables/hash_bag_cuda.cuh"
#include "tables/launch_cuda.h"

namespace emblas::cuda {
namespace {

using namespace tables;

// Rows of the table, of an array [..., dim] beside it.
template <class T>
bool aligned_with(const HashBagArgs<T>& args, const T* rows) {
  return aligned_rows(args.table, args.row_stride) && aligned_rows(rows, args.dim);
}

template <class T>
HashedRows<T> hashed_rows(const HashBagArgs<T>& args) {
  return {args.hashed, args.table, args.row_stride, args.weights};
}

}  // namespace

template <class Key>
void hash_keys(const HashedIds& hashed, const BagNumbers& bags, Key* keys, void* stream) {
  simt::launch(hash_ids<Key>,
               dim3(blocks(hashed.count, kThreads), blocks(hashed.num_hashes, kKeys)), kThreads, 0,
               stream, hashed, bags, keys);
}
template void hash_keys<int32_t>(const HashedIds&, const BagNumbers&, int32_t*, void*);
template void hash_keys<int64_t>(const HashedIds&, const BagNumbers&, int64_t*, void*);

void bag_numbers(const int32_t* offsets, int64_t bags, int64_t ids, int32_t* numbers,
                 void* stream) {
  simt::launch(find_bags, blocks(ids, kThreads), kThreads, 0, stream, offsets, bags, ids, numbers);
}

void row_bounds(const int32_t* keys, int64_t lookups, int64_t rows, int32_t* bounds, void* stream) {
  simt::launch(find_bounds, blocks(rows + 1, kThreads), kThreads, 0, stream, keys, lookups, rows,
               bounds);
}

template <class T>
void hash_lookup(const HashBagArgs<T>& args, T* out, void* stream) {
  const auto shape = RowShape::of<T>(args.dim);
  const auto kernel = aligned_with(args, out) ? look_up<T, true> : look_up<T, false>;
  simt::launch(kernel, dim3(blocks(args.hashed.count, kWarps * kTileIds), column_tiles<T>(shape)),
               kThreads, 0, stream, hashed_rows(args), shape, out);
}

template <class T>
void hash_bag(const HashBagArgs<T>& args, const int32_t* offsets, int64_t bags,
              Accumulator<T>* partial, T* out, void* stream) {
  const Segments segments{offsets, bags, args.hashed.count};
  sum(aligned_with(args, out), hashed_rows(args), segments, args.hashed.count, args.dim, partial,
      StoreRows<T>{out, args.dim}, stream);
}

template <class T>
void hash_bag_grad_table(const HashBagTableArgs<T>& args, Accumulator<T>* partial, void* stream) {
  const Segments segments{args.bounds, args.rows, args.lookups};
  const bool aligned =
      aligned_rows(args.grad_out, args.dim) && aligned_rows(args.grad_table, args.dim);
  sum(aligned, SortedGradients<T>{args}, segments, args.lookups, args.dim, partial,
      StoreRows<T>{args.grad_table, args.dim}, stream);
}

template <class T>
void hash_bag_grad_weights(const HashBagArgs<T>& args, const BagNumbers& bags, const T* grad_out,
                           Accumulator<T>* grad_weights, void* stream) {
  HashedRows<T> rows = hashed_rows(args);
  rows.weights = nullptr;
  const auto kernel = aligned_with(args, grad_out) ? dot_rows<T, true> : dot_rows<T, false>;
  simt::launch(kernel, blocks(args.hashed.count, kWarps * kTileIds), kThreads, 0, stream, rows,
               bags, RowShape::of<T>(args.dim), grad_out, grad_weights);
}

#define EMBLAS_INSTANTIATE(T)                                                                    \
  template void hash_lookup<T>(const HashBagArgs<T>&, T*, void*);                                \
  template void hash_bag<T>(const HashBagArgs<T>&, const int32_t*, int64_t, Accumulator<T>*, T*, \
                            void*);                                                              \
  template void hash_bag_grad_table<T>(const HashBagTableArgs<T>&, Accumulator<T>*, void*);      \
  template void hash_bag_grad_weights<T>(const HashBagArgs<T>&, const BagNumbers&, const T*,     \
                                         Accumulator<T>*, void*);
EMBLAS_INSTANTIATE(float)
EMBLAS_INSTANTIATE(double)
EMBLAS_INSTANTIATE(bfloat16)
EMBLAS_INSTANTIATE(float16)

}  // namespace emblas::cuda
