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

template <class T>
void gather_scores(const DenseArgs<T>& args, const int64_t* ids, int64_t queries, int64_t count,
                   int64_t rows, float* scores, void* stream) {
  const CodeRows documents{reinterpret_cast<const uint8_t*>(args.documents),
                           args.stride * int64_t(sizeof(T)), rows};
  const auto gather = unit_of(documents, 0) == 16 ? gather_rows<T, true> : gather_rows<T, false>;
  simt::launch(gather, unsigned(divide_up(queries * count, kSearchWarps)), kSearchThreads, 0,
               stream, args, ids, queries * count, count, rows, scores);
}

#define EMBLAS_INSTANTIATE(T)                                                                    \
  template void dense_search<T>(const Search&, const DenseArgs<T>&, float*, void*);              \
  template void gather_scores<T>(const DenseArgs<T>&, const int64_t*, int64_t, int64_t, int64_t, \
                                 float*, void*);
EMBLAS_INSTANTIATE(float)
EMBLAS_INSTANTIATE(bfloat16)
EMBLAS_INSTANTIATE(float16)
EMBLAS_INSTANTIATE(int8_t)

}  // namespace emblas::cuda
