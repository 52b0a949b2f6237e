// Sign packing: 64 comparisons make one mask, whose bytes are then reversed bit by bit, since masks
// count dimensions from the low end and codes from the high one. Bound by reading x.
#include "binary/binary.h"
#include "common/isa.h"
#include "common/simd.h"

namespace emblas {
namespace {

// Bit i is x[i] > 0, for 64 values; NaN is not above 0.
template <class T>
inline uint64_t positive(const T* x) {
  uint64_t mask = 0;
#if defined(EMBLAS_HAS_AVX2)
  if constexpr (kLanes<T> == EMBLAS_VECTOR_BYTES / 4) {
    for (int i = 0; i < 64; i += kLanes<T>) {
#if defined(EMBLAS_HAS_AVX512)
      const __m512 values = (__m512)load(x + i);
      mask |= uint64_t(_mm512_cmp_ps_mask(values, _mm512_setzero_ps(), _CMP_GT_OQ)) << i;
#else
      const __m256 above = _mm256_cmp_ps((__m256)load(x + i), _mm256_setzero_ps(), _CMP_GT_OQ);
      mask |= uint64_t(uint32_t(_mm256_movemask_ps(above))) << i;
#endif
    }
    return mask;
  }
#endif
  for (int i = 0; i < 64; ++i) mask |= uint64_t(to_accumulator(x[i]) > 0) << i;
  return mask;
}

inline uint64_t reverse_bits_of_bytes(uint64_t x) {
  x = (x >> 1 & 0x5555555555555555) | (x & 0x5555555555555555) << 1;
  x = (x >> 2 & 0x3333333333333333) | (x & 0x3333333333333333) << 2;
  return (x >> 4 & 0x0f0f0f0f0f0f0f0f) | (x & 0x0f0f0f0f0f0f0f0f) << 4;
}

template <class T>
void pack(const T* x, int64_t row_stride, int64_t dim, int64_t first, int64_t last,
          uint8_t* codes) {
  const int64_t bytes = (dim + 7) / 8;
  for (int64_t r = first; r < last; ++r) {
    const T* row = x + r * row_stride;
    uint8_t* code = codes + r * bytes;
    int64_t i = 0;
    for (; i + 64 <= dim; i += 64) {
      const uint64_t bits = reverse_bits_of_bytes(positive(row + i));
      std::memcpy(code + i / 8, &bits, 8);
    }
    for (; i < dim; i += 8) {
      uint8_t byte = 0;
      for (int64_t j = i; j < i + 8; ++j) {
        byte = uint8_t(byte << 1 | int(j < dim && to_accumulator(row[j]) > 0));
      }
      code[i / 8] = byte;
    }
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
