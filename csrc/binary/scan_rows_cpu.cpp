// The scan of scan.h over codes as they lie in memory, one after the other.
#include "binary/scan.h"
#include "common/fetch.h"
#include "common/isa.h"
#include "common/simd.h"

namespace emblas {
namespace {

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
  const uint8_t* codes = args.rows.codes;
  const int64_t stride = args.rows.stride, count = args.rows.count, bytes = args.bytes;
  const uint64_t* query = args.query;
  uint32_t limit = *args.limit;
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t* code = codes + (all ? i : args.rows.rows[i]) * stride;
    const uint32_t distance = row_distance<kStatic>(code, bytes, query);
    if (__builtin_expect(distance >= limit, 1)) continue;
    args.offer(args.context, 0, i, distance);
    limit = *args.limit;
  }
}

#if defined(EMBLAS_HAS_VPOPCNTDQ)
typedef uint16_t Halves __attribute__((vector_size(64)));

constexpr int64_t kPart = 64;  // bytes of a code that one vector holds

// The last `rest` bytes of a code, and zeros.
inline __m512i load_rest(const uint8_t* from, int64_t rest) {
#if defined(EMBLAS_EMULATE_AVX512)  // SIMDe has no _mm512_maskz_loadu_epi8
  uint8_t bytes[kPart] = {};
  std::memcpy(bytes, from, size_t(rest));
  return _mm512_loadu_si512(bytes);
#else
  return _mm512_maskz_loadu_epi8(~uint64_t(0) >> (kPart - rest), from);
#endif
}

template <bool pairs>
inline __m512i load_words(const uint64_t* words) {
  return pairs ? _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)words))
               : _mm512_loadu_si512(words);
}

// Eight codes at a time, each in vectors of its own, two of 32 bytes in one. The sums of 64-bit
// words take 16 bits, so those of four vectors fit in one and are added across lanes together.
// load(i, v, part): the part of vector v's code, of the eight from code i on. kParts: 0 if the
// number of parts isn't known here; else the query stays in registers.
template <bool pairs, int planes, int kParts, class Load>
inline void scan_eights(const RowScanArgs& args, int64_t parts, const Load& load) {
  constexpr int64_t kCodes = 8;
  constexpr int kVectors = pairs ? 4 : 8, kWords = 1 + planes;
  constexpr int kDifferingAndMask = 0x28;  // (a ^ b) & c
  const auto read = [&](int64_t part, int t) {
    return load_words<pairs>(args.query + t * row_words(args.bytes) + 8 * part);
  };
  __m512i held[kParts > 0 ? kParts : 1][kWords];
  for (int part = 0; part < kParts; ++part) {
    for (int t = 0; t < kWords; ++t) held[part][t] = read(part, t);
  }
  const auto words = [&](int64_t part, int t) {
    return kParts > 0 ? held[part][t] : read(part, t);
  };
  uint32_t limit = *args.limit;
  for (int64_t i = 0; i < args.rows.count; i += kCodes) {
    if (!args.rows.rows) fetch_page_ahead(args.rows.at(i), kCodes * args.rows.stride);
    __m512i sums[kVectors / 4];
    for (int v = 0; v < kVectors; ++v) {
      __m512i counts[planes > 0 ? planes : 1] = {};
      for (int64_t part = 0; part < (kParts > 0 ? kParts : parts); ++part) {
        const __m512i code = load(i, v, part), query = words(part, 0);
        if constexpr (planes == 0) {
          counts[0] =
              _mm512_add_epi64(counts[0], _mm512_popcnt_epi64(_mm512_xor_si512(code, query)));
        }
        for (int t = 0; t < planes; ++t) {
          const __m512i kept =
              _mm512_ternarylogic_epi64(code, query, words(part, 1 + t), kDifferingAndMask);
          counts[t] = _mm512_add_epi64(counts[t], _mm512_popcnt_epi64(kept));
        }
      }
      __m512i total = counts[0];
      for (int t = 1; t < planes; ++t) {
        total = _mm512_add_epi64(_mm512_add_epi64(total, total), counts[t]);
      }
      const vuint64 shifted = (vuint64)total << 16 * (v % 4);
      sums[v / 4] = v % 4 == 0 ? total : (__m512i)((vuint64)sums[v / 4] | shifted);
    }
    __m512i total = sums[0];
    if constexpr (pairs) {
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
    for (int64_t c = 0; c < kCodes && i + c < args.rows.count; ++c) {
      // Of pairs, vector v holds codes 2 v and 2 v + 1; otherwise code v, in word v / 4.
      const uint32_t one = distance[pairs ? c % 2 * 16 + c / 2 : c];
      if (one >= limit) continue;
      args.offer(args.context, 0, i + c, one);
      limit = *args.limit;
    }
  }
}

// kBytes: of a code, if known here.
template <int planes, int kBytes>
void scan_vectors(const RowScanArgs& args) {
  const int64_t bytes = kBytes > 0 ? kBytes : args.bytes, last = args.rows.count - 1;
  const bool contiguous = !args.rows.rows && args.rows.stride == bytes;
  // Past the last code that code again, which is not offered.
  const auto code = [&](int64_t i) { return args.rows.at(i < last ? i : last); };
  if constexpr (kBytes == 32) {
    scan_eights<true, planes, 1>(args, 1, [&](int64_t i, int v, int64_t) {
      if (contiguous && i + 8 <= last) {
        return _mm512_loadu_si512(args.rows.codes + (i + 2 * v) * bytes);
      }
      const __m512i first =
          _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)code(i + 2 * v)));
      return _mm512_inserti64x4(first, _mm256_loadu_si256((const __m256i*)code(i + 2 * v + 1)), 1);
    });
  } else {
    const int64_t parts = (bytes + kPart - 1) / kPart, rest = bytes - (parts - 1) * kPart;
    scan_eights<false, planes, (kBytes + 63) / 64>(
        args, parts, [&](int64_t i, int v, int64_t part) {
          const uint8_t* from = code(i + v) + kPart * part;
          if (kBytes % kPart == 0 && kBytes > 0) return _mm512_loadu_si512(from);
          return part + 1 < parts ? _mm512_loadu_si512(from) : load_rest(from, rest);
        });
  }
}

template <int planes>
void scan_vectors_of(const RowScanArgs& args) {
  switch (args.bytes) {
    case 32:
      return scan_vectors<planes, 32>(args);
    case 48:
      return scan_vectors<planes, 48>(args);
    case 64:
      return scan_vectors<planes, 64>(args);
    case 96:
      return scan_vectors<planes, 96>(args);
    case 128:
      return scan_vectors<planes, 128>(args);
    default:
      return scan_vectors<planes, 0>(args);
  }
}
#endif

void scan_rows(const RowScanArgs& args) {
#if defined(EMBLAS_HAS_VPOPCNTDQ)
  if (args.bytes > 0 && args.bytes <= kWidestScan) {
    return args.planes > 0 ? scan_vectors_of<kRowPlanes>(args) : scan_vectors_of<0>(args);
  }
#endif
  const auto run = [&](auto all, auto some) { args.rows.rows ? some(args) : all(args); };
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
const RowScanKernels& table_of<RowScanKernels, Isa::EMBLAS_ISA>() {
#if defined(EMBLAS_HAS_VPOPCNTDQ)
  static constexpr RowScanKernels table{scan_rows, kRowPlanes};
#else
  static constexpr RowScanKernels table{scan_rows, 0};
#endif
  return table;
}

}  // namespace emblas
