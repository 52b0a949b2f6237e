// Launches scans of Hamming distances; shapes alone decide the grids.
#include <algorithm>
#include <bit>

#include "binary/hamming_cuda.cuh"
#include "binary/within_cuda.cuh"

namespace emblas::cuda {
namespace {

// Which places are searched, and the first distance that is too far.
Places places_of(const Search& search) {
  return {search.filter, search.places(), search.rows, search.later_only};
}
unsigned limit_of(int64_t radius, int64_t bytes) {
  return unsigned(std::min(radius, 8 * bytes) + 1);
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

int hamming_queries_per_block(int64_t queries, bool tensor_cores) {
  if (queries == 1) return 1;
  return queries > 4 && tensor_cores && simt::has_sm_80() ? kMmaQueries : 4;
}

void hamming_search(const Search& search, const CodeRows& queries, const CodeRows& codes,
                    int64_t bytes, int64_t radius, int32_t* distances, void* stream) {
  scan(queries, codes, bytes, search.plan, places_of(search),
       KeepNearest<kHammingBits>{search.plan.lists, limit_of(radius, bytes), search.lists,
                                 search.list_counts},
       stream);
  finish_search<kHammingBits>(search, distances, stream);
}

void hamming_count(const Search& search, const CodeRows& queries, const CodeRows& codes,
                   int64_t bytes, int64_t radius, int64_t* offsets, void* stream) {
  const bool scanned = search.rows > 0 && search.places() > 0;
  const int64_t lists = scanned ? search.plan.lists.count : 0;
  scan(queries, codes, bytes, search.plan, places_of(search),
       TakeWithin{limit_of(radius, bytes), lists, search.list_counts, nullptr}, stream);
  simt::launch(begin_lists, 1, kSearchThreads, 0, stream, search.list_counts, lists, search.queries,
               offsets);
}

void hamming_collect(const Search& search, const CodeRows& queries, const CodeRows& codes,
                     int64_t bytes, int64_t radius, const int64_t* offsets, int32_t* distances,
                     void* stream) {
  const unsigned limit = limit_of(radius, bytes);
  scan(queries, codes, bytes, search.plan, places_of(search),
       TakeWithin{limit, search.plan.lists.count, search.list_counts, search.lists}, stream);
  const int digits = int(divide_up(std::bit_width(limit - 1), kDigitBits));
  simt::launch(sort_found, unsigned(divide_up(search.queries, kSearchWarps)), kSearchThreads, 0,
               stream, search.lists, search.merged, offsets, search.queries, std::max(digits, 1),
               search.filter.ids, distances, search.ids);
}

void hamming_distance(const CodeRows& queries, const CodeRows& codes, int64_t bytes,
                      const SearchPlan& plan, int32_t* out, void* stream) {
  scan(queries, codes, bytes, plan, Places{{}, codes.count, codes.count, false},
       WriteDistances{out}, stream);
}

}  // namespace emblas::cuda
