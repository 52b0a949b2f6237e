// Plans searches, and launches what follows their scans; shapes alone decide the grids.
#include <algorithm>

#include "binary/merge_cuda.cuh"

namespace emblas::cuda {
namespace {

// A list never holds more than what it is offered.
int64_t capacity(int64_t keep, int64_t offered) { return std::min(keep + kListSlack, offered); }

}  // namespace

SearchPlan plan_search(int64_t queries, int64_t rows, int64_t k, int64_t blocks,
                       int queries_per_block) {
  SearchPlan plan;
  plan.queries_per_block = queries_per_block;
  const int64_t groups = std::max<int64_t>(divide_up(queries, queries_per_block), 1);
  const int64_t lists = std::max<int64_t>(blocks / groups, 1) * plan.lists_per_block();
  const int64_t tiles = std::max<int64_t>(divide_up(rows, kTileRows), 1);
  plan.tiles_per_list = divide_up(tiles, lists);
  const int keep = int(std::min(k, plan.rows_per_list()));
  plan.lists = {divide_up(tiles, plan.tiles_per_list), keep, capacity(keep, plan.rows_per_list())};
  return plan;
}

Lists merged_lists(const Lists& lists, int64_t k) {
  const int64_t offered = int64_t(kMergedLists) * lists.keep;
  const int keep = int(std::min(k, offered));
  return {divide_up(lists.count, kMergedLists), keep, capacity(keep, offered)};
}

Workspaces search_workspaces(const SearchPlan& plan, int64_t queries, int64_t k) {
  Workspaces sizes{};
  Lists lists = plan.lists;
  for (bool even = true;; even = !even) {
    int64_t& size = even ? sizes.lists : sizes.merged;
    size = std::max(size, queries * lists.count * lists.capacity);
    if (lists.count == 1) return sizes;
    lists = merged_lists(lists, k);
  }
}

template <int bits, class Value>
void finish_search(const Search& search, Value* values, void* stream) {
  Lists lists = search.plan.lists;
  if (search.rows == 0 || search.places() == 0) lists = {};  // no scan has filled them
  if (search.list_counts) {
    simt::launch(sum_counts, unsigned(divide_up(search.queries, kSearchWarps)), kSearchThreads, 0,
                 stream, search.list_counts, lists.count, search.queries, search.counts);
  }
  uint64_t *from = search.lists, *to = search.merged;
  while (lists.count > 1 && search.k > 0) {
    const Lists merged = merged_lists(lists, search.k);
    simt::launch(merge_lists<bits>,
                 unsigned(divide_up(search.queries * merged.count, kSearchWarps)), kSearchThreads,
                 0, stream, from, lists, to, merged, search.queries);
    lists = merged;
    std::swap(from, to);
  }
  simt::launch(rank_entries<Value>, unsigned(search.queries * divide_up(search.k, kSearchThreads)),
               kSearchThreads, 0, stream, from, lists, search.k, search.filter.ids, values,
               search.ids);
}

template void finish_search<kHammingBits>(const Search&, int32_t*, void*);
template void finish_search<kScoreBits>(const Search&, float*, void*);

}  // namespace emblas::cuda
