// Gradients of ids that repeat, as words do in texts: those of one id are added up first, so that
// an id's rows are looked up and added to once, not once for each time that the id comes.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "common/aligned.h"
#include "common/hash.h"
#include "common/isa.h"
#include "tables/bags.h"
#include "tables/compose.h"

namespace emblas {

struct Repeats {
  std::unique_ptr<int64_t[]> ids;        // in the order in which they come first
  std::unique_ptr<int64_t[]> positions;  // of each id in turn, rising
  std::vector<int32_t> starts;           // where those of each id begin, and their end

  int64_t distinct() const { return int64_t(starts.size()) - 1; }
};

// The ids of a batch, each `step` elements after the one before, where at most half of them differ.
inline std::optional<Repeats> find_repeats(const int64_t* ids, int64_t step, int64_t count) {
  constexpr int64_t sample = 256;  // a batch shorter than this takes little time either way
  if (count < sample || count > INT32_MAX) return std::nullopt;
  int bits = 1;
  while (int64_t(1) << bits < 2 * count) ++bits;
  const uint64_t mask = (uint64_t(1) << bits) - 1;
  std::vector<int32_t> places(mask + 1, -1);  // a hash table of numbers of ids
  Repeats repeats{std::unique_ptr<int64_t[]>(new int64_t[count]),
                  std::unique_ptr<int64_t[]>(new int64_t[count]),
                  {}};
  const std::unique_ptr<int32_t[]> numbers(new int32_t[count]);
  std::vector<int32_t>& starts = repeats.starts;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t id = ids[i * step];
    uint64_t place = splitmix64_mix(uint64_t(id)) & mask;
    while (places[place] >= 0 && repeats.ids[places[place]] != id) place = (place + 1) & mask;
    if (places[place] < 0) {
      places[place] = int32_t(starts.size());
      repeats.ids[starts.size()] = id;
      starts.push_back(0);
    }
    ++starts[numbers[i] = places[place]];
    // The more ids have come, the more of them repeat.
    if (i == sample && 4 * int64_t(starts.size()) > 3 * sample) return std::nullopt;
  }
  if (2 * int64_t(starts.size()) > count) return std::nullopt;
  int32_t end = 0;
  for (int32_t& start : starts) {
    const int32_t begin = end;
    end += start;
    start = begin;
  }
  for (int64_t i = 0; i < count; ++i) repeats.positions[starts[numbers[i]]++] = i;
  starts.insert(starts.begin(), 0);  // each start has become the next one
  return repeats;
}

// The sums [distinct, dim] of the rows [count, dim] at the positions of each id: bags of rows, as a
// table's are.
template <class T>
std::unique_ptr<T[]> sum_repeats(const Repeats& repeats, const T* rows, int64_t count,
                                 int64_t dim) {
  std::unique_ptr<T[]> sums(new T[repeats.distinct() * dim]);
  const Part part{0, int64_t(KeyKind::radix), 1, 0, 1, count, count, 0, dim, dim, 0, 0};
  const Feature feature{&part, 1,     repeats.positions.get(), 0,
                        1,     count, repeats.starts.data(),   nullptr};
  const ComposeArgs<T> args{Combine::sum, BagMode::sum,       rows, nullptr, 0,
                            nullptr,      repeats.distinct(), dim};
  const auto& kernel = kernels<ComposeKernels>().compose.of(T{});
  for_bags(repeats.starts.data(), repeats.distinct(), dim * int64_t(sizeof(T)),
           [&](int64_t first, int64_t last) {
             const AlignedArray<Accumulator<T>> scratch = aligned_array<Accumulator<T>>(2 * dim);
             kernel.forward(args, feature, first, last, scratch.get(), sums.get(), nullptr);
           });
  return sums;
}

}  // namespace emblas
