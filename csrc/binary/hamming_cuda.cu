// Plans and launches searches; shapes alone decide the grids.
#include <algorithm>

#include "binary/hamming_cuda.cuh"

namespace emblas::cuda {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A list never holds more than what it is offered.
int64_t capacity(int64_t keep, int64_t offered) { return std::min(keep + kListSlack, offered); }

int unit_of(const CodeRows& rows, int64_t bytes) {
  const uint64_t all =
      reinterpret_cast<uintptr_t>(rows.data) | uint64_t(rows.stride) | uint64_t(bytes);
  return all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : 1;
}

template <int queries>
void scan(const ScanArgs& args, void* stream) {
  const int unit = std::min(unit_of(args.queries, args.bytes), unit_of(args.codes, args.bytes));
  const auto kernel = unit == 16  ? scan_codes<queries, 16>
                      : unit == 4 ? scan_codes<queries, 4>
                                  : scan_codes<queries, 1>;
  const int64_t blocks =
      divide_up(args.queries.count, queries) * divide_up(args.lists.count, kSearchWarps / queries);
  simt::launch(kernel, unsigned(blocks), kSearchThreads, 0, stream, args);
}

}  // namespace

SearchPlan plan_search(int64_t queries, int64_t rows, int64_t k, int64_t blocks) {
  SearchPlan plan;
  plan.queries_per_block = queries == 1 ? 1 : queries <= 4 ? 4 : 8;
  const int64_t groups = std::max<int64_t>(divide_up(queries, plan.queries_per_block), 1);
  const int64_t lists =
      std::max<int64_t>(blocks / groups, 1) * (kSearchWarps / plan.queries_per_block);
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

void hamming_topk(const HammingTopkArgs& args, void* stream) {
  const int64_t queries = args.queries.count;
  if (queries == 0) return;
  const SearchPlan& plan = args.plan;
  const int64_t places = args.filter.ids ? args.filter.id_count : args.codes.count;
  Lists lists = plan.lists;
  if (args.codes.count > 0 && places > 0) {
    const ScanArgs scan_args{args.queries,
                             args.codes,
                             int(args.bytes),
                             args.filter,
                             places,
                             unsigned(8 * args.bytes + 1),
                             unsigned(divide_up(queries, plan.queries_per_block)),
                             plan.tiles_per_list,
                             lists,
                             args.lists};
    switch (plan.queries_per_block) {
      case 1:
        scan<1>(scan_args, stream);
        break;
      case 4:
        scan<4>(scan_args, stream);
        break;
      default:
        scan<8>(scan_args, stream);
    }
  } else {
    lists.keep = 0;
  }
  uint64_t *from = args.lists, *to = args.merged;
  while (lists.count > 1) {
    const Lists merged = merged_lists(lists, args.k);
    simt::launch(merge_lists, unsigned(divide_up(queries * merged.count, kSearchWarps)),
                 kSearchThreads, 0, stream, from, lists, to, merged, queries);
    lists = merged;
    std::swap(from, to);
  }
  simt::launch(rank_entries, unsigned(queries * divide_up(args.k, kSearchThreads)), kSearchThreads,
               0, stream, from, lists, args.k, args.filter.ids, args.distances, args.ids);
}

}  // namespace emblas::cuda
