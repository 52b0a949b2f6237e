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

template <class Sink>
void scan(const CodeRows& queries, const CodeRows& codes, int64_t bytes, const SearchPlan& plan,
          const Places& places, const Sink& sink, void* stream) {
  if (queries.count == 0 || codes.count == 0 || places.count == 0) return;
  const int unit = std::min(unit_of(queries, bytes), unit_of(codes, bytes));
  const auto of_unit = [&](auto bytes_16, auto bytes_4, auto bytes_1) {
    return unit == 16 ? bytes_16 : unit == 4 ? bytes_4 : bytes_1;
  };
  const auto kernel =
      plan.queries_per_block == 1
          ? of_unit(scan_codes<1, 16, Sink>, scan_codes<1, 4, Sink>, scan_codes<1, 1, Sink>)
      : plan.queries_per_block == 4
          ? of_unit(scan_codes<4, 16, Sink>, scan_codes<4, 4, Sink>, scan_codes<4, 1, Sink>)
          : of_unit(scan_codes_by_mma<16, Sink>, scan_codes_by_mma<4, Sink>,
                    scan_codes_by_mma<1, Sink>);
  const int64_t groups = divide_up(queries.count, plan.queries_per_block);
  const int64_t blocks = groups * divide_up(plan.lists.count, plan.lists_per_block());
  const ScanArgs args{queries,          codes, int(bytes), unsigned(groups), plan.tiles_per_list,
                      plan.lists.count, places};
  simt::launch(kernel, unsigned(blocks), kSearchThreads, 0, stream, args, sink);
}

}  // namespace

SearchPlan plan_search(int64_t queries, int64_t rows, int64_t k, int64_t blocks,
                       bool tensor_cores) {
  SearchPlan plan;
  plan.queries_per_block = queries == 1                                       ? 1
                           : queries > 4 && tensor_cores && simt::has_sm_80() ? kMmaQueries
                                                                              : 4;
  const int64_t groups = std::max<int64_t>(divide_up(queries, plan.queries_per_block), 1);
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

void hamming_search(const SearchArgs& args, void* stream) {
  const int64_t queries = args.queries.count;
  if (queries == 0) return;
  const Places places{args.filter, args.filter.ids ? args.filter.id_count : args.codes.count,
                      args.codes.count, args.later_only};
  Lists lists = args.plan.lists;
  if (args.codes.count == 0 || places.count == 0) lists = {};
  const unsigned limit = unsigned(std::min(args.radius, 8 * args.bytes) + 1);
  scan(args.queries, args.codes, args.bytes, args.plan, places,
       KeepNearest{lists, limit, args.lists, args.list_counts}, stream);
  if (args.list_counts) {
    simt::launch(sum_counts, unsigned(divide_up(queries, kSearchWarps)), kSearchThreads, 0, stream,
                 args.list_counts, lists.count, queries, args.counts);
  }
  uint64_t *from = args.lists, *to = args.merged;
  while (lists.count > 1 && args.k > 0) {
    const Lists merged = merged_lists(lists, args.k);
    simt::launch(merge_lists, unsigned(divide_up(queries * merged.count, kSearchWarps)),
                 kSearchThreads, 0, stream, from, lists, to, merged, queries);
    lists = merged;
    std::swap(from, to);
  }
  simt::launch(rank_entries, unsigned(queries * divide_up(args.k, kSearchThreads)), kSearchThreads,
               0, stream, from, lists, args.k, args.filter.ids, args.distances, args.ids);
}

void hamming_distance(const CodeRows& queries, const CodeRows& codes, int64_t bytes,
                      const SearchPlan& plan, int32_t* out, void* stream) {
  scan(queries, codes, bytes, plan, Places{{}, codes.count, codes.count, false},
       WriteDistances{out}, stream);
}

}  // namespace emblas::cuda
