// Quantized lookups on a CPU: the integers of some rows are widened in registers, a vector of
// columns at a time, and added there, as in lookup.h.
#include "common/isa.h"
#include "tables/lookup.h"
#include "tables/quantized.h"

namespace emblas {
namespace {

constexpr int kStep = kLanes<float>;  // elements widened at once: whole bytes for any bits

typedef uint8_t vbytes __attribute__((vector_size(kStep), aligned(1), may_alias));
typedef uint8_t vpairs __attribute__((vector_size(kStep / 2), aligned(1), may_alias));
typedef int32_t vint32_half __attribute__((vector_size(EMBLAS_VECTOR_BYTES / 2)));

// The first kStep integers at `from`, 0 to 2^bits - 1.
template <int bits>
vint32 unpack(const uint8_t* from) {
  if constexpr (bits == 16) {
    return __builtin_convertvector(*(const vhalf_bits_unaligned*)from, vint32);
  } else if constexpr (bits == 8) {
    return __builtin_convertvector(*(const vbytes*)from, vint32);
  } else if constexpr (bits == 4) {  // a byte in 64 bits, its high half moved up into a lane
    const vuint64 pairs = __builtin_convertvector(*(const vpairs*)from, vuint64);
    return (vint32)((pairs | pairs << 28) & 0x0000000f0000000full);
  } else {
    uint32_t word = 0;
    std::memcpy(&word, from, kStep / 4);
    vuint32 shifts;
    for (int i = 0; i < kStep; ++i) shifts[i] = 2 * i;
    return (vint32)((vuint32{} + word) >> shifts & 3);
  }
}

// Integers with their sign, as kParts vectors of accumulators.
template <class A>
constexpr int kParts = sizeof(A) / sizeof(float);
template <class A, int bits>
Vector<A> part(vint32 codes, int number) {
  if constexpr (kParts<A> == 1) {
    return __builtin_convertvector(codes - (1 << (bits - 1)), vfloat);
  } else {
    vint32_half half;
    std::memcpy(&half, reinterpret_cast<const char*>(&codes) + number * sizeof half, sizeof half);
    return __builtin_convertvector(half - (1 << (bits - 1)), vdouble);
  }
}

// total[i] (0 at first if `fresh`) + sum_l coefficients[l] * rows[l][i], in this order.
template <class A, int bits, int unroll>
void add_rows(A* total, const uint8_t* const* rows, const A* coefficients, int count, bool fresh,
              int64_t i) {
  constexpr int vectors = unroll * kParts<A>, lanes = kLanes<A>;
  Vector<A> sums[vectors] = {};
  for (int v = 0; v < vectors && !fresh; ++v) sums[v] = load(total + i + v * lanes);
  for (int l = 0; l < count; ++l) {
    const uint8_t* from = rows[l] + i * bits / 8;
    for (int u = 0; u < unroll; ++u) {
      const vint32 codes = unpack<bits>(from + u * kStep * bits / 8);
      for (int n = 0; n < kParts<A>; ++n) {
        sums[u * kParts<A> + n] += coefficients[l] * part<A, bits>(codes, n);
      }
    }
  }
  for (int v = 0; v < vectors; ++v) store(total + i + v * lanes, sums[v]);
}

// Rows of a table, which may be read up to padded_dim elements each.
template <class T, int bits>
class Rows {
 public:
  Rows(const QuantizedArgs<T>& args, Accumulator<T>* scratch)
      : args_(args),
        row_bytes_(packed_bytes(args.dim, bits)),
        read_bytes_(packed_bytes(padded_dim(args.dim), bits)),
        end_(args.packed + args.rows * row_bytes_),
        copy_(reinterpret_cast<uint8_t*>(scratch)),
        far_(args.rows * row_bytes_ > kCachedBytes),
        ahead_(prefetch_distance(row_bytes_)) {}

  // Null for the padding id. Rows at the table's end are copied to where there is room; a copy
  // holds until the next row is asked for.
  const uint8_t* of(int64_t i) const {
    const int64_t id = args_.ids[i];
    if (args_.padding_id && id == *args_.padding_id) return nullptr;
    const uint8_t* row = args_.packed + id * row_bytes_;
    if (end_ - row >= read_bytes_) return row;
    std::memcpy(copy_, row, row_bytes_);
    return copy_;
  }
  bool is_copy(const uint8_t* row) const { return row == copy_; }
  Accumulator<T> scale(int64_t i) const { return to_accumulator(args_.scale[args_.ids[i]]); }

  // Asks for the row that comes `ahead` ids after i, if it comes before `end`.
  void prefetch_after(int64_t i, int64_t end) const {
    if (!far_ || i + ahead_ >= end) return;
    const int64_t id = args_.ids[i + ahead_];
    if (uint64_t(id) >= uint64_t(args_.rows)) return;  // a padding id outside the table
    prefetch(args_.packed + id * row_bytes_, row_bytes_);
    prefetch(args_.scale + id, 1);
  }

 private:
  const QuantizedArgs<T>& args_;
  const int64_t row_bytes_, read_bytes_;
  const uint8_t* const end_;
  uint8_t* const copy_;
  const bool far_;
  const int64_t ahead_;
};

template <class T>
int64_t first_id(const QuantizedArgs<T>& args, int64_t bag) {
  return args.offsets ? args.offsets[bag] : bag;
}

template <class T, int bits>
void pool(const QuantizedArgs<T>& args, int64_t first, int64_t last, Accumulator<T>* scratch,
          T* out) {
  using A = Accumulator<T>;
  constexpr int most = 32, unroll = 4;  // rows at once, vectors at once
  const int64_t width = padded_dim(args.dim), ids_end = first_id(args, last);
  const Rows<T, bits> rows(args, scratch + width);
  const uint8_t* pending[most];
  A coefficients[most];
  int count = 0;
  bool fresh = true;
  const auto add_pending = [&] {
    int64_t i = 0;
    for (; i + unroll * kStep <= width; i += unroll * kStep) {
      add_rows<A, bits, unroll>(scratch, pending, coefficients, count, fresh, i);
    }
    for (; i < args.dim; i += kStep) {
      add_rows<A, bits, 1>(scratch, pending, coefficients, count, fresh, i);
    }
    count = 0;
    fresh = false;
  };
  const auto take_maximum = [&] {
    for (int64_t i = 0; i < args.dim; i += kStep) {
      const vint32 codes = unpack<bits>(pending[0] + i * bits / 8);
      for (int n = 0; n < kParts<A>; ++n) {
        A* const to = scratch + i + n * kLanes<A>;
        const Vector<A> x = coefficients[0] * part<A, bits>(codes, n);
        const Vector<A> best = fresh ? x : load(to);
        store(to, x > best ? x : best);
      }
    }
    count = 0;
    fresh = false;
  };
  for (int64_t b = first; b < last; ++b) {
    const int64_t begin = first_id(args, b), end = first_id(args, b + 1);
    int64_t used = 0;
    fresh = true;
    for (int64_t i = begin; i < end; ++i) {
      rows.prefetch_after(i, ids_end);
      const uint8_t* row = rows.of(i);
      if (!row) continue;
      ++used;
      pending[count] = row;
      coefficients[count++] = args.weights ? args.weights[i] * rows.scale(i) : rows.scale(i);
      if (args.mode == BagMode::max) {
        take_maximum();
      } else if (count == most || rows.is_copy(row)) {
        add_pending();
      }
    }
    T* const to = out + b * args.dim;
    if (!used) {
      std::memset(to, 0, args.dim * sizeof(T));
      continue;
    }
    if (count > 0) add_pending();
    if (args.mode == BagMode::mean) {
      for (int64_t i = 0; i < args.dim; ++i) scratch[i] *= A(1) / A(used);
    }
    store_row(to, scratch, args.dim);
  }
}

template <class T, int bits>
void dot_ids(const QuantizedArgs<T>& args, int64_t first, int64_t last, const T* grad_out,
             Accumulator<T>* scratch, Accumulator<T>* grad_weights) {
  using A = Accumulator<T>;
  const int64_t width = padded_dim(args.dim), ids_end = first_id(args, last);
  const Rows<T, bits> rows(args, scratch + width);
  for (int64_t i = args.dim; i < width; ++i) scratch[i] = 0;
  for (int64_t b = first; b < last; ++b) {
    const T* const grad = grad_out + b * args.dim;
    for (int64_t k = 0; k < args.dim; ++k) scratch[k] = to_accumulator(grad[k]);
    for (int64_t i = first_id(args, b); i < first_id(args, b + 1); ++i) {
      rows.prefetch_after(i, ids_end);
      const uint8_t* row = rows.of(i);
      Vector<A> products[kParts<A>] = {};
      for (int64_t k = 0; row && k < width; k += kStep) {
        const vint32 codes = unpack<bits>(row + k * bits / 8);
        for (int n = 0; n < kParts<A>; ++n) {
          products[n] += load(scratch + k + n * kLanes<A>) * part<A, bits>(codes, n);
        }
      }
      Vector<A> total = products[0];
      for (int n = 1; n < kParts<A>; ++n) total += products[n];
      grad_weights[i] = row ? rows.scale(i) * sum(total) : A(0);
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
