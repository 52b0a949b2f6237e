// The scan of scan.h. One vector holds the same byte of 16, 32 or 64 codes.
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

// Each counts one byte position of a vector of codes against one query.
struct TableCounter {
  static constexpr int64_t kWidth = kTableBytes;
  struct Codes {
    Bytes low, high;
  };
  static Codes split(Bytes codes) {
    const Bytes high = (Bytes)((Halves)codes >> 4);
    return {codes & 15, high & 15};
  }
  static Bytes count(const Codes& codes, const uint8_t* prepared) {
    return look_up(prepared, codes.low) + look_up(prepared + 16, codes.high);
  }
};

#if defined(EMBLAS_HAS_BITALG) || defined(EMBLAS_HAS_NEON)
struct HammingCounter {
#if defined(EMBLAS_HAS_BITALG)
  static constexpr int64_t kWidth = 4;  // a 32-bit broadcast is free, that of a byte is a shuffle
#else
  static constexpr int64_t kWidth = 1;
#endif
  using Codes = Bytes;
  static Codes split(Bytes codes) { return codes; }
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
using HammingCounter = TableCounter;
void prepare_hamming(const uint8_t* query, int64_t bytes, uint8_t* prepared) {
  for (int64_t p = 0; p < bytes; ++p) {
    for (int n = 0; n < 16; ++n) {
      prepared[p * kTableBytes + n] = uint8_t(__builtin_popcount(n ^ (query[p] & 15)));
      prepared[p * kTableBytes + 16 + n] = uint8_t(__builtin_popcount(n ^ (query[p] >> 4)));
    }
  }
}
#endif
constexpr int64_t kHammingPeriod = 31;  // 31 byte positions of at most 8 bits stay below 256

template <class Counter>
constexpr int kQueriesAtOnce = EMBLAS_VECTOR_BYTES == 64 ? 4 : 2;

// The sums of a block, or of some of its vectors: of the codes of even and of odd number, as they
// leave the bytes.
template <int queries, int groups = kGroups>
struct Sums {
  Halves even[queries][groups], odd[queries][groups];
};

// kPeriod 0: the period is only known at run time.
template <class Counter, int64_t kPeriod, int queries, int groups>
inline void add_up(const uint8_t* block, int64_t bytes, const uint8_t* prepared,
                   int64_t dynamic_period, Sums<queries, groups>& sums) {
  const int64_t period = kPeriod ? kPeriod : dynamic_period;
  const int64_t stride = bytes * Counter::kWidth;
  Halves both[queries][groups] = {}, odd[queries][groups] = {};
  for (int64_t begin = 0; begin < bytes; begin += period) {
    const int64_t end = begin + period < bytes ? begin + period : bytes;
    Bytes counts[queries][groups] = {};
    for (int64_t p = begin; p < end; ++p) {
      for (int g = 0; g < groups; ++g) {
        const auto codes =
            Counter::split(*(const BytesUnaligned*)(block + p * kBlock + g * EMBLAS_VECTOR_BYTES));
        for (int q = 0; q < queries; ++q) {
          counts[q][g] += Counter::count(codes, prepared + q * stride + p * Counter::kWidth);
        }
      }
    }
    for (int q = 0; q < queries; ++q) {
      for (int g = 0; g < groups; ++g) {
        both[q][g] += (Halves)counts[q][g];  // even + 256 * odd, modulo 2^16
        odd[q][g] += (Halves)counts[q][g] >> 8;
      }
    }
  }
  for (int q = 0; q < queries; ++q) {
    for (int g = 0; g < groups; ++g) {
      sums.even[q][g] = both[q][g] - (odd[q][g] << 8);
      sums.odd[q][g] = odd[q][g];
    }
  }
}

template <class Counter, int queries, int groups>
inline void block_sums(const ScanArgs& args, const uint8_t* block, const uint8_t* prepared,
                       Sums<queries, groups>& sums) {
  if (args.period == 1) {
    add_up<Counter, 1>(block, args.bytes, prepared, 1, sums);
  } else {
    add_up<Counter, 0>(block, args.bytes, prepared, args.period, sums);
  }
}

template <int queries>
inline void in_order(const Sums<queries>& sums, int q, uint16_t (&out)[kBlock]) {
  constexpr int lanes = EMBLAS_VECTOR_BYTES / 2;
  for (int g = 0; g < kGroups; ++g) {
    for (int i = 0; i < lanes; ++i) {
      out[2 * (g * lanes + i)] = sums.even[q][g][i];
      out[2 * (g * lanes + i) + 1] = sums.odd[q][g][i];
    }
  }
}

// Is any sum of the block below the limit?
template <int queries>
inline bool any_below(const Sums<queries>& sums, int q, uint32_t limit) {
  if (limit == 0) return false;
  const uint16_t largest = uint16_t(limit - 1 < 0xffff ? limit - 1 : 0xffff);
  auto below = (sums.even[q][0] <= largest) | (sums.odd[q][0] <= largest);
  for (int g = 1; g < kGroups; ++g) {
    below |= (sums.even[q][g] <= largest) | (sums.odd[q][g] <= largest);
  }
#if defined(EMBLAS_HAS_AVX512)
  return _mm512_movepi16_mask((__m512i)below) != 0;
#elif defined(EMBLAS_HAS_AVX2)
  return _mm256_movemask_epi8((__m256i)below) != 0;
#elif defined(EMBLAS_HAS_NEON)
  return vmaxvq_u16((uint16x8_t)below) != 0;
#else
  typedef uint64_t Words __attribute__((vector_size(EMBLAS_VECTOR_BYTES)));
  const Words words = (Words)below;
  return (words[0] | words[1]) != 0;
#endif
}

template <class Counter, int queries>
void scan_some(const ScanArgs& args, int64_t q0) {
  const uint8_t* prepared = args.prepared + q0 * args.bytes * Counter::kWidth;
  for (int64_t first = 0; first < args.count; first += kBlock) {
    Sums<queries> sums;
    block_sums<Counter>(args, args.tile + first * args.bytes, prepared, sums);
    for (int q = 0; q < queries; ++q) {
      uint32_t* limit = args.limits + q0 + q;
      if (__builtin_expect(!any_below(sums, q, *limit), 1)) continue;
      uint16_t sum[kBlock];
      in_order(sums, q, sum);
      const int64_t last = args.count - first < kBlock ? args.count - first : kBlock;
      for (int64_t i = 0; i < last; ++i) {
        if (sum[i] < *limit) args.offer(args.context, q0 + q, first + i, sum[i]);
      }
    }
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

void scan_hamming(const ScanArgs& task) {
  ScanArgs args = task;
  args.period = kHammingPeriod;
  for_queries<HammingCounter>(args.queries, [&](auto batch, int64_t q) {
    scan_some<HammingCounter, decltype(batch)::value>(args, q);
  });
}

void scan_tables(const ScanArgs& args) {
  for_queries<TableCounter>(args.queries, [&](auto batch, int64_t q) {
    scan_some<TableCounter, decltype(batch)::value>(args, q);
  });
}

void distances(const ScanArgs& task, int32_t* out, int64_t stride) {
  ScanArgs args = task;
  args.period = kHammingPeriod;
  for_queries<HammingCounter>(args.queries, [&](auto batch, int64_t q0) {
    constexpr int queries = decltype(batch)::value;
    const uint8_t* prepared = args.prepared + q0 * args.bytes * HammingCounter::kWidth;
    for (int64_t first = 0; first < args.count; first += kBlock) {
      Sums<queries> sums;
      block_sums<HammingCounter>(args, args.tile + first * args.bytes, prepared, sums);
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

void nearest(const ScanArgs& task, uint16_t* least) {
  ScanArgs args = task;
  args.period = kHammingPeriod;
  for_queries<HammingCounter>(args.queries, [&](auto batch, int64_t q0) {
    constexpr int queries = decltype(batch)::value;
    const uint8_t* prepared = args.prepared + q0 * args.bytes * HammingCounter::kWidth;
    Halves best[queries];
    for (int q = 0; q < queries; ++q) best[q] = Halves{} + uint16_t(0xffff);
    const auto add = [&](auto groups, const uint8_t* block) {
      constexpr int count = decltype(groups)::value;
      Sums<queries, count> sums;
      block_sums<HammingCounter>(args, block, prepared, sums);
      for (int q = 0; q < queries; ++q) {
        for (int g = 0; g < count; ++g) {
          const Halves even = sums.even[q][g], odd = sums.odd[q][g];
          const Halves both = even < odd ? even : odd;
          best[q] = both < best[q] ? both : best[q];
        }
      }
    };
    int64_t first = 0;
    for (; first + kBlock <= args.count; first += kBlock) {
      add(Batch<kGroups>{}, args.tile + first * args.bytes);
    }
    for (int64_t in = 0; first + in < args.count; in += EMBLAS_VECTOR_BYTES) {
      add(Batch<1>{}, args.tile + first * args.bytes + in);
    }
    for (int q = 0; q < queries; ++q) {
      const uint16_t found = smallest(best[q]);
      if (found < least[q0 + q]) least[q0 + q] = found;
    }
  });
}

// --- rearranging: transposes of 16 bytes x 16 codes ----------------------------------------------

#if defined(EMBLAS_HAS_AVX2)
constexpr int kLaneGroups = 2;  // 16 codes in each half of a vector
#else
constexpr int kLaneGroups = 1;
#endif
typedef uint8_t Lanes __attribute__((vector_size(16 * kLaneGroups)));

// a0 b0 a1 b1 ... of the first, of the second half of each 16 bytes.
inline Lanes zip_low(Lanes a, Lanes b) {
#if defined(EMBLAS_HAS_AVX2)
  return (Lanes)_mm256_unpacklo_epi8((__m256i)a, (__m256i)b);
#else
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#endif
}
inline Lanes zip_high(Lanes a, Lanes b) {
#if defined(EMBLAS_HAS_AVX2)
  return (Lanes)_mm256_unpackhi_epi8((__m256i)a, (__m256i)b);
#else
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                 31);
#endif
}

// 16 bytes of each lane's code.
inline Lanes load_lanes(const uint8_t* first, [[maybe_unused]] const uint8_t* second) {
#if defined(EMBLAS_HAS_AVX2)
  return (Lanes)_mm256_inserti128_si256(
      _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)first)),
      _mm_loadu_si128((const __m128i*)second), 1);
#else
  Lanes out;
  std::memcpy(&out, first, 16);
  return out;
#endif
}

void interleave(const uint8_t* codes, int64_t stride, const int64_t* rows, int64_t count,
                int64_t bytes, uint8_t* tile) {
  constexpr int64_t kStep = 16 * kLaneGroups;  // codes per transpose
  constexpr int64_t kAhead = kStep;            // codes; hides the latency of memory
  // The last code fills its vector up.
  constexpr int64_t kVector = EMBLAS_VECTOR_BYTES;
  const int64_t end = (count + kVector - 1) / kVector * kVector;
  for (int64_t first = 0; first < end; first += kStep) {
    const uint8_t *code[kStep], *ahead[kStep];
    for (int64_t i = 0; i < kStep; ++i) {
      const int64_t position = first + i < count ? first + i : count - 1;
      code[i] = codes + (rows ? rows[position] : position) * stride;
      const int64_t next = position + kAhead < count ? position + kAhead : count - 1;
      ahead[i] = codes + (rows ? rows[next] : next) * stride;
    }
    uint8_t* to = tile + first / kBlock * kBlock * bytes + first % kBlock;
    int64_t fetched = 0;
    for (int64_t p = 0; p < bytes; p += 16) {
      const int64_t width = bytes - p < 16 ? bytes - p : 16;
      uint8_t last[kStep][16];  // copies of what ends before 16 bytes do
      Lanes a[16], b[16];
      // A few whole codes at a time, in the order of memory: more would find no free fill buffer.
      for (; fetched < kStep * (p + 16) / bytes && fetched < kStep; ++fetched) {
        for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(ahead[fetched] + line);
      }
      for (int i = 0; i < 16; ++i) {
        const uint8_t* from[2] = {code[i] + p, code[kStep - 16 + i] + p};
        if (width < 16) {
          for (int half = 0; half < kLaneGroups; ++half) {
            std::memcpy(last[i + 16 * half], from[half], size_t(width));
            from[half] = last[i + 16 * half];
          }
        }
        a[i] = load_lanes(from[0], from[1]);
      }
      // Each round interleaves vector i with vector i + 8; four of them are the transpose.
      const auto round = [](const Lanes(&from)[16], Lanes(&out)[16]) {
        for (int i = 0; i < 8; ++i) {
          out[2 * i] = zip_low(from[i], from[i + 8]);
          out[2 * i + 1] = zip_high(from[i], from[i + 8]);
        }
      };
      round(a, b);
      round(b, a);
      round(a, b);
      round(b, a);
      for (int64_t i = 0; i < width; ++i) std::memcpy(to + (p + i) * kBlock, &a[i], sizeof a[i]);
    }
  }
}

// --- without rearranging -------------------------------------------------------------------------

// Distance of a code of kStatic words (0: any width) to a query.
template <int kStatic>
inline uint32_t row_distance(const uint8_t* code, int64_t bytes, const uint64_t* query) {
#if defined(EMBLAS_HAS_NEON)
  if constexpr (kStatic > 0 && kStatic % 2 == 0) {
    uint16x8_t total = vdupq_n_u16(0);
    for (int w = 0; w < kStatic; w += 2) {
      const uint8x16_t differing =
          veorq_u8(vld1q_u8(code + 8 * w), vld1q_u8((const uint8_t*)(query + w)));
      total = vpadalq_u8(total, vcntq_u8(differing));
    }
    return vaddlvq_u16(total);
  }
#endif
  const int64_t full = kStatic > 0 ? kStatic : bytes / 8;
  uint64_t total = 0;
  for (int64_t w = 0; w < full; ++w) {
    uint64_t word;
    std::memcpy(&word, code + 8 * w, 8);
    total += uint64_t(__builtin_popcountll(word ^ query[w]));
  }
  if (kStatic == 0 && 8 * full < bytes) {
    uint64_t word = 0;
    std::memcpy(&word, code + 8 * full, size_t(bytes - 8 * full));
    total += uint64_t(__builtin_popcountll(word ^ query[full]));
  }
  return uint32_t(total);
}

template <int kStatic, bool all>
void scan_rows_of(const RowScanArgs& args) {
  const uint8_t* codes = args.codes;
  const int64_t stride = args.stride, count = args.count, bytes = args.bytes;
  const uint64_t* query = args.query;
  uint32_t limit = *args.limit;
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t* code = codes + (all ? i : args.rows[i]) * stride;
    const uint32_t distance = row_distance<kStatic>(code, bytes, query);
    if (__builtin_expect(distance >= limit, 1)) continue;
    args.offer(args.context, 0, i, distance);
    limit = *args.limit;
  }
}

#if defined(EMBLAS_HAS_VPOPCNTDQ)
// Codes of 4, 8 or 16 words that follow each other, eight at a time. The counts of 64-bit words
// take 16 bits, so those of four vectors fit in one and are added across lanes together.
template <int kWords>
void scan_contiguous(const RowScanArgs& args) {
  constexpr int64_t kCodes = 8;
  constexpr int kParts = kWords == 16 ? 2 : 1, kVectors = kWords == 4 ? 4 : 8;
  __m512i query[kParts];
  for (int part = 0; part < kParts; ++part) {
    query[part] = kWords == 4
                      ? _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)args.query))
                      : _mm512_loadu_si512(args.query + 8 * part);
  }
  uint32_t limit = *args.limit;
  int64_t i = 0;
  for (; i + kCodes <= args.count; i += kCodes) {
    const uint8_t* code = args.codes + i * args.bytes;
    __m512i sums[kVectors / 4];
    for (int v = 0; v < kVectors; ++v) {
      __m512i counts = _mm512_setzero_si512();
      for (int part = 0; part < kParts; ++part) {
        const uint8_t* from = code + 64 * (v * kParts + part);
        counts = _mm512_add_epi64(
            counts, _mm512_popcnt_epi64(_mm512_xor_si512(query[part], _mm512_loadu_si512(from))));
      }
      const vuint64 shifted = (vuint64)counts << 16 * (v % 4);
      sums[v / 4] = v % 4 == 0 ? counts : (__m512i)((vuint64)sums[v / 4] | shifted);
    }
    __m512i total = sums[0];
    if constexpr (kWords == 4) {
      total = _mm512_add_epi64(total, _mm512_permutex_epi64(total, 0x4e));
      total = _mm512_add_epi64(total, _mm512_permutex_epi64(total, 0xb1));
    } else {
      total = _mm512_add_epi64(_mm512_unpacklo_epi64(sums[0], sums[1]),
                               _mm512_unpackhi_epi64(sums[0], sums[1]));
      total = _mm512_add_epi64(total, _mm512_shuffle_i64x2(total, total, 0x4e));
      total = _mm512_add_epi64(total, _mm512_shuffle_i64x2(total, total, 0xb1));
    }
    const auto below = (Halves)total < uint16_t(limit < 0xffff ? limit : 0xffff);
    if (__builtin_expect(_mm512_movepi16_mask((__m512i)below) == 0, 1)) continue;
    uint16_t distance[32];
    _mm512_storeu_si512(distance, total);
    for (int64_t c = 0; c < kCodes; ++c) {
      // Of 4 words, a vector holds codes 2 v and 2 v + 1; otherwise code v, in word v / 4.
      const uint32_t one = distance[kWords == 4 ? c % 2 * 16 + c / 2 : c];
      if (one >= limit) continue;
      args.offer(args.context, 0, i + c, one);
      limit = *args.limit;
    }
  }
  for (; i < args.count; ++i) {
    const uint32_t one = row_distance<kWords>(args.codes + i * args.bytes, args.bytes, args.query);
    if (one >= limit) continue;
    args.offer(args.context, 0, i, one);
    limit = *args.limit;
  }
}
#endif

void scan_rows(const RowScanArgs& args) {
#if defined(EMBLAS_HAS_VPOPCNTDQ)
  if (!args.rows && args.stride == args.bytes) {
    if (args.bytes == 32) return scan_contiguous<4>(args);
    if (args.bytes == 64) return scan_contiguous<8>(args);
    if (args.bytes == 128) return scan_contiguous<16>(args);
  }
#endif
  const auto run = [&](auto all, auto some) { args.rows ? some(args) : all(args); };
  switch (args.bytes) {
    case 32:
      return run(scan_rows_of<4, true>, scan_rows_of<4, false>);
    case 48:
      return run(scan_rows_of<6, true>, scan_rows_of<6, false>);
    case 64:
      return run(scan_rows_of<8, true>, scan_rows_of<8, false>);
    case 96:
      return run(scan_rows_of<12, true>, scan_rows_of<12, false>);
    case 128:
      return run(scan_rows_of<16, true>, scan_rows_of<16, false>);
    default:
      return run(scan_rows_of<0, true>, scan_rows_of<0, false>);
  }
}

}  // namespace

template <>
const ScanKernels& table_of<ScanKernels, Isa::EMBLAS_ISA>() {
  static constexpr ScanKernels table{HammingCounter::kWidth,
                                     prepare_hamming,
                                     interleave,
                                     scan_hamming,
                                     scan_tables,
                                     distances,
                                     nearest,
                                     scan_rows};
  return table;
}

}  // namespace emblas
