// The scan of scan.h. One vector holds the same byte of 16, 32 or 64 codes.
#include <type_traits>

#include "binary/interleave_cpu.h"
#include "binary/scan.h"
#include "common/isa.h"
#include "common/simd.h"

namespace emblas {
namespace {

typedef uint8_t Bytes __attribute__((vector_size(EMBLAS_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(EMBLAS_VECTOR_BYTES)));
typedef Bytes BytesUnaligned __attribute__((aligned(1), may_alias));

constexpr int kGroups = int(kBlock) / EMBLAS_VECTOR_BYTES;  // vectors per byte position of a block

// table[index] of 16 entries, for indices below 16.
inline Bytes look_up(const uint8_t* table, Bytes index) {
#if defined(EMBLAS_HAS_AVX512)
  const __m512i entries = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table));
  return (Bytes)_mm512_shuffle_epi8(entries, (__m512i)index);
#elif defined(EMBLAS_HAS_AVX2)
  const __m256i entries = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
  return (Bytes)_mm256_shuffle_epi8(entries, (__m256i)index);
#elif defined(EMBLAS_HAS_NEON)
  return (Bytes)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)index);
#elif defined(__clang__)
  Bytes out;
  for (int i = 0; i < EMBLAS_VECTOR_BYTES; ++i) out[i] = table[index[i]];
  return out;
#else
  return __builtin_shuffle(*(const BytesUnaligned*)table, index);
#endif
}

[[maybe_unused]] inline bool any(Bytes mask) {
#if defined(EMBLAS_HAS_AVX2)
  __m256i halves[EMBLAS_VECTOR_BYTES / 32];
  std::memcpy(halves, &mask, sizeof mask);
  return _mm256_movemask_epi8(halves[0]) != 0;
#elif defined(EMBLAS_HAS_NEON)
  return vmaxvq_u8((uint8x16_t)mask) != 0;
#else
  typedef uint64_t Words __attribute__((vector_size(EMBLAS_VECTOR_BYTES)));
  const Words words = (Words)mask;
  return (words[0] | words[1]) != 0;
#endif
}

// x >> 8 of halves. On Zen 4 a multiplication leaves the ports of shuffles and shifts to the
// tables.
inline Halves high_bytes(Bytes x) {
#if defined(EMBLAS_HAS_AVX512)
  return (Halves)_mm512_maddubs_epi16((__m512i)x, _mm512_set1_epi16(0x0100));
#else
  return (Halves)x >> 8;
#endif
}

inline Bytes add_saturated(Bytes a, Bytes b) {
#if defined(EMBLAS_HAS_AVX512)
  return (Bytes)_mm512_adds_epu8((__m512i)a, (__m512i)b);
#elif defined(EMBLAS_HAS_AVX2)
  return (Bytes)_mm256_adds_epu8((__m256i)a, (__m256i)b);
#elif defined(EMBLAS_HAS_NEON)
  return (Bytes)vqaddq_u8((uint8x16_t)a, (uint8x16_t)b);
#else
  const Bytes sum = a + b;
  return sum | (Bytes)(sum < a);
#endif
}

// Fetches the codes of the next tile line by line while others are worked on. Spread evenly: the
// few lines that a core can wait for at a time would otherwise hold up the scan.
class Fetcher {
 public:
  Fetcher(const Rows& next, int64_t bytes, int64_t positions) : next_(next), bytes_(bytes) {
    if (!next_.rows && next_.stride == bytes_) {  // one long row
      bytes_ *= next_.count;
      next_.count = next_.count > 0;
    }
    const int64_t lines = next_.count * ((bytes_ + 63) / 64);
    rate_ = positions > 0 ? (lines * kLine + positions - 1) / positions : 0;
  }

  void step(int64_t positions) {
    for (due_ += rate_ * positions; due_ >= kLine; due_ -= kLine) {
      if (line_ >= end_) {
        if (row_ >= next_.count) return;
        line_ = next_.at(row_++);
        end_ = line_ + bytes_;
      }
      // Lines that come this fast (few queries) would hold each other up on their way to L1.
      rate_ < kLine ? __builtin_prefetch(line_) : __builtin_prefetch(line_, 0, 2);
      line_ += 64;
    }
  }

 private:
  static constexpr int64_t kLine = 256;

  Rows next_;
  int64_t bytes_, rate_, due_ = 0, row_ = 0;
  const uint8_t *line_ = nullptr, *end_ = nullptr;
};

// kBlock codes of a tile.
struct Block {
  const uint8_t* bytes;
  const uint8_t* highest;  // of each group the field of highest bits; null if the counter has none

  // Vector g of a byte position, of a group's highest bits.
  Bytes at(int64_t position, int g) const { return load(bytes, position, g); }
  Bytes highest_at(int64_t group, int g) const { return load(highest, group, g); }

 private:
  static Bytes load(const uint8_t* from, int64_t row, int g) {
    return *(const BytesUnaligned*)(from + row * kBlock + g * EMBLAS_VECTOR_BYTES);
  }
};

// Each counts one group of byte positions of a vector of codes against one query.
struct NibbleCounter {
  static constexpr int64_t kGroup = 1, kWidth = 32;  // byte positions; prepared bytes
  static constexpr bool kHighest = false;
  struct Codes {
    Bytes low, high;
  };
  static Codes split(const Block& block, int64_t group, int g) {
    const Bytes codes = block.at(group, g), high = (Bytes)((Halves)codes >> 4);
    return {codes & 15, high & 15};
  }
  static Bytes count(const Codes& codes, const uint8_t* prepared) {
    return look_up(prepared, codes.low) + look_up(prepared + 16, codes.high);
  }
};

#if defined(EMBLAS_HAS_VBMI)
struct TableCounter {
  static constexpr int64_t kGroup = 3, kWidth = 256;
  static constexpr bool kHighest = true;
  static constexpr TableLayout kLayout{6, 3, 4};
  struct Codes {
    Bytes fields[4];
  };
  // Of an index, the low 6 bits count.
  static Codes split(const Block& block, int64_t group, int g) {
    const int64_t p = 3 * group;
    return {{block.at(p, g), block.at(p + 1, g), block.at(p + 2, g), block.highest_at(group, g)}};
  }
  static Bytes count(const Codes& codes, const uint8_t* prepared) {
    const auto field = [&](int f) {
      return (Bytes)_mm512_permutexvar_epi8((__m512i)codes.fields[f],
                                            _mm512_loadu_si512(prepared + 64 * f));
    };
    return (field(0) + field(1)) + (field(2) + field(3));
  }
};
#else
struct TableCounter : NibbleCounter {
  static constexpr TableLayout kLayout{4, 1, 2};
};
#endif

#if defined(EMBLAS_HAS_BITALG) || defined(EMBLAS_HAS_NEON)
struct HammingCounter {
  static constexpr int64_t kGroup = 1;
  static constexpr bool kHighest = false;
#if defined(EMBLAS_HAS_BITALG)
  static constexpr int64_t kWidth = 4;  // a 32-bit broadcast is free, that of a byte is a shuffle
#else
  static constexpr int64_t kWidth = 1;
#endif
  using Codes = Bytes;
  static Codes split(const Block& block, int64_t group, int g) { return block.at(group, g); }
  static Bytes count(Bytes codes, const uint8_t* prepared) {
#if defined(EMBLAS_HAS_BITALG)
    int query;
    std::memcpy(&query, prepared, 4);
    return (Bytes)_mm512_popcnt_epi8(_mm512_xor_si512((__m512i)codes, _mm512_set1_epi32(query)));
#else
    return (Bytes)vcntq_u8(veorq_u8((uint8x16_t)codes, vld1q_dup_u8(prepared)));
#endif
  }
};
void prepare_hamming(const uint8_t* query, int64_t bytes, uint8_t* prepared) {
  constexpr int64_t width = HammingCounter::kWidth;
  for (int64_t i = 0; i < bytes * width; ++i) prepared[i] = query[i / width];
}
#else
using HammingCounter = NibbleCounter;
void prepare_hamming(const uint8_t* query, int64_t bytes, uint8_t* prepared) {
  for (int64_t p = 0; p < bytes; ++p) {
    for (int n = 0; n < 16; ++n) {
      prepared[p * 32 + n] = uint8_t(__builtin_popcount(n ^ (query[p] & 15)));
      prepared[p * 32 + 16 + n] = uint8_t(__builtin_popcount(n ^ (query[p] >> 4)));
    }
  }
}
#endif
constexpr int64_t kHammingRun = 31;  // byte positions of at most 8 bits stay below 256

// What is added up in bytes before they are widened: the end of the run that begins at a group.
template <class Counter>
class Runs {
 public:
  explicit Runs(const ScanArgs& args) : ends_(args.runs) {}
  int64_t after(int64_t) { return *ends_++; }

 private:
  const int64_t* ends_;
};
template <>
class Runs<HammingCounter> {
 public:
  explicit Runs(const ScanArgs& args) : bytes_(args.bytes) {}
  int64_t after(int64_t begin) const {
    return begin + kHammingRun < bytes_ ? begin + kHammingRun : bytes_;
  }

 private:
  int64_t bytes_;
};

template <class Counter>
constexpr int kQueriesAtOnce = EMBLAS_VECTOR_BYTES == 64 ? 4 : 2;

// The sums of a block, or of some of its vectors: of the codes of even and of odd number, as they
// leave the bytes. Vector v belongs to query v / groups. (Indices of one dimension let the compiler
// unroll the loops early enough to keep all of this in registers.)
template <int queries, int groups = kGroups>
struct Sums {
  static constexpr int kVectors = queries * groups;
  Halves even[kVectors], odd[kVectors];
};

template <class Counter>
inline int64_t prepared_bytes(const ScanArgs& args) {
  return (args.bytes + Counter::kGroup - 1) / Counter::kGroup * Counter::kWidth;
}

template <class Counter>
inline Block block_at(const ScanArgs& args, int64_t first) {
  Block block{args.tile + first * args.bytes, nullptr};
  if constexpr (Counter::kHighest) {
    block.highest = args.highest + first * Counter::kLayout.groups(args.bytes);
  }
  return block;
}

// Adds up groups [begin, end) of byte positions; there is one at least.
template <class Counter, int queries, int groups>
inline void add_bytes(const ScanArgs& args, const Block& block, const uint8_t* prepared,
                      int64_t begin, int64_t end, Bytes (&counts)[queries * groups]) {
  const int64_t stride = prepared_bytes<Counter>(args);
  const auto add = [&](int64_t p, auto first) __attribute__((always_inline)) {
    typename Counter::Codes codes[groups];
    for (int g = 0; g < groups; ++g) codes[g] = Counter::split(block, p, g);
    const uint8_t* tables = prepared + p * Counter::kWidth;
    for (int v = 0; v < queries * groups; ++v) {
      const Bytes count = Counter::count(codes[v % groups], tables + v / groups * stride);
      counts[v] = decltype(first)::value ? count : counts[v] + count;
    }
  };
  add(begin, std::true_type{});
  for (int64_t p = begin + 1; p < end; ++p) add(p, std::false_type{});
}

template <class Counter, int queries, int groups>
inline Sums<queries, groups> block_sums(const ScanArgs& args, const Block& block,
                                        const uint8_t* prepared, Fetcher& fetcher) {
  constexpr int vectors = queries * groups;
  Halves both[vectors], odd[vectors];
  for (int v = 0; v < vectors; ++v) both[v] = odd[v] = Halves{};
  Runs<Counter> runs(args);
  const int64_t count = (args.bytes + Counter::kGroup - 1) / Counter::kGroup;
  int64_t begin = 0;
  do {
    const int64_t end = runs.after(begin);
    fetcher.step(Counter::kGroup * (end - begin));
    Bytes counts[vectors];
    add_bytes<Counter, queries, groups>(args, block, prepared, begin, end, counts);
    for (int v = 0; v < vectors; ++v) {
      both[v] += (Halves)counts[v];  // even + 256 * odd, modulo 2^16
      odd[v] += high_bytes(counts[v]);
    }
    begin = end;
  } while (begin < count);
  Sums<queries, groups> sums;
  for (int v = 0; v < vectors; ++v) {
    sums.even[v] = both[v] - (odd[v] << 8);
    sums.odd[v] = odd[v];
  }
  return sums;
}

// Those of query q, code by code.
template <int queries>
inline void in_order(const Sums<queries>& sums, int q, uint16_t (&out)[kBlock]) {
  constexpr int lanes = EMBLAS_VECTOR_BYTES / 2;
  for (int g = 0; g < kGroups; ++g) {
    for (int i = 0; i < lanes; ++i) {
      out[2 * (g * lanes + i)] = sums.even[q * kGroups + g][i];
      out[2 * (g * lanes + i) + 1] = sums.odd[q * kGroups + g][i];
    }
  }
}

template <class V>
inline V least_of(V a, V b) {
  return a < b ? a : b;
}

inline bool any_at_most(Halves x, uint16_t most) {
#if defined(EMBLAS_HAS_AVX512)
  return _mm512_cmple_epu16_mask((__m512i)x, _mm512_set1_epi16(short(most))) != 0;
#else
  return any((Bytes)(x <= most));
#endif
}
inline bool any_at_most(Bytes x, uint8_t most) {
#if defined(EMBLAS_HAS_AVX512)
  return _mm512_cmple_epu8_mask((__m512i)x, _mm512_set1_epi8(char(most))) != 0;
#else
  return any((Bytes)(x <= most));
#endif
}

// Offers what is below the limit of query q, of the block of code `first`.
template <class Sum>
[[gnu::noinline]] void offer_below(const ScanArgs& args, int64_t q, int64_t first,
                                   const Sum (&sum)[kBlock]) {
  const int64_t count = args.count - first < kBlock ? args.count - first : kBlock;
  const uint32_t limit = args.limits[q];
  uint8_t below[kBlock];
  for (int64_t i = 0; i < kBlock; ++i) below[i] = sum[i] < limit;
  for (int64_t begin = 0; begin < count; begin += 8) {
    uint64_t eight;
    std::memcpy(&eight, below + begin, 8);
    if (eight == 0) continue;
    for (int64_t i = begin; i < count && i < begin + 8; ++i) {
      if (sum[i] < args.limits[q]) args.offer(args.context, q, first + i, sum[i]);
    }
  }
}

template <class Counter, int queries>
inline void scan_block(const ScanArgs& args, int64_t q0, int64_t first, const uint8_t* prepared,
                       Fetcher& fetcher) {
  const auto sums = block_sums<Counter, queries, kGroups>(args, block_at<Counter>(args, first),
                                                          prepared, fetcher);
  unsigned hits = 0;
  for (int q = 0; q < queries; ++q) {
    Halves least = least_of(sums.even[q * kGroups], sums.odd[q * kGroups]);
    for (int v = q * kGroups + 1; v < (q + 1) * kGroups; ++v) {
      least = least_of(least, least_of(sums.even[v], sums.odd[v]));
    }
    const uint32_t limit = args.limits[q0 + q];
    const bool hit = limit > 0 && any_at_most(least, uint16_t(limit < 0xffff ? limit - 1 : 0xffff));
    hits |= unsigned(hit) << q;
  }
  if (__builtin_expect(hits == 0, 1)) return;
  const Sums<queries> copy = sums;  // whose address is taken
  for (int q = 0; q < queries; ++q) {
    if (!(hits >> q & 1)) continue;
    uint16_t sum[kBlock];
    in_order(copy, q, sum);
    offer_below(args, q0 + q, first, sum);
  }
}

// The same for Hamming distances of at most 32 bytes and limits below 256, in bytes throughout: the
// last addition stays at 255 where it would overflow.
template <int queries>
inline void scan_narrow_block(const ScanArgs& args, int64_t q0, int64_t first,
                              const uint8_t* prepared, Fetcher& fetcher) {
  constexpr int vectors = queries * kGroups;
  const Block block = block_at<HammingCounter>(args, first);
  const int64_t last = args.bytes - 1;
  Bytes sums[vectors], rest[vectors];
  fetcher.step(args.bytes);
  add_bytes<HammingCounter, queries, kGroups>(args, block, prepared, last, args.bytes, sums);
  if (last > 0) {
    add_bytes<HammingCounter, queries, kGroups>(args, block, prepared, 0, last, rest);
    for (int v = 0; v < vectors; ++v) sums[v] = add_saturated(sums[v], rest[v]);
  }
  unsigned hits = 0;
  for (int q = 0; q < queries; ++q) {
    Bytes least = sums[q * kGroups];
    for (int v = q * kGroups + 1; v < (q + 1) * kGroups; ++v) least = least_of(least, sums[v]);
    const uint32_t limit = args.limits[q0 + q];
    hits |= unsigned(limit > 0 && any_at_most(least, uint8_t(limit - 1))) << q;
  }
  if (__builtin_expect(hits == 0, 1)) return;
  uint8_t copy[queries][kBlock];
  std::memcpy(copy, sums, sizeof copy);
  for (int q = 0; q < queries; ++q) {
    if (hits >> q & 1) offer_below(args, q0 + q, first, copy[q]);
  }
}

template <class Counter, int queries>
void scan_some(const ScanArgs& args, int64_t q0, Fetcher& fetcher) {
  const uint8_t* prepared = args.prepared + q0 * prepared_bytes<Counter>(args);
  for (int64_t first = 0; first < args.count; first += kBlock) {
    if constexpr (std::is_same_v<Counter, HammingCounter>) {
      bool narrow = args.bytes <= kHammingRun + 1;
      for (int q = 0; q < queries; ++q) narrow = narrow && args.limits[q0 + q] <= 255;
      if (narrow) {
        scan_narrow_block<queries>(args, q0, first, prepared, fetcher);
        continue;
      }
    }
    scan_block<Counter, queries>(args, q0, first, prepared, fetcher);
  }
}

// run(Batch<n>, first query) for batches of n queries.
template <int n>
struct Batch {
  static constexpr int value = n;
};
template <class Counter, class Run>
inline void for_queries(int64_t queries, const Run& run) {
  constexpr int kMany = kQueriesAtOnce<Counter>;
  int64_t q = 0;
  for (; q + kMany <= queries; q += kMany) run(Batch<kMany>{}, q);
  for (; q < queries; ++q) run(Batch<1>{}, q);
}

template <class Counter>
Fetcher fetcher_of(const ScanArgs& args) {
  constexpr int64_t many = kQueriesAtOnce<Counter>;
  const int64_t batches = args.queries / many + args.queries % many;
  const int64_t blocks = (args.count + kBlock - 1) / kBlock;
  return {args.next, args.bytes, batches * blocks * args.bytes};
}

#if defined(EMBLAS_HAS_VBMI)
// The 2 high bits of three bytes are an index of their own, made once for all queries.
void cut_highest(const ScanArgs& args) {
  const int64_t groups = TableCounter::kLayout.groups(args.bytes);
  for (int64_t first = 0; first < args.count; first += kBlock) {
    const Block block = block_at<TableCounter>(args, first);
    for (int64_t group = 0; group < groups; ++group) {
      uint8_t* to = args.highest + (first * groups + group * kBlock);
      for (int g = 0; g < kGroups; ++g) {
        const auto shifted = [&](int i, int bits) {
          return (Bytes)((Halves)block.at(3 * group + i, g) >> bits);
        };
        *(BytesUnaligned*)(to + g * EMBLAS_VECTOR_BYTES) =
            (shifted(0, 6) & 3) | (shifted(1, 4) & 12) | (shifted(2, 2) & 48);
      }
    }
  }
}
#endif

template <class Counter>
void scan(const ScanArgs& args) {
#if defined(EMBLAS_HAS_VBMI)
  if constexpr (Counter::kHighest) cut_highest(args);
#endif
  Fetcher fetcher = fetcher_of<Counter>(args);
  for_queries<Counter>(args.queries, [&](auto batch, int64_t q) {
    scan_some<Counter, decltype(batch)::value>(args, q, fetcher);
  });
}

void distances(const ScanArgs& args, int32_t* out, int64_t stride) {
  Fetcher fetcher = fetcher_of<HammingCounter>(args);
  for_queries<HammingCounter>(args.queries, [&](auto batch, int64_t q0) {
    constexpr int queries = decltype(batch)::value;
    const uint8_t* prepared = args.prepared + q0 * prepared_bytes<HammingCounter>(args);
    for (int64_t first = 0; first < args.count; first += kBlock) {
      const auto sums = block_sums<HammingCounter, queries, kGroups>(
          args, block_at<HammingCounter>(args, first), prepared, fetcher);
      const int64_t last = args.count - first < kBlock ? args.count - first : kBlock;
      for (int q = 0; q < queries; ++q) {
        uint16_t sum[kBlock];
        in_order(sums, q, sum);
        int32_t* to = out + (q0 + q) * stride + first;
        for (int64_t i = 0; i < last; ++i) to[i] = sum[i];
      }
    }
  });
}

inline uint16_t smallest(Halves x) {
  typedef uint16_t Eight __attribute__((vector_size(16)));
  Eight part[EMBLAS_VECTOR_BYTES / 16];
  std::memcpy(part, &x, sizeof x);
  Eight least = part[0];
  for (int i = 1; i < EMBLAS_VECTOR_BYTES / 16; ++i) least = part[i] < least ? part[i] : least;
#if defined(EMBLAS_HAS_AVX2)
  return uint16_t(_mm_extract_epi16(_mm_minpos_epu16((__m128i)least), 0));
#elif defined(EMBLAS_HAS_NEON)
  return vminvq_u16((uint16x8_t)least);
#else
  uint16_t found = least[0];
  for (int i = 1; i < 8; ++i) found = least[i] < found ? least[i] : found;
  return found;
#endif
}

void nearest(const ScanArgs& args, uint16_t* least) {
  Fetcher fetcher = fetcher_of<HammingCounter>(args);
  for_queries<HammingCounter>(args.queries, [&](auto batch, int64_t q0) {
    constexpr int queries = decltype(batch)::value;
    const uint8_t* prepared = args.prepared + q0 * prepared_bytes<HammingCounter>(args);
    Halves best[queries];
    for (int q = 0; q < queries; ++q) best[q] = Halves{} + uint16_t(0xffff);
    const auto add = [&](auto groups, const Block& block) {
      constexpr int count = decltype(groups)::value;
      const auto sums = block_sums<HammingCounter, queries, count>(args, block, prepared, fetcher);
      for (int v = 0; v < queries * count; ++v) {
        best[v / count] = least_of(best[v / count], least_of(sums.even[v], sums.odd[v]));
      }
    };
    int64_t first = 0;
    for (; first + kBlock <= args.count; first += kBlock) {
      add(Batch<kGroups>{}, block_at<HammingCounter>(args, first));
    }
    for (int64_t in = 0; first + in < args.count; in += EMBLAS_VECTOR_BYTES) {
      add(Batch<1>{}, {args.tile + first * args.bytes + in, nullptr});
    }
    for (int q = 0; q < queries; ++q) {
      const uint16_t found = smallest(best[q]);
      if (found < least[q0 + q]) least[q0 + q] = found;
    }
  });
}

}  // namespace

template <>
const ScanKernels& table_of<ScanKernels, Isa::EMBLAS_ISA>() {
  static constexpr ScanKernels table{HammingCounter::kWidth,
                                     prepare_hamming,
                                     TableCounter::kLayout,
                                     interleave,
                                     scan<HammingCounter>,
                                     scan<TableCounter>,
                                     distances,
                                     nearest};
  return table;
}

}  // namespace emblas
