// Sign packing: 64 comparisons make one mask, whose bytes are then reversed bit by bit, since masks
// count dimensions from the low end and codes from the high one. Bound by reading x.
#include "binary/binary.h"
#include "common/isa.h"
#include "common/simd.h"

namespace emblas {
namespace {

// Bit i is x[i] > threshold[i] (or 0), for 64 values; a comparison with NaN is false.
template <bool has_threshold, class T>
inline uint64_t above(const T* x, const Accumulator<T>* threshold) {
  uint64_t mask = 0;
#if defined(EMBLAS_HAS_AVX2)
  if constexpr (kLanes<T> == EMBLAS_VECTOR_BYTES / 4) {
    for (int i = 0; i < 64; i += kLanes<T>) {
      const vfloat limit = has_threshold ? load((const float*)threshold + i) : vfloat{};
#if defined(EMBLAS_HAS_AVX512)
      const __mmask16 bits = _mm512_cmp_ps_mask((__m512)load(x + i), (__m512)limit, _CMP_GT_OQ);
      mask |= uint64_t(bits) << i;
#else
      const __m256 bits = _mm256_cmp_ps((__m256)load(x + i), (__m256)limit, _CMP_GT_OQ);
      mask |= uint64_t(uint32_t(_mm256_movemask_ps(bits))) << i;
#endif
    }
    return mask;
  }
#endif
  for (int i = 0; i < 64; ++i) {
    mask |= uint64_t(to_accumulator(x[i]) > (has_threshold ? threshold[i] : 0)) << i;
  }
  return mask;
}

inline uint64_t reverse_bits_of_bytes(uint64_t x) {
  x = (x >> 1 & 0x5555555555555555) | (x & 0x5555555555555555) << 1;
  x = (x >> 2 & 0x3333333333333333) | (x & 0x3333333333333333) << 2;
  return (x >> 4 & 0x0f0f0f0f0f0f0f0f) | (x & 0x0f0f0f0f0f0f0f0f) << 4;
}

template <bool has_threshold, class T>
void pack_rows(const T* x, int64_t row_stride, const Accumulator<T>* threshold, int64_t dim,
               int64_t first, int64_t last, uint8_t* codes) {
  const int64_t bytes = (dim + 7) / 8;
  for (int64_t r = first; r < last; ++r) {
    const T* row = x + r * row_stride;
    uint8_t* code = codes + r * bytes;
    int64_t i = 0;
    for (; i + 64 <= dim; i += 64) {
      const uint64_t bits = reverse_bits_of_bytes(
          above<has_threshold>(row + i, has_threshold ? threshold + i : threshold));
      std::memcpy(code + i / 8, &bits, 8);
    }
    for (; i < dim; i += 8) {
      uint8_t byte = 0;
      for (int64_t j = i; j < i + 8; ++j) {
        const bool bit =
            j < dim && to_accumulator(row[j]) > (has_threshold ? threshold[j] : Accumulator<T>(0));
        byte = uint8_t(byte << 1 | int(bit));
      }
      code[i / 8] = byte;
    }
  }
}

template <class T>
void pack(const T* x, int64_t row_stride, const Accumulator<T>* threshold, int64_t dim,
          int64_t first, int64_t last, uint8_t* codes) {
  if (threshold) {
    pack_rows<true>(x, row_stride, threshold, dim, first, last, codes);
  } else {
    pack_rows<false>(x, row_stride, threshold, dim, first, last, codes);
  }
}

}  // namespace

template <>
const PackSignKernels& table_of<PackSignKernels, Isa::EMBLAS_ISA>() {
  static constexpr PackSignKernels table{
      {pack<float>}, {pack<double>}, {pack<bfloat16>}, {pack<float16>}};
  return table;
}

}  // namespace emblas
