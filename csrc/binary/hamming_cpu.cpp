// Hamming search on a CPU. Per 64-bit word of a code and query: XOR, count, add. What counts
// differs:
//   AVX-512 VPOPCNTDQ  one instruction per 8 words
//   AVX2, AVX-512      two look-ups of 16 entries held in a register, per nibble; byte counters
//   NEON               one instruction per 16 bytes; byte counters
//   baseline           popcnt of one word
// A single query skips the rearranging: one popcnt per word keeps up with memory.
// Byte counters are widened every kWordsPerFold words, before they can overflow.
#include "binary/binary.h"
#include "common/isa.h"
#include "common/simd.h"

namespace emblas {
namespace {

#if defined(EMBLAS_HAS_AVX2) || defined(EMBLAS_HAS_NEON)
typedef uint64_t Words __attribute__((vector_size(EMBLAS_VECTOR_BYTES)));
constexpr int kWords = EMBLAS_VECTOR_BYTES / 8;
#else
typedef uint64_t Words;
constexpr int kWords = 1;
#endif
typedef Words WordsUnaligned __attribute__((aligned(8), may_alias));

constexpr int kGroups = kWords == 1 ? 4 : 2;  // vectors of codes that share a query's broadcast
constexpr int kBlock = kWords * kGroups;
constexpr int kQueriesAtOnce = 4;

#if defined(EMBLAS_HAS_VPOPCNTDQ)
constexpr bool kByteCounters = false;
inline Words count_difference(Words codes, uint64_t query) {
  return (Words)_mm512_popcnt_epi64((__m512i)(codes ^ query));
}
#elif defined(EMBLAS_HAS_AVX2)
constexpr bool kByteCounters = true;
constexpr uint64_t kLowNibbles = 0x0f0f0f0f0f0f0f0f;
typedef uint8_t Bytes __attribute__((vector_size(EMBLAS_VECTOR_BYTES)));

// Number of bits of each nibble (upper halves of the bytes are zero).
inline Words nibble_bits(Words nibbles) {
  const __m128i bits = _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
#if defined(EMBLAS_HAS_AVX512)
  return (Words)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(bits), (__m512i)nibbles);
#else
  return (Words)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bits), (__m256i)nibbles);
#endif
}
inline Words count_difference(Words codes, uint64_t query) {
  const Words differing = codes ^ query;
  return (Words)((Bytes)nibble_bits(differing & kLowNibbles) +
                 (Bytes)nibble_bits((differing >> 4) & kLowNibbles));
}
inline Words add_bytes(Words a, Words b) { return (Words)((Bytes)a + (Bytes)b); }
inline Words fold_bytes(Words counters) {
#if defined(EMBLAS_HAS_AVX512)
  return (Words)_mm512_sad_epu8((__m512i)counters, _mm512_setzero_si512());
#else
  return (Words)_mm256_sad_epu8((__m256i)counters, _mm256_setzero_si256());
#endif
}
#elif defined(EMBLAS_HAS_NEON)
constexpr bool kByteCounters = true;
inline Words count_difference(Words codes, uint64_t query) {
  return (Words)vcntq_u8((uint8x16_t)(codes ^ query));
}
inline Words add_bytes(Words a, Words b) { return (Words)((uint8x16_t)a + (uint8x16_t)b); }
inline Words fold_bytes(Words counters) {
  return (Words)vpaddlq_u32(vpaddlq_u16(vpaddlq_u8((uint8x16_t)counters)));
}
#else
constexpr bool kByteCounters = false;
inline Words count_difference(Words codes, uint64_t query) {
  return Words(__builtin_popcountll(codes ^ query));
}
#endif

// Up to 8 bytes as one word; the missing ones are zero.
inline uint64_t load_bytes(const uint8_t* from, int64_t bytes) {
  uint64_t word = 0;
  std::memcpy(&word, from, bytes < 8 ? bytes : 8);
  return word;
}

void prepare(const uint8_t* query, int64_t bytes, uint64_t* prepared) {
  for (int64_t w = 0; 8 * w < bytes; ++w) prepared[w] = load_bytes(query + 8 * w, bytes - 8 * w);
}

void arrange(const uint8_t* codes, int64_t stride, int64_t count, int64_t bytes, uint64_t* tile) {
  const int64_t words = (bytes + 7) / 8, full = bytes / 8;
  constexpr int kAhead = 16;  // codes; hides the latency of memory in front of the first words
  for (int64_t r = 0; r < count; ++r) {
    const uint8_t* code = codes + r * stride;
    uint64_t* to = tile + r / kBlock * words * kBlock + r % kBlock;
    if (r + kAhead < count) __builtin_prefetch(code + kAhead * stride);
    for (int64_t w = 0; w < full; ++w) std::memcpy(to + w * kBlock, code + 8 * w, 8);
    if (full < words) to[full * kBlock] = load_bytes(code + 8 * full, bytes - 8 * full);
  }
}

// total[q][g] = distances of the codes of group g of a block to query q
template <int queries>
inline void distances(const uint64_t* block, int64_t words, const uint64_t* prepared,
                      Words (&total)[queries][kGroups]) {
  constexpr int64_t kWordsPerFold = 31;  // 31 words of at most 8 per byte stay below 256
  for (int q = 0; q < queries; ++q) {
    for (int g = 0; g < kGroups; ++g) total[q][g] = Words{};
  }
  const auto codes_at = [&](int64_t w, int g) {
    return *(const WordsUnaligned*)(block + w * kBlock + g * kWords);
  };
  if constexpr (kByteCounters) {
    for (int64_t begin = 0; begin < words; begin += kWordsPerFold) {
      const int64_t end = begin + kWordsPerFold < words ? begin + kWordsPerFold : words;
      Words counters[queries][kGroups] = {};
      for (int64_t w = begin; w < end; ++w) {
        for (int g = 0; g < kGroups; ++g) {
          const Words codes = codes_at(w, g);
          for (int q = 0; q < queries; ++q) {
            counters[q][g] =
                add_bytes(counters[q][g], count_difference(codes, prepared[q * words + w]));
          }
        }
      }
      for (int q = 0; q < queries; ++q) {
        for (int g = 0; g < kGroups; ++g) total[q][g] += fold_bytes(counters[q][g]);
      }
    }
  } else {
    for (int64_t w = 0; w < words; ++w) {
      for (int g = 0; g < kGroups; ++g) {
        const Words codes = codes_at(w, g);
        for (int q = 0; q < queries; ++q) {
          total[q][g] += count_difference(codes, prepared[q * words + w]);
        }
      }
    }
  }
}

// Is any distance of the block below the limit? Distances and limits are far below 2^63, so the
// sign bit of their difference tells.
inline bool any_below(const Words (&total)[kGroups], uint64_t limit) {
  Words below = total[0] - limit;
  for (int g = 1; g < kGroups; ++g) below |= total[g] - limit;
#if defined(EMBLAS_HAS_AVX512)
  return _mm512_movepi64_mask((__m512i)below) != 0;
#elif defined(EMBLAS_HAS_AVX2)
  return _mm256_movemask_pd((__m256d)below) != 0;
#elif defined(EMBLAS_HAS_NEON)
  return ((below[0] | below[1]) >> 63) != 0;
#else
  return below >> 63 != 0;
#endif
}

template <int queries>
void scan_some(const uint64_t* tile, int64_t count, int64_t first_row, int64_t words,
               const uint64_t* prepared, Candidates* candidates, void (*tighten)(Candidates&)) {
  for (int64_t row = 0; row < count; row += kBlock) {
    Words total[queries][kGroups];
    distances<queries>(tile + row * words, words, prepared, total);
    for (int q = 0; q < queries; ++q) {
      Candidates& list = candidates[q];
      if (__builtin_expect(!any_below(total[q], list.limit), 1)) continue;
      uint64_t distance[kBlock];
      std::memcpy(distance, total[q], sizeof distance);
      const int64_t last = count - row < kBlock ? count - row : kBlock;
      for (int64_t i = 0; i < last; ++i) {
        if (distance[i] >= list.limit) continue;
        list.keys[list.count++] = distance[i] << kRowBits | uint64_t(first_row + row + i);
        if (list.count == list.capacity) tighten(list);
      }
    }
  }
}

void scan(const uint64_t* tile, int64_t count, int64_t first_row, int64_t words,
          const uint64_t* prepared, int64_t queries, Candidates* candidates,
          void (*tighten)(Candidates&)) {
  int64_t q = 0;
  for (; q + kQueriesAtOnce <= queries; q += kQueriesAtOnce) {
    scan_some<kQueriesAtOnce>(tile, count, first_row, words, prepared + q * words, candidates + q,
                              tighten);
  }
  for (; q < queries; ++q) {
    scan_some<1>(tile, count, first_row, words, prepared + q * words, candidates + q, tighten);
  }
}

// Distance of a code of kStatic words (0: any width) to a query.
template <int kStatic>
inline uint64_t row_distance(const uint8_t* code, int64_t bytes, const uint64_t* query) {
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
    const uint64_t word = load_bytes(code + 8 * full, bytes - 8 * full);
    total += uint64_t(__builtin_popcountll(word ^ query[full]));
  }
  return total;
}

template <int kStatic>
void scan_rows_of(const uint8_t* codes, int64_t stride, int64_t count, int64_t first_row,
                  int64_t bytes, const uint64_t* query, Candidates& list,
                  void (*tighten)(Candidates&)) {
  for (int64_t row = 0; row < count; ++row) {
    const uint64_t distance = row_distance<kStatic>(codes + row * stride, bytes, query);
    if (__builtin_expect(distance >= list.limit, 1)) continue;
    list.keys[list.count++] = distance << kRowBits | uint64_t(first_row + row);
    if (list.count == list.capacity) tighten(list);
  }
}

void scan_rows(const uint8_t* codes, int64_t stride, int64_t count, int64_t first_row,
               int64_t bytes, const uint64_t* query, Candidates& list,
               void (*tighten)(Candidates&)) {
  const auto run = [&](auto scan_width) {
    scan_width(codes, stride, count, first_row, bytes, query, list, tighten);
  };
  switch (bytes) {
    case 32:
      return run(scan_rows_of<4>);
    case 48:
      return run(scan_rows_of<6>);
    case 64:
      return run(scan_rows_of<8>);
    case 96:
      return run(scan_rows_of<12>);
    case 128:
      return run(scan_rows_of<16>);
    default:
      return run(scan_rows_of<0>);
  }
}

}  // namespace

template <>
const HammingKernels& table_of<HammingKernels, Isa::EMBLAS_ISA>() {
  static constexpr HammingKernels table{kBlock, prepare, arrange, scan, scan_rows};
  return table;
}

}  // namespace emblas
