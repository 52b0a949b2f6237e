// Launches exact searches of vectors; shapes alone decide the grids.
#include "binary/dense_cuda.cuh"

namespace emblas::cuda {

template <class T>
void dense_search(const Search& search, const DenseArgs<T>& args, float* scores, void* stream) {
  const SearchPlan& plan = search.plan;
  if (search.queries > 0 && search.rows > 0 && search.places() > 0) {
    constexpr int64_t size = sizeof(T);
    const CodeRows documents{reinterpret_cast<const uint8_t*>(args.documents), args.stride * size,
                             search.rows};
    const int64_t groups = divide_up(search.queries, plan.queries_per_block);
    const int64_t blocks = groups * divide_up(plan.lists.count, plan.lists_per_block());
    const DenseScanArgs scan{documents,
                             int(args.dim * size),
                             args.queries,
                             args.query_stride,
                             search.queries,
                             args.dim,
                             args.metric,
                             unsigned(groups),
                             plan.tiles_per_list,
                             plan.lists.count,
                             {search.filter, search.places(), search.rows, false}};
    using Sink = KeepNearest<kScoreBits>;
    constexpr int small = sizeof(T) == 4 ? 4 : 1;
    const bool wide = unit_of(documents, args.dim * size) == 16;
    const auto kernel = plan.queries_per_block == 1
                            ? (wide ? scan_dense<T, 1, 16, Sink> : scan_dense<T, 1, small, Sink>)
                            : (wide ? scan_dense<T, 4, 16, Sink> : scan_dense<T, 4, small, Sink>);
    simt::launch(kernel, unsigned(blocks), kSearchThreads, 0, stream, scan,
                 Sink{plan.lists, kNoDistance, search.lists, nullptr});
  }
  finish_search<kScoreBits>(search, scores, stream);
}

template void dense_search<float>(const Search&, const DenseArgs<float>&, float*, void*);
template void dense_search<bfloat16>(const Search&, const DenseArgs<bfloat16>&, float*, void*);
template void dense_search<float16>(const Search&, const DenseArgs<float16>&, float*, void*);
template void dense_search<int8_t>(const Search&, const DenseArgs<int8_t>&, float*, void*);

}  // namespace emblas::cuda
