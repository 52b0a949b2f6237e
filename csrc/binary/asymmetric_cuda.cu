// Launches searches by scores of bit codes; shapes alone decide the grids.
#include <algorithm>

#include "binary/asymmetric_cuda.cuh"

namespace emblas::cuda {
namespace {

void scan(const Search& search, const ScoreArgs& args, void* stream) {
  if (search.rows == 0 || search.places() == 0) return;
  const int64_t entries = search.queries * args.bytes * kTableFloats;
  simt::launch(build_tables, unsigned(divide_up(entries, kSearchThreads)), kSearchThreads, 0,
               stream, args, search.queries);
  const SearchPlan& plan = search.plan;
  const int64_t groups = divide_up(search.queries, plan.queries_per_block);
  const int64_t blocks = groups * divide_up(plan.lists.count, plan.lists_per_block());
  const ScoreScanArgs scan{args.codes,
                           int(args.bytes),
                           search.queries,
                           unsigned(groups),
                           plan.tiles_per_list,
                           plan.lists.count,
                           {search.filter, search.places(), search.rows, false},
                           args.tables,
                           args.scale};
  using Sink = KeepNearest<kScoreBits>;
  const int unit = unit_of(args.codes, args.bytes);
  const auto of_unit = [&](auto bytes_16, auto bytes_4, auto bytes_1) {
    return unit == 16 ? bytes_16 : unit == 4 ? bytes_4 : bytes_1;
  };
  const auto kernel =
      plan.queries_per_block == 1
          ? of_unit(scan_scores<1, 16, Sink>, scan_scores<1, 4, Sink>, scan_scores<1, 1, Sink>)
          : of_unit(scan_scores<2, 16, Sink>, scan_scores<2, 4, Sink>, scan_scores<2, 1, Sink>);
  simt::launch(kernel, unsigned(blocks), kSearchThreads, 0, stream, scan,
               Sink{plan.lists, kNoDistance, search.lists, nullptr});
}

}  // namespace

void asymmetric_search(const Search& search, const ScoreArgs& args, float* scores, void* stream) {
  for (int64_t first = 0; first < search.queries; first += kScoreQueries) {
    Search some = search;
    ScoreArgs some_args = args;
    some.queries = std::min(kScoreQueries, search.queries - first);
    some.ids += first * search.k;
    if (some.filter.bitmaps) some.filter.bitmaps += first * search.filter.bitmap_stride;
    some_args.queries += first * args.query_stride;
    scan(some, some_args, stream);
    finish_search<kScoreBits>(some, scores + first * search.k, stream);
  }
}

}  // namespace emblas::cuda
