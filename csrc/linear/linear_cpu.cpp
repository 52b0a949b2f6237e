// Linear layers on a CPU. The innermost loop multiplies kRows broadcast elements of x with two
// vectors of columns: as many sums as fit into the registers, two loads and kRows broadcasts for
// 2 kRows multiply-adds.
#include <utility>

#include "common/isa.h"
#include "common/simd.h"
#include "linear/activations_cpu.h"
#include "linear/linear.h"

namespace emblas {
namespace {

#if defined(EMBLAS_HAS_AVX512) || defined(EMBLAS_HAS_NEON)
constexpr int kRows = 12;  // of 32 registers
#else
constexpr int kRows = 6;  // of 16
#endif
constexpr int64_t kGroup = 12;  // panels of a piece that the second-level cache holds
// Rows of x are copied in blocks of so many elements, so that whatever their stride is, they are
// read at constant distances and don't fall into the same lines of the first-level cache.
constexpr int64_t kBlock = 64;
constexpr int64_t kAhead = 8;  // elements along k that a panel is fetched ahead

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// out[r][0..kPanel) = start[r][0..kPanel) + sum_k x[r][k] panel[k], x in blocks.
template <int rows, class T>
void multiply_panel(const T* x, const T* panel, int64_t depth, const T* start, int64_t start_stride,
                    T* out, int64_t out_stride) {
  using V = Vector<T>;
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t c = 0; c < kPanel<T>; c += 2 * lanes) {
    V sum[rows][2];
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; i < 2; ++i) sum[r][i] = load(start + r * start_stride + c + i * lanes);
    }
    const T *left = x, *right = panel + c;
    for (int64_t k = 0; k < depth; k += kBlock, left += kRows * kBlock) {
      const int64_t count = smaller(kBlock, depth - k);
      for (int64_t j = 0; j < count; ++j, right += kPanel<T>) {
        const V first = load(right), second = load(right + lanes);
        for (int r = 0; r < rows; ++r) {
          const V factor = broadcast<V>(left[r * kBlock + j]);
          sum[r][0] += factor * first;
          sum[r][1] += factor * second;
        }
      }
    }
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; i < 2; ++i) store(out + r * out_stride + c + i * lanes, sum[r][i]);
    }
  }
}

// The same for the first `columns` columns of a panel.
template <int rows, class T>
void multiply_part(const T* x, const T* panel, int64_t depth, const T* start, int64_t start_stride,
                   T* out, int64_t out_stride, int64_t columns) {
  if (columns >= kPanel<T>) {
    return multiply_panel<rows>(x, panel, depth, start, start_stride, out, out_stride);
  }
  T sums[rows][kPanel<T>] = {};
  for (int r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) sums[r][c] = start[r * start_stride + c];
  }
  multiply_panel<rows>(x, panel, depth, sums[0], kPanel<T>, sums[0], kPanel<T>);
  for (int r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) out[r * out_stride + c] = sums[r][c];
  }
}

// x <- its transpose: blocks of 1, 2, 4, ... lanes are exchanged across the diagonal.
template <int width, class V, int... lane>
inline void exchange(V& a, V& b, std::integer_sequence<int, lane...>) {
  constexpr int lanes = sizeof...(lane);
  const V low = __builtin_shufflevector(a, b, (lane & width ? lanes + lane - width : lane)...);
  b = __builtin_shufflevector(a, b, (lane & width ? lanes + lane : lane + width)...);
  a = low;
}
template <int width = 1, class V, size_t lanes>
inline void transpose(V (&x)[lanes]) {
  if constexpr (width < int(lanes)) {
    for (int i = 0; i < int(lanes); ++i) {
      if (!(i & width)) {
        exchange<width>(x[i], x[i + width], std::make_integer_sequence<int, lanes>{});
      }
    }
    transpose<2 * width>(x);
  }
}

// to[k][0..lanes) = from[0..rows)[k] for k < depth, and zeros beyond the rows.
template <class T>
void pack_lanes(const T* from, int64_t stride, int64_t rows, int64_t depth, T* to) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t k = 0;
  for (; rows >= lanes && k + lanes <= depth; k += lanes) {
    Vector<T> x[lanes];
    for (int64_t r = 0; r < lanes; ++r) x[r] = load(from + r * stride + k);
    transpose(x);
    for (int64_t i = 0; i < lanes; ++i) store(to + (k + i) * kPanel<T>, x[i]);
  }
  for (; k < depth; ++k) {
    for (int64_t r = 0; r < lanes; ++r) to[k * kPanel<T> + r] = r < rows ? from[r * stride + k] : 0;
  }
}

template <class T>
void pack(const LinearArgs<T>& args, int64_t first, int64_t last) {
  const int64_t width = panels<T>(args.columns) * kPanel<T>;
  for (int64_t panel = first; panel < last; ++panel) {
    for (int64_t piece = 0; piece < args.depth; piece += kPiece<T>) {
      const int64_t depth = smaller(kPiece<T>, args.depth - piece);
      T* const to = args.packed + piece * width + panel * depth * kPanel<T>;
      for (int64_t lane = 0; lane < kPanel<T>; lane += kLanes<T>) {
        const int64_t column = panel * kPanel<T> + lane;
        pack_lanes(args.weight + column * args.weight_stride + piece, args.weight_stride,
                   args.columns - column, depth, to + lane);
      }
    }
  }
}

template <class T>
void copy_blocks(const T* from, int64_t stride, int64_t rows, int64_t depth, T* to) {
  for (int64_t k = 0; k < depth; k += kBlock, to += kRows * kBlock) {
    const int64_t count = smaller(kBlock, depth - k);
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(to + r * kBlock, from + r * stride + k, count * sizeof(T));
    }
  }
}

// out <- f(out) + residual, for a row of a panel.
template <class F, class T>
void finish_row(T* out, const T* residual, int64_t columns) {
  constexpr int64_t lanes = kLanes<T>;
  for (; columns >= lanes; columns -= lanes, out += lanes, residual += lanes) {
    store(out, F::of(load(out)) + load(residual));
  }
  if (columns == 0) return;
  T x[lanes] = {}, y[lanes] = {};
  std::memcpy(x, out, columns * sizeof(T));
  std::memcpy(y, residual, columns * sizeof(T));
  store(x, F::of(load(x)) + load(y));
  std::memcpy(out, x, columns * sizeof(T));
}

// The same for the rows and columns from `row` and `column` on, whose sums are complete.
template <class T>
void finish(const LinearArgs<T>& args, int64_t row, int64_t rows, int64_t column) {
  if (args.activation == Activation::none && args.residual == nullptr) return;
  // In the order of Activation.
  constexpr void (*functions[])(T*, const T*, int64_t) = {
      finish_row<Identity, T>, finish_row<Relu, T>, finish_row<Gelu, T>, finish_row<GeluTanh, T>,
      finish_row<Silu, T>};
  constexpr T zeros[kPanel<T>] = {};
  const int64_t columns = smaller(kPanel<T>, args.columns - column);
  for (const int64_t end = row + rows; row < end; ++row) {
    const T* const residual =
        args.residual ? args.residual + row * args.residual_stride + column : zeros;
    functions[int(args.activation)](args.out + row * args.columns + column, residual, columns);
  }
}

template <class T>
void multiply(const LinearArgs<T>& args, int64_t first, int64_t last, T* scratch) {
  constexpr T zeros[kPanel<T>] = {};
  const int64_t count = panels<T>(args.columns), width = count * kPanel<T>;
  for (int64_t group = 0; group < count; group += kGroup) {
    const int64_t end = smaller(group + kGroup, count);
    // A depth of nothing leaves the bias: one piece of no elements.
    for (int64_t piece = 0; piece == 0 || piece < args.depth; piece += kPiece<T>) {
      const int64_t depth = smaller(kPiece<T>, args.depth - piece);
      for (int64_t row = first; row < last;) {
        const int64_t rows = smaller(kRows, last - row);
        copy_blocks(args.x + row * args.x_stride + piece, args.x_stride, rows, depth, scratch);
        const int64_t ahead = smaller(kRows, last - row - rows);  // rows that come next
        for (int64_t panel = group; panel < end; ++panel) {
          // They are fetched a part at a time, while this block is multiplied: to the second level,
          // the first is full.
          for (int64_t r = panel - group; r < ahead; r += end - group) {
            const T* const next = args.x + (row + rows + r) * args.x_stride + piece;
            for (int64_t k = 0; k < depth; k += 64 / sizeof(T)) __builtin_prefetch(next + k, 0, 2);
          }
          const int64_t column = panel * kPanel<T>, columns = args.columns - column;
          const T* const weights = args.packed + piece * width + panel * depth * kPanel<T>;
          T* const out = args.out + row * args.columns + column;
          // So is the tile whose sums come next.
          const bool beside = panel + 1 < end;
          const T* const tile =
              beside ? out + kPanel<T> : args.out + (row + rows) * args.columns + group * kPanel<T>;
          for (int64_t r = 0; r < (beside ? rows : ahead); ++r) {
            __builtin_prefetch(tile + r * args.columns, 1);
            __builtin_prefetch(tile + r * args.columns + kPanel<T> - 1, 1);
          }
          const bool begin = piece == 0;
          const T* const start = !begin ? out : args.bias ? args.bias + column : zeros;
          const int64_t stride = begin ? 0 : args.columns;
          if (rows == kRows) {
            multiply_part<kRows>(scratch, weights, depth, start, stride, out, args.columns,
                                 columns);
          } else {
            int64_t r = 0;
            for (; r + 3 <= rows; r += 3) {
              multiply_part<3>(scratch + r * kBlock, weights, depth, start + r * stride, stride,
                               out + r * args.columns, args.columns, columns);
            }
            for (; r < rows; ++r) {
              multiply_part<1>(scratch + r * kBlock, weights, depth, start + r * stride, stride,
                               out + r * args.columns, args.columns, columns);
            }
          }
          if (piece + depth == args.depth) finish(args, row, rows, column);
        }
        row += rows;
      }
    }
  }
}

template <class T>
constexpr Linear<T> kernel{kRows, kRows * (kPiece<T> + kBlock), pack<T>, multiply<T>};

}  // namespace

template <>
const LinearKernels& table_of<LinearKernels, Isa::EMBLAS_ISA>() {
  static constexpr LinearKernels table{kernel<float>, kernel<double>};
  return table;
}

}  // namespace emblas
