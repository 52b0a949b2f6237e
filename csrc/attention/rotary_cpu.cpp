// Rotary position embedding on a CPU: one pass over the heads of each token.
//
// Half-split pairs fill two vectors each. Interleaved pairs stay in one vector x: with cos and sin
// doubled, once for all heads of a token, the turn is x cos + swap(x) sin, where swap exchanges
// neighbours and sin has the signs -, +.
#include "attention/rotary.h"
#include "attention/vectors_cpu.h"
#include "common/isa.h"

namespace emblas {
namespace {

template <class V, int... lane>
inline V swap_neighbours(V x, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(x, x, (lane ^ 1)...);
}

template <class T>
void keep_rest(const RotaryArgs<T>& args, const T* from, T* to) {
  if (from == to) return;
  for (int64_t i = 2 * args.pairs; i < args.head_dim; ++i) to[i] = from[i];
}

template <class T>
void halves(const RotaryArgs<T>& args, int64_t first, int64_t last) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t pairs = args.pairs;
  const A sign = args.inverse ? -1 : 1;
  for (int64_t token = first; token < last; ++token) {
    const int64_t row = args.position_ids ? args.position_ids[token] : token;
    const A *const cos = args.cos + row * pairs, *const sin = args.sin + row * pairs;
    for (int64_t head = 0; head < args.heads; ++head) {
      const T* const from = args.x.at(token, head);
      T* const to = args.out.at(token, head);
      for (int64_t i = 0; i < pairs; i += lanes) {
        const int64_t left = pairs - i;
        const auto a = load_part(from + i, left), b = load_part(from + pairs + i, left);
        const auto c = load_part(cos + i, left), s = sign * load_part(sin + i, left);
        store_part<T>(to + i, a * c - b * s, left);
        store_part<T>(to + pairs + i, b * c + a * s, left);
      }
      keep_rest(args, from, to);
    }
  }
}

template <class T>
void interleaved(const RotaryArgs<T>& args, int64_t first, int64_t last, Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t size = 2 * args.pairs;
  A *const cos = scratch, *const sin = scratch + size;
  for (int64_t token = first; token < last; ++token) {
    const int64_t row = args.position_ids ? args.position_ids[token] : token;
    for (int64_t i = 0; i < size; ++i) {
      cos[i] = args.cos[row * args.pairs + i / 2];
      const A s = args.sin[row * args.pairs + i / 2];
      sin[i] = (i % 2 == 1) != args.inverse ? s : -s;
    }
    for (int64_t head = 0; head < args.heads; ++head) {
      const T* const from = args.x.at(token, head);
      T* const to = args.out.at(token, head);
      for (int64_t i = 0; i < size; i += lanes) {
        const int64_t left = size - i;
        const auto x = load_part(from + i, left);
        const auto swapped = swap_neighbours(x, std::make_integer_sequence<int, lanes>{});
        store_part<T>(to + i, x * load_part(cos + i, left) + swapped * load_part(sin + i, left),
                      left);
      }
      keep_rest(args, from, to);
    }
  }
}

template <class T>
constexpr Rotary<T> kernel{halves<T>, interleaved<T>};

}  // namespace

template <>
const RotaryKernels& table_of<RotaryKernels, Isa::EMBLAS_ISA>() {
  static constexpr RotaryKernels table{kernel<float>, kernel<double>, kernel<bfloat16>,
                                       kernel<float16>};
  return table;
}

}  // namespace emblas
