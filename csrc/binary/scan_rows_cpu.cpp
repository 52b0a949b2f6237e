// The scan of scan.h over codes as they lie in memory, one after the other.
#include "binary/scan.h"
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
  for (; i + kCodes <= args.rows.count; i += kCodes) {
    const uint8_t* code = args.rows.codes + i * args.bytes;
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
  for (; i < args.rows.count; ++i) {
    const uint8_t* code = args.rows.codes + i * args.bytes;
    const uint32_t one = row_distance<kWords>(code, args.bytes, args.query);
    if (one >= limit) continue;
    args.offer(args.context, 0, i, one);
    limit = *args.limit;
  }
}
#endif

void scan_rows(const RowScanArgs& args) {
#if defined(EMBLAS_HAS_VPOPCNTDQ)
  if (!args.rows.rows && args.rows.stride == args.bytes) {
    if (args.bytes == 32) return scan_contiguous<4>(args);
    if (args.bytes == 64) return scan_contiguous<8>(args);
    if (args.bytes == 128) return scan_contiguous<16>(args);
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
  static constexpr RowScanKernels table{scan_rows};
  return table;
}

}  // namespace emblas
