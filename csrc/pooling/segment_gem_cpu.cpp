// Generalized mean on a CPU: x^p = 2^(p log2 x), a vector at a time. About 30 operations per
// element, so arithmetic and memory weigh about the same.
#include "common/isa.h"
#include "pooling/pooling.h"
#include "pooling/rows.h"

namespace emblas {
namespace {

template <class A>
constexpr A kLn2 = A(0.69314718055994530942);

// log2(x) for normal x > 0. x = 2^n m with m in [sqrt(1/2), sqrt(2)); with s = (m - 1) / (m + 1),
// log2(m) = 2 / ln 2 (s + s^3 / 3 + s^5 / 5 + ...), |s| < 0.172. Taking the bits of sqrt(1/2) off
// before the shift gives n; the series ends where a term is below half an ulp. x - x makes NaN of
// NaN and of infinity.
inline vfloat log2(vfloat x) {
  const vint32 n = ((vint32)x - 0x3f3504f3) >> 23;
  const vfloat m = (vfloat)((vint32)x - (n << 23));
  const vfloat s = (m - 1.0f) / (m + 1.0f), q = s * s;
  vfloat series = broadcast<vfloat>(1.0f / 9);
  for (int k = 7; k >= 1; k -= 2) series = series * q + 1.0f / k;
  return __builtin_convertvector(n, vfloat) + series * s * 0x1.715476p+1f + (x - x);
}
typedef int64_t vint64 __attribute__((vector_size(EMBLAS_VECTOR_BYTES)));
inline vdouble log2(vdouble x) {
  const vint64 n = ((vint64)x - 0x3fe6a09e667f3bcd) >> 52;
  const vdouble m = (vdouble)((vint64)x - (n << 52));
  const vdouble s = (m - 1.0) / (m + 1.0), q = s * s;
  vdouble series = broadcast<vdouble>(1.0 / 23);
  for (int k = 21; k >= 1; k -= 2) series = series * q + 1.0 / k;
  return __builtin_convertvector(n, vdouble) + series * s * 0x1.71547652b82fep+1 + (x - x);
}

// visit(i, count, x): vectors of max(x, epsilon) of a row, the last one filled up with ones.
template <class T, class Visit>
inline void for_vectors(const T* row, Accumulator<T> epsilon, int64_t dim, const Visit& visit) {
  using A = Accumulator<T>;
  constexpr int lanes = kLanes<T>;
  const auto clamp = [&](Vector<T> x) { return x < epsilon ? broadcast<Vector<T>>(epsilon) : x; };
  int64_t i = 0;
  for (; i + lanes <= dim; i += lanes) visit(i, lanes, clamp(load(row + i)));
  if (i == dim) return;
  A tail[lanes];
  for (int j = 0; j < lanes; ++j) tail[j] = i + j < dim ? to_accumulator(row[i + j]) : A(1);
  visit(i, int(dim - i), clamp(load(tail)));
}

template <class A, class V>
inline void store_some(A* to, V x, int count) {
  for (int j = 0; j < count; ++j) to[j] = x[j];
}

template <class T>
Accumulator<T> total_weight(const Segments<T>& segments, const Range& range) {
  using A = Accumulator<T>;
  if (!segments.weights) return A(range.end - range.begin);
  A total = 0;
  for (int64_t p = range.begin; p < range.end; ++p) total += segments.weights[p];
  return total;
}

template <class T>
void forward(const Segments<T>& segments, Accumulator<T> power, Accumulator<T> epsilon,
             int64_t first, int64_t last, Accumulator<T>* out, Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  const int64_t dim = segments.dim;
  A* raised = scratch + dim;
  for (int64_t b = first; b < last; ++b) {
    const Range range = range_of(segments, b, PoolMode::mean);
    std::memset(scratch, 0, dim * sizeof(A));
    for (int64_t p = range.begin; p < range.end; ++p) {
      const A weight = weight_at(segments, range, p, PoolMode::mean);
      if (weight == 0) continue;
      for_vectors(row_at(segments, p), epsilon, dim, [&](int64_t i, int count, auto x) {
        store_some(raised + i, exp2(power * log2(x)), count);
      });
      add_row(scratch, raised, weight, dim);
    }
    const A total = total_weight(segments, range);
    A* to = out + b * dim;
    if (total == 0) {
      std::memset(to, 0, dim * sizeof(A));
      continue;
    }
    scale_row(scratch, scratch, 1 / total, dim);
    for_vectors(scratch, A(0), dim, [&](int64_t i, int count, auto mean) {
      store_some(to + i, exp2(log2(mean) / power), count);
    });
  }
}

template <class T>
Accumulator<T> share(const Segments<T>& segments, Accumulator<T> power, Accumulator<T> epsilon,
                     int64_t b, const Accumulator<T>* grad_out, const Accumulator<T>* out,
                     Accumulator<T>* shared, Accumulator<T>* along, Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  const int64_t dim = segments.dim;
  const Range range = range_of(segments, b, PoolMode::mean);
  const A total = total_weight(segments, range);
  *along = 0;
  if (total == 0) {
    std::memset(shared, 0, dim * sizeof(A));
    return 0;
  }
  *along = dot(grad_out, out, dim) / (power * total);
  for_vectors(out, A(0), dim, [&](int64_t i, int count, auto root) {
    const auto log = log2(root);
    store_some(shared + i, exp2((1 - power) * log) / (power * total), count);
    store_some(scratch + i, root * log * (-kLn2<A> / power), count);
  });
  A grad_power = dot(grad_out, scratch, dim);
  for (int64_t i = 0; i < dim; ++i) shared[i] *= grad_out[i];
  for (int64_t p = range.begin; p < range.end; ++p) {
    const A weight = weight_at(segments, range, p, PoolMode::mean);
    if (weight == 0) continue;
    for_vectors(row_at(segments, p), epsilon, dim, [&](int64_t i, int count, auto x) {
      const auto log = log2(x);
      store_some(scratch + i, exp2(power * log) * (log * kLn2<A>), count);
    });
    grad_power += weight * dot(shared, scratch, dim);
  }
  return grad_power;
}

template <class T>
void combine(const Accumulator<T>* rows, int64_t dim, const RowShare<Accumulator<T>>* shares,
             int64_t count, const T* x, Accumulator<T> power, Accumulator<T> epsilon, T* grad_x,
             Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  if (count == 0) {
    std::memset(grad_x, 0, dim * sizeof(T));
    return;
  }
  sum_rows(rows, dim, shares, count, scratch);
  A* slope = scratch + dim;
  for_vectors(x, epsilon, dim, [&](int64_t i, int filled, auto clamped) {
    store_some(slope + i, exp2((power - 1) * log2(clamped)) * power, filled);
  });
  for (int64_t i = 0; i < dim; ++i) {
    scratch[i] = to_accumulator(x[i]) < epsilon ? A(0) : scratch[i] * slope[i];
  }
  scale_row(grad_x, scratch, A(1), dim);
}

template <class T>
Accumulator<T> dot_powers(const T* x, const Accumulator<T>* shared, int64_t dim,
                          Accumulator<T> power, Accumulator<T> epsilon) {
  Vector<T> sum = {};
  Accumulator<T> total = 0;
  for_vectors(x, epsilon, dim, [&](int64_t i, int count, auto clamped) {
    const auto raised = exp2(power * log2(clamped));
    if (count == kLanes<T>) {
      sum += raised * load(shared + i);
    } else {
      for (int j = 0; j < count; ++j) total += raised[j] * shared[i + j];
    }
  });
  for (int j = 0; j < kLanes<T>; ++j) total += sum[j];
  return total;
}

template <class T>
constexpr SegmentGem<T> kernel{forward<T>, share<T>, combine<T>, dot_powers<T>};

}  // namespace

template <>
const SegmentGemKernels& table_of<SegmentGemKernels, Isa::EMBLAS_ISA>() {
  static constexpr SegmentGemKernels table{kernel<float>, kernel<double>, kernel<bfloat16>,
                                           kernel<float16>};
  return table;
}

}  // namespace emblas
