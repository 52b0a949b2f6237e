// Codes on a CPU: a block of four words in each 64-bit lane, so that the products of 32-bit words
// fit and the numbers made of them, doubles, take the same lanes.
#include <utility>

#include "common/isa.h"
#include "tables/codes.h"
#include "tables/lookup.h"

namespace emblas {
namespace {

constexpr int kBlocks = kLanes<double>;
constexpr std::make_integer_sequence<int, kBlocks> kLaneNumbers{};
constexpr uint64_t kWord = 0xffffffff;

vdouble square_root(vdouble x) {
#if defined(EMBLAS_HAS_AVX512)
  return (vdouble)_mm512_sqrt_pd((__m512d)x);
#elif defined(EMBLAS_HAS_AVX2)
  return (vdouble)_mm256_sqrt_pd((__m256d)x);
#else
  for (int i = 0; i < kBlocks; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
#endif
}

// Integers below 2^52, by the bits of 2^52 plus them.
vdouble to_double(vuint64 x) { return (vdouble)(x | 0x4330000000000000) - 0x1p52; }

// common/philox.h, a counter in each lane. What stands above a word is cut off at the end:
// multiply() doesn't see it.
void philox(vuint64 (&word)[4], uint64_t seed) {
  uint32_t low = uint32_t(seed), high = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round, low += 0x9e3779b9, high += 0xbb67ae85) {
    const vuint64 first = multiply(word[0], 0xd2511f53), second = multiply(word[2], 0xcd9e8d57);
    word[0] = second >> 32 ^ word[1] ^ uint64_t(low);
    word[1] = second;
    word[2] = first >> 32 ^ word[3] ^ uint64_t(high);
    word[3] = first;
  }
  for (vuint64& w : word) w &= kWord;
}

// sum_k coefficients[k] x^k by Horner's rule.
template <int count>
vdouble series(vdouble x, const double (&coefficients)[count]) {
  vdouble total = broadcast<vdouble>(coefficients[count - 1]);
  for (int k = count - 2; k >= 0; --k) total = total * x + coefficients[k];
  return total;
}

// Two independent normal numbers of two words.
void normal(vuint64 first, vuint64 second, vdouble* numbers) {
  // ln(u), u = mantissa 2^exponent with a mantissa within a factor sqrt(2) of 1:
  // ln(m) = 2 artanh((m - 1) / (m + 1)).
  static constexpr double artanh[] = {1.0,      1.0 / 3,  1.0 / 5,  1.0 / 7,  1.0 / 9, 1.0 / 11,
                                      1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21};
  const vuint64 bits = (vuint64)((to_double(first) + 1) * 0x1p-32);
  vdouble mantissa = (vdouble)((bits & 0x000fffffffffffff) | 0x3fe0000000000000);
  vdouble exponent = to_double(bits >> 52) - 1022;
  const auto small = mantissa < 0x1.6a09e667f3bcdp-1;  // sqrt(1/2)
  mantissa = small ? 2 * mantissa : mantissa;
  exponent = small ? exponent - 1 : exponent;
  const vdouble s = (mantissa - 1) / (mantissa + 1);
  const vdouble logarithm = exponent * 0x1.62e42fefa39efp-1 + 2 * s * series(s * s, artanh);
  vdouble radius = square_root(-2 * logarithm);
  // The angle as a multiple of pi / 2 and a rest x of -pi/4 to pi/4.
  static constexpr double cosine[] = {1.0,
                                      -1.0 / 2,
                                      1.0 / 24,
                                      -1.0 / 720,
                                      1.0 / 40320,
                                      -1.0 / 3628800,
                                      1.0 / 479001600,
                                      -1.0 / 87178291200,
                                      1.0 / 20922789888000};
  static constexpr double sine[] = {1.0,
                                    -1.0 / 6,
                                    1.0 / 120,
                                    -1.0 / 5040,
                                    1.0 / 362880,
                                    -1.0 / 39916800,
                                    1.0 / 6227020800,
                                    -1.0 / 1307674368000,
                                    1.0 / 355687428096000};
  const vuint64 shifted = second + (1 << 29), quadrant = shifted >> 30;
  const vdouble rest = to_double(shifted & ((1 << 30) - 1)) - 0x1p29;
  const vdouble x = rest * 0x1.921fb54442d18p-30;  // 2 pi 2^-32
  const vdouble square = x * x, cos = series(square, cosine), sin = x * series(square, sine);
  const auto odd = (quadrant & 1) != 0;
  radius = (quadrant & 2) != 0 ? -radius : radius;
  numbers[0] = radius * (odd ? -sin : cos);
  numbers[1] = radius * (odd ? cos : sin);
}

// a[0], b[0], a[1], b[1], ...
template <int... lane>
void interleave(vdouble a, vdouble b, vdouble* pair, std::integer_sequence<int, lane...>) {
  pair[0] = __builtin_shufflevector(a, b, (lane / 2 + lane % 2 * kBlocks)...);
  pair[1] = __builtin_shufflevector(a, b, (kBlocks / 2 + lane / 2 + lane % 2 * kBlocks)...);
}

template <class T>
void fill(const CodeArgs& args, int64_t first, int64_t last, T* out) {
  const double root = __builtin_sqrt(double(args.sparsity));
  const double part = __builtin_nearbyint(0x1p31 / double(args.sparsity));
  vuint64 lane;
  for (int i = 0; i < kBlocks; ++i) lane[i] = uint64_t(i);
  for (int64_t id = first; id < last; ++id) {
    const uint64_t pattern = uint64_t(args.ids[id]);
    const uint64_t sequence = uint64_t(args.sequences[id * args.sequence_step]);
    for (int64_t i = 0; i < args.dim; i += 4 * kBlocks) {
      vuint64 word[4] = {lane + uint64_t(i / 4), vuint64{} + (pattern & kWord),
                         vuint64{} + (pattern >> 32), vuint64{} + sequence};
      philox(word, args.seed);
      vdouble number[4];
      if (args.kind == CodeKind::normal) {
        normal(word[0], word[1], number);
        normal(word[2], word[3], number + 2);
      } else {
        for (int j = 0; j < 4; ++j) {
          const vdouble w = to_double(word[j]);
          const vdouble nonzero = w < part ? broadcast<vdouble>(-root) : broadcast<vdouble>(root);
          number[j] = args.kind == CodeKind::uniform ? (w + 0.5) * 0x1p-31 - 1
                                                     : (w < 2 * part ? nonzero : vdouble{});
        }
      }
      // From words side by side to blocks one after the other.
      vdouble half[4], whole[4];
      interleave(number[0], number[2], half, kLaneNumbers);
      interleave(number[1], number[3], half + 2, kLaneNumbers);
      interleave(half[0], half[2], whole, kLaneNumbers);
      interleave(half[1], half[3], whole + 2, kLaneNumbers);
      double values[4 * kBlocks];
      for (int k = 0; k < 4; ++k) store(values + k * kBlocks, whole[k]);
      const int count = args.dim - i < 4 * kBlocks ? int(args.dim - i) : 4 * kBlocks;
      T* to = out + id * args.dim + i;
      for (int k = 0; k < count; ++k) from_accumulator(Accumulator<T>(values[k]), to + k);
    }
  }
}

template <class T>
constexpr Codes<T> kernel{fill<T>};

}  // namespace

template <>
const CodesKernels& table_of<CodesKernels, Isa::EMBLAS_ISA>() {
  static constexpr CodesKernels table{
      {kernel<float>, kernel<double>, kernel<bfloat16>, kernel<float16>}};
  return table;
}

}  // namespace emblas
