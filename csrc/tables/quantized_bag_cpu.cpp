// Quantized lookups on a CPU: the integers of some rows are widened in registers, a vector of
// columns at a time, and added there, as in lookup.h.
#include <utility>

#include "common/isa.h"
#include "tables/lookup.h"
#include "tables/quantized.h"

namespace emblas {
namespace {

constexpr int kStep = kLanes<float>;  // elements widened at once: whole bytes for any bits
constexpr std::make_integer_sequence<int, kStep> kLaneNumbers{};

typedef uint8_t vbytes __attribute__((vector_size(kStep), aligned(1), may_alias));
typedef uint8_t vpairs __attribute__((vector_size(kStep / 2), aligned(1), may_alias));
typedef int32_t vint32_half __attribute__((vector_size(EMBLAS_VECTOR_BYTES / 2)));

// kStep bytes, and half as many, as wider lanes, for which GCC 12 takes vectors apart too.
#if defined(EMBLAS_HAS_AVX512) && !defined(EMBLAS_EMULATE_AVX512)
vint32 widen_bytes(const uint8_t* from) {
  return (vint32)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
}
vuint64 widen_pairs(const uint8_t* from) {
  return (vuint64)_mm512_cvtepu8_epi64(_mm_loadu_si64(from));
}
#elif defined(EMBLAS_HAS_AVX2) && !defined(EMBLAS_EMULATE_AVX512)
vint32 widen_bytes(const uint8_t* from) {
  return (vint32)_mm256_cvtepu8_epi32(_mm_loadu_si64(from));
}
vuint64 widen_pairs(const uint8_t* from) {
  return (vuint64)_mm256_cvtepu8_epi64(_mm_loadu_si32(from));
}
#else
vint32 widen_bytes(const uint8_t* from) {
  return __builtin_convertvector(*(const vbytes*)from, vint32);
}
vuint64 widen_pairs(const uint8_t* from) {
  return __builtin_convertvector(*(const vpairs*)from, vuint64);
}
#endif

// The first kStep integers at `from`, 0 to 2^bits - 1.
template <int bits>
vint32 unpack(const uint8_t* from) {
  if constexpr (bits == 16) {
    return (vint32)widen(*(const vhalf_bits_unaligned*)from);
  } else if constexpr (bits == 8) {
    return widen_bytes(from);
  } else if constexpr (bits == 4) {  // a byte in 64 bits, its high half moved up into a lane
    const vuint64 pairs = widen_pairs(from);
    return (vint32)((pairs | pairs << 28) & 0x0000000f0000000full);
  } else {
    uint32_t word = 0;
    std::memcpy(&word, from, kStep / 4);
    vuint32 shifts;
    for (int i = 0; i < kStep; ++i) shifts[i] = 2 * i;
    return (vint32)((vuint32{} + word) >> shifts & 3);
  }
}

// Integers as numbers, in kParts vectors of accumulators.
template <class A>
constexpr int kParts = sizeof(A) / sizeof(float);
template <class A>
Vector<A> part(vint32 codes, int number) {
  if constexpr (kParts<A> == 1) {
    return __builtin_convertvector(codes, vfloat);
  } else {
    vint32_half half;
    std::memcpy(&half, reinterpret_cast<const char*>(&codes) + number * sizeof half, sizeof half);
    return __builtin_convertvector(half, vdouble);
  }
}

// What codes of 4 bits mean in a row with some zero point. Bits above these don't matter.
#if defined(EMBLAS_HAS_AVX512) && !defined(EMBLAS_EMULATE_AVX512)
class Nibbles {  // a table of 16 numbers in one register
 public:
  explicit Nibbles(float zero) {
    for (int i = 0; i < 16; ++i) numbers_[i] = float(i);
    numbers_ -= zero;
  }
  vfloat of(vint32 codes) const {
    return (vfloat)_mm512_permutexvar_ps((__m512i)codes, (__m512)numbers_);
  }

 private:
  vfloat numbers_;
};
#else
class Nibbles {
 public:
  explicit Nibbles(float zero) : zero_(zero) {}
  vfloat of(vint32 codes) const { return __builtin_convertvector(codes & 15, vfloat) - zero_; }

 private:
  float zero_;
};
#endif

// Columns of even and of odd number in a vector each, instead of one after the other, and back.
template <int... lane>
void split(vfloat* pair, std::integer_sequence<int, lane...>) {
  const vfloat low = pair[0], high = pair[1];
  pair[0] = __builtin_shufflevector(low, high, (2 * lane)...);
  pair[1] = __builtin_shufflevector(low, high, (2 * lane + 1)...);
}
template <int... lane>
void interleave(vfloat* pair, std::integer_sequence<int, lane...>) {
  const vfloat even = pair[0], odd = pair[1];
  pair[0] = __builtin_shufflevector(even, odd, (lane / 2 + lane % 2 * kStep)...);
  pair[1] = __builtin_shufflevector(even, odd, (kStep / 2 + lane / 2 + lane % 2 * kStep)...);
}

// Rows to be added, and rows to be asked for meanwhile.
template <class A>
struct Pending {
  static constexpr int kMost = 32;
  int count = 0;
  const uint8_t* rows[kMost];
  const uint8_t* later[kMost];
  A coefficients[kMost], zeros[kMost];
};

// total[i] (0 at first if `fresh`) + sum_l coefficients[l] * (rows[l][i] - zeros[l]), in this
// order.
template <bool ahead, class A, int bits, int unroll>
void add_rows(A* total, const Pending<A>& pending, bool fresh, int64_t i) {
  constexpr int vectors = unroll * kParts<A>, lanes = kLanes<A>;
  // Two codes of 4 bits in a byte are taken apart most quickly if they stay in different vectors.
  constexpr bool in_halves = bits == 4 && kParts<A> == 1 && unroll % 2 == 0;
  Vector<A> sums[vectors];
  for (int v = 0; v < vectors; ++v) sums[v] = fresh ? Vector<A>{} : load(total + i + v * lanes);
  if constexpr (in_halves) {
    for (int v = 0; v < vectors; v += 2) split(sums + v, kLaneNumbers);
  }
  for (int l = 0; l < pending.count; ++l) {
    const uint8_t* from = pending.rows[l] + i * bits / 8;
    const A coefficient = pending.coefficients[l], zero = pending.zeros[l];
    if constexpr (ahead) prefetch(pending.later[l] + i * bits / 8, unroll * kStep * bits / 8);
    if constexpr (in_halves) {
      const Nibbles numbers(zero);
      for (int v = 0; v < vectors; v += 2) {
        const vint32 pairs = widen_bytes(from + v * kStep / 2);
        sums[v] += coefficient * numbers.of(pairs);
        sums[v + 1] += coefficient * numbers.of(pairs >> 4);
      }
    } else {
      for (int u = 0; u < unroll; ++u) {
        const vint32 codes = unpack<bits>(from + u * kStep * bits / 8);
        for (int n = 0; n < kParts<A>; ++n) {
          sums[u * kParts<A> + n] += coefficient * (part<A>(codes, n) - zero);
        }
      }
    }
  }
  if constexpr (in_halves) {
    for (int v = 0; v < vectors; v += 2) interleave(sums + v, kLaneNumbers);
  }
  for (int v = 0; v < vectors; ++v) store(total + i + v * lanes, sums[v]);
}

template <bool ahead, class A, int bits>
void add_rows(A* total, const Pending<A>& pending, bool fresh, int64_t dim, int64_t width) {
  // As many sums at once as hide the latency of adding, and the rest of them.
  int64_t i = 0;
  for (; i + 8 * kStep <= width; i += 8 * kStep) {
    add_rows<ahead, A, bits, 8>(total, pending, fresh, i);
  }
  const auto add = [&]<int... unroll>(std::integer_sequence<int, unroll...>) {
    ((i < dim && (width - i) / kStep == unroll &&
      (add_rows<ahead, A, bits, unroll>(total, pending, fresh, i), true)) ||
     ...);
  };
  add(std::integer_sequence<int, 1, 2, 3, 4, 5, 6, 7>{});
}

// total[i] = the larger of what it is (nothing yet if `fresh`) and coefficient * (row[i] - zero).
template <class A, int bits>
void take_maximum(A* total, const uint8_t* row, A coefficient, A zero, bool fresh, int64_t i) {
  const vint32 codes = unpack<bits>(row + i * bits / 8);
  for (int n = 0; n < kParts<A>; ++n) {
    A* const to = total + i + n * kLanes<A>;
    const Vector<A> x = coefficient * (part<A>(codes, n) - zero);
    const Vector<A> best = fresh ? x : load(to);
    store(to, x > best ? x : best);
  }
}

// Rows of a table, each of which may be read up to padded_dim elements: the last ones are copied to
// where there is room behind them, once.
template <class T, int bits>
class Rows {
 public:
  // The copy fits padded_dim accumulators.
  Rows(const QuantizedArgs<T>& args, Accumulator<T>* copy)
      : args_(args),
        bytes_(packed_bytes(args.dim, bits)),
        far_(args.rows * bytes_ > kCachedBytes),
        ahead_(prefetch_distance(bytes_)) {
    const int64_t beyond = packed_bytes(padded_dim(args.dim), bits) - bytes_;
    const int64_t copied = (beyond + bytes_ - 1) / bytes_;
    first_copied_ = copied < args.rows ? args.rows - copied : 0;
    copy_ = reinterpret_cast<uint8_t*>(copy);
    std::memcpy(copy_, args.packed + first_copied_ * bytes_, (args.rows - first_copied_) * bytes_);
  }

  const uint8_t* of(int64_t id) const {
    const uint8_t* const from = id < first_copied_ ? args_.packed : copy_;
    return from + (id < first_copied_ ? id : id - first_copied_) * bytes_;
  }

  bool far() const { return far_; }

  // Asks for the scale of the id that comes `ahead` after i and tells where its row is: row i
  // itself if there is none before `end`.
  const uint8_t* request_after(int64_t i, int64_t end) const {
    return request(i + ahead_ < end ? i + ahead_ : i);
  }
  // Asks for the first rows of the ids [i, end).
  void request_first(int64_t i, int64_t end) const {
    for (int64_t k = i; far_ && k < end && k < i + ahead_; ++k) prefetch(request(k), bytes_);
  }
  int64_t bytes() const { return bytes_; }

 private:
  const uint8_t* request(int64_t i) const {
    const int64_t id = args_.ids[i];
    if (uint64_t(id) >= uint64_t(args_.rows))
      return args_.packed;  // a padding id outside the table
    prefetch(args_.scale + id, 1);
    if (args_.zero) prefetch(args_.zero + id, 1);
    return args_.packed + id * bytes_;
  }

  const QuantizedArgs<T>& args_;
  const int64_t bytes_;
  const bool far_;
  const int64_t ahead_;
  int64_t first_copied_;
  uint8_t* copy_;
};

template <class T>
bool is_padding(const QuantizedArgs<T>& args, int64_t id) {
  return args.padding_id && id == *args.padding_id;
}

template <class T, int bits>
Accumulator<T> zero_of(const QuantizedArgs<T>& args, int64_t id) {
  return args.zero ? args.zero[id] : Accumulator<T>(1 << (bits - 1));
}

template <class T>
int64_t first_id(const QuantizedArgs<T>& args, int64_t bag) {
  return args.offsets ? args.offsets[bag] : bag;
}

template <class T, int bits>
void pool(const QuantizedArgs<T>& args, int64_t first, int64_t last, Accumulator<T>* scratch,
          T* out) {
  using A = Accumulator<T>;
  const int64_t dim = args.dim, width = padded_dim(dim), ids_end = first_id(args, last);
  const Rows<T, bits> rows(args, scratch + width);
  const bool far = rows.far(), maximum = args.mode == BagMode::max;
  rows.request_first(first_id(args, first), ids_end);
  Pending<A> pending;
  for (int64_t b = first; b < last; ++b) {
    T* const to = out + b * dim;
    A* total = scratch;
    if constexpr (sizeof(T) == sizeof(A)) total = dim == width ? to : scratch;
    const int64_t end = first_id(args, b + 1);
    int64_t used = 0;
    for (int64_t i = first_id(args, b); i < end;) {
      pending.count = 0;
      for (; i < end && pending.count < (maximum ? 1 : pending.kMost); ++i) {
        const int64_t id = args.ids[i];
        if (is_padding(args, id)) continue;
        const A scale = to_accumulator(args.scale[id]);
        pending.rows[pending.count] = rows.of(id);
        pending.zeros[pending.count] = zero_of<T, bits>(args, id);
        if (far) pending.later[pending.count] = rows.request_after(i, ids_end);
        pending.coefficients[pending.count++] = args.weights ? args.weights[i] * scale : scale;
      }
      const bool fresh = used == 0;
      used += pending.count;
      if (maximum) {
        if (far && pending.count > 0) prefetch(pending.later[0], rows.bytes());
        for (int64_t k = 0; pending.count > 0 && k < dim; k += kStep) {
          take_maximum<A, bits>(total, pending.rows[0], pending.coefficients[0], pending.zeros[0],
                                fresh, k);
        }
      } else if (far) {
        add_rows<true, A, bits>(total, pending, fresh, dim, width);
      } else {
        add_rows<false, A, bits>(total, pending, fresh, dim, width);
      }
    }
    if (!used) {
      std::memset(to, 0, dim * sizeof(T));
      continue;
    }
    for (int64_t k = 0; args.mode == BagMode::mean && k < dim; ++k) total[k] *= A(1) / A(used);
    if (static_cast<void*>(total) != to) store_row(to, total, dim);
  }
}

template <class T, int bits>
void dot_ids(const QuantizedArgs<T>& args, int64_t first, int64_t last, const T* grad_out,
             Accumulator<T>* scratch, Accumulator<T>* grad_weights) {
  using A = Accumulator<T>;
  const int64_t width = padded_dim(args.dim), ids_end = first_id(args, last);
  const Rows<T, bits> rows(args, scratch + width);
  rows.request_first(first_id(args, first), ids_end);
  for (int64_t k = args.dim; k < width; ++k) scratch[k] = 0;
  for (int64_t b = first; b < last; ++b) {
    const T* const grad = grad_out + b * args.dim;
    for (int64_t k = 0; k < args.dim; ++k) scratch[k] = to_accumulator(grad[k]);
    for (int64_t i = first_id(args, b); i < first_id(args, b + 1); ++i) {
      if (rows.far()) prefetch(rows.request_after(i, ids_end), rows.bytes());
      const int64_t id = args.ids[i];
      grad_weights[i] = 0;
      if (is_padding(args, id)) continue;
      const uint8_t* row = rows.of(id);
      const A zero = zero_of<T, bits>(args, id);
      Vector<A> products[kParts<A>] = {};
      for (int64_t k = 0; k < width; k += kStep) {
        const vint32 codes = unpack<bits>(row + k * bits / 8);
        for (int n = 0; n < kParts<A>; ++n) {
          products[n] += load(scratch + k + n * kLanes<A>) * (part<A>(codes, n) - zero);
        }
      }
      for (int n = 1; n < kParts<A>; ++n) products[0] += products[n];
      grad_weights[i] = to_accumulator(args.scale[id]) * sum(products[0]);
    }
  }
}

template <class T>
void forward(const QuantizedArgs<T>& args, int64_t first, int64_t last, Accumulator<T>* scratch,
             T* out) {
  switch (args.bits) {
    case 2:
      return pool<T, 2>(args, first, last, scratch, out);
    case 4:
      return pool<T, 4>(args, first, last, scratch, out);
    case 8:
      return pool<T, 8>(args, first, last, scratch, out);
    default:
      return pool<T, 16>(args, first, last, scratch, out);
  }
}

template <class T>
void grad_weights(const QuantizedArgs<T>& args, int64_t first, int64_t last, const T* grad_out,
                  Accumulator<T>* scratch, Accumulator<T>* grad_weights) {
  switch (args.bits) {
    case 2:
      return dot_ids<T, 2>(args, first, last, grad_out, scratch, grad_weights);
    case 4:
      return dot_ids<T, 4>(args, first, last, grad_out, scratch, grad_weights);
    case 8:
      return dot_ids<T, 8>(args, first, last, grad_out, scratch, grad_weights);
    default:
      return dot_ids<T, 16>(args, first, last, grad_out, scratch, grad_weights);
  }
}

template <class T>
constexpr Quantized<T> kernel{forward<T>, grad_weights<T>};

}  // namespace

template <>
const QuantizedKernels& table_of<QuantizedKernels, Isa::EMBLAS_ISA>() {
  static constexpr QuantizedKernels table{
      {kernel<float>, kernel<double>, kernel<bfloat16>, kernel<float16>}};
  return table;
}

}  // namespace emblas
