// Vectors of the instruction set that the including kernel file is compiled for.
//
// Plain GCC/Clang vector types: arithmetic, comparisons and shuffles are the compiler's. Only what
// they can't say is written with intrinsics, each beside its portable twin. Everything is in an
// anonymous namespace on purpose: this header is compiled once per instruction set, and a shared
// copy of one of its functions would carry AVX-512 code into the baseline kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(EMBLAS_EMULATE_AVX512)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#elif defined(EMBLAS_HAS_AVX2)
#include <immintrin.h>
#elif defined(EMBLAS_HAS_NEON)
#include <arm_neon.h>
#endif

#include "types.h"

namespace emblas {
namespace {

typedef float vfloat __attribute__((vector_size(EMBLAS_VECTOR_BYTES)));
typedef double vdouble __attribute__((vector_size(EMBLAS_VECTOR_BYTES)));
typedef int32_t vint32 __attribute__((vector_size(EMBLAS_VECTOR_BYTES)));
typedef uint32_t vuint32 __attribute__((vector_size(EMBLAS_VECTOR_BYTES)));
typedef uint64_t vuint64 __attribute__((vector_size(EMBLAS_VECTOR_BYTES)));
typedef uint16_t vhalf_bits __attribute__((vector_size(EMBLAS_VECTOR_BYTES / 2)));

// The same at any address. (memcpy would say this too, but GCC 12 splits it into narrower moves.)
typedef vfloat vfloat_unaligned __attribute__((aligned(1), may_alias));
typedef vdouble vdouble_unaligned __attribute__((aligned(1), may_alias));
typedef vhalf_bits vhalf_bits_unaligned __attribute__((aligned(1), may_alias));

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = vfloat;
};
template <>
struct VectorOf<double> {
  using type = vdouble;
};
// The vector in which values of T are accumulated, and how many of them it holds.
template <class T>
using Vector = typename VectorOf<Accumulator<T>>::type;
template <class T>
inline constexpr int kLanes = EMBLAS_VECTOR_BYTES / sizeof(Accumulator<T>);

template <class V, class S>
inline V broadcast(S value) {
  return value - V{};  // x - 0 is x for every x and costs nothing; 0 + x would lose the sign of -0
}

// --- conversions -----------------------------------------------------------------------------

inline float to_accumulator(float x) { return x; }
inline double to_accumulator(double x) { return x; }
inline float to_accumulator(bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline float to_accumulator(float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  uint32_t bits;
  float out;
  if (magnitude >= 0x7c00u) {
    bits = sign | 0x7f800000u | (magnitude & 0x3ffu) << 13;  // infinity, NaN
  } else if (magnitude >= 0x400u) {
    bits = sign | ((magnitude << 13) + 0x38000000u);
  } else {
    out = float(magnitude) * 0x1p-24f;  // subnormal: exact
    return sign ? -out : out;
  }
  std::memcpy(&out, &bits, 4);
  return out;
}

// Round to nearest, ties to even; NaN stays NaN.
inline void from_accumulator(float x, float* out) { *out = x; }
inline void from_accumulator(double x, double* out) { *out = x; }
inline void from_accumulator(float x, bfloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) {
    out->bits = uint16_t(bits >> 16 | 0x40u);
    return;
  }
  out->bits = uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline void from_accumulator(float x, float16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | (magnitude >> 13 & 0x3ffu);  // NaN
  } else if (magnitude >= 0x47800000u) {
    half = 0x7c00u;  // 2^16 and up: infinity
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  } else {
    // Subnormal: adding 0.5 puts the last kept bit at the end of the float's fraction, so the
    // addition itself rounds to nearest even.
    float shifted;
    std::memcpy(&shifted, &magnitude, 4);
    shifted += 0.5f;
    std::memcpy(&half, &shifted, 4);
    half -= 0x3f000000u;
  }
  out->bits = uint16_t(sign | half);
}

// --- memory ----------------------------------------------------------------------------------

// 16 bits to 32 and back. GCC 12 takes vectors apart to convert them, but for the way back to 128
// bits.
inline vuint32 widen(vhalf_bits bits) {
#if defined(EMBLAS_HAS_AVX512) && !defined(EMBLAS_EMULATE_AVX512)
  return (vuint32)_mm512_cvtepu16_epi32((__m256i)bits);
#elif defined(EMBLAS_HAS_AVX2) && !defined(EMBLAS_EMULATE_AVX512)
  return (vuint32)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  return __builtin_convertvector(bits, vuint32);
#endif
}
inline vhalf_bits narrow(vuint32 bits) {
#if defined(EMBLAS_HAS_AVX512) && !defined(EMBLAS_EMULATE_AVX512)
  return (vhalf_bits)_mm512_cvtepi32_epi16((__m512i)bits);
#else
  return __builtin_convertvector(bits, vhalf_bits);
#endif
}

// kLanes<T> consecutive values, widened to the accumulator; `from` needs no alignment.
inline vfloat load(const float* from) { return *(const vfloat_unaligned*)from; }
inline vdouble load(const double* from) { return *(const vdouble_unaligned*)from; }
inline vfloat load(const bfloat16* from) {
  return (vfloat)(widen(*(const vhalf_bits_unaligned*)from) << 16);
}
inline vfloat load(const float16* from) {
#if defined(EMBLAS_HAS_AVX512)
  return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(EMBLAS_HAS_AVX2)
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#elif defined(EMBLAS_HAS_NEON)
  return (vfloat)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)from)));
#else
  vfloat out;
  for (int i = 0; i < kLanes<float>; ++i) out[i] = to_accumulator(from[i]);
  return out;
#endif
}

inline void store(float* to, vfloat x) { *(vfloat_unaligned*)to = x; }
inline void store(double* to, vdouble x) { *(vdouble_unaligned*)to = x; }
inline void store(bfloat16* to, vfloat x) {
  const vuint32 bits = (vuint32)x;
  const vuint32 rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const vuint32 quiet = bits >> 16 | 0x40u;
  *(vhalf_bits_unaligned*)to = narrow(x != x ? quiet : rounded);
}
inline void store(float16* to, vfloat x) {
#if defined(EMBLAS_EMULATE_AVX512)  // SIMDe has no _mm512_cvtps_ph
  for (int i = 0; i < kLanes<float>; ++i) from_accumulator(x[i], to + i);
#elif defined(EMBLAS_HAS_AVX512)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(EMBLAS_HAS_AVX2)
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(EMBLAS_HAS_NEON)
  vst1_u16((uint16_t*)to, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
#else
  for (int i = 0; i < kLanes<float>; ++i) from_accumulator(x[i], to + i);
#endif
}

// --- reductions (fixed order: halves are folded until one lane is left) ----------------------

template <class V>
inline auto sum(V x) {
  constexpr int lanes = sizeof(V) / sizeof(x[0]);
  for (int width = lanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  }
  return x[0];
}

// sum_i a[i] * b[i], accumulated in Accumulator<T> over four vectors.
template <class T, class U>
inline Accumulator<T> dot(const T* a, const U* b, int64_t n) {
  using V = Vector<T>;
  constexpr int lanes = kLanes<T>;
  V total[4] = {};
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    for (int u = 0; u < 4; ++u) total[u] += load(a + i + u * lanes) * load(b + i + u * lanes);
  }
  for (; i + lanes <= n; i += lanes) total[0] += load(a + i) * load(b + i);
  Accumulator<T> result = sum((total[0] + total[1]) + (total[2] + total[3]));
  for (; i < n; ++i) result += to_accumulator(a[i]) * to_accumulator(b[i]);
  return result;
}

// --- functions -------------------------------------------------------------------------------

// 2^x for x <= 128, error below 1 ulp: 0 from x = -127 down (results below 2^-126 may be off), NaN
// stays NaN. x = n + r with n whole and |r| <= 1/2; 2^n is built from bits. Adding 1.5 * 2^23
// rounds to a whole number and leaves it, biased as an exponent, in the low bits of the sum. The
// polynomial is the minimax fit of 2^r - 1 in relative error.
inline vfloat exp2(vfloat x) {
  constexpr float shifter = 0x1.8p23f + 127;
  x = x < -127.0f ? broadcast<vfloat>(-127.0f) : x;
  const vfloat shifted = x + shifter;
  const vfloat r = x - (shifted - shifter);
  vfloat p = r * 0x1.432474p-13f + 0x1.5f461cp-10f;
  p = p * r + 0x1.3b2b8ep-7f;
  p = p * r + 0x1.c6aed2p-5f;
  p = p * r + 0x1.ebfbdep-3f;
  p = p * r + 0x1.62e430p-1f;
  p = p * r + 1.0f;
  return p * (vfloat)((vuint32)shifted << 23);
}
// The same for doubles, x <= 1024.
inline vdouble exp2(vdouble x) {
  constexpr double shifter = 0x1.8p52 + 1023;
  x = x < -1023.0 ? broadcast<vdouble>(-1023.0) : x;
  const vdouble shifted = x + shifter;
  const vdouble r = x - (shifted - shifter);
  vdouble p = r * 0x1.c0638527edf34p-32 + 0x1.e605f979c7a5dp-28;
  p = p * r + 0x1.b54167a0b9061p-24;
  p = p * r + 0x1.62bfd49ed0adfp-20;
  p = p * r + 0x1.ffcbee3b0af8cp-17;
  p = p * r + 0x1.4309130961163p-13;
  p = p * r + 0x1.5d87fe7bbbe07p-10;
  p = p * r + 0x1.3b2ab6fba1e1cp-7;
  p = p * r + 0x1.c6b08d7048f31p-5;
  p = p * r + 0x1.ebfbdff82c598p-3;
  p = p * r + 0x1.62e42fefa39f3p-1;
  p = p * r + 1.0;
  return p * (vdouble)((vuint64)shifted << 52);
}

}  // namespace
}  // namespace emblas
