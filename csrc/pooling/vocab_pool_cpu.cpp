// Vocabulary pooling on a CPU: a tile's columns are cut among the threads; each sequence's running
// maxima stay in the first-level cache while its rows of the tile pass by.
#include "common/isa.h"
#include "pooling/rows.h"
#include "pooling/vocab_pool.h"

namespace emblas {
namespace {

template <class T>
void fold(const VocabTile<T>& tile, int64_t first, int64_t last, Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  const Segments<T>& segments = tile.segments;
  for (int64_t b = 0; b < tile.batch; ++b) {
    const Range range = range_of(segments, b, PoolMode::mean);
    const int64_t begin = range.begin > tile.first_token ? range.begin : tile.first_token;
    const int64_t end = range.end < tile.last_token ? range.end : tile.last_token;
    for (int64_t t = begin; t < end; ++t) {
      if (segments.weights && segments.weights[t] == 0) continue;
      const T* row = tile.logits + (t - tile.first_token) * tile.row_stride + first;
      A* best = tile.out + b * tile.vocab + first;
      int32_t* argmax = tile.argmax + b * tile.vocab + first;
      if constexpr (sizeof(T) == sizeof(A)) {
        take_larger(best, argmax, row, int32_t(t), last - first);
      } else {
        widen_row(scratch, row, last - first);
        take_larger(best, argmax, scratch, int32_t(t), last - first);
      }
    }
  }
}

template <class T>
constexpr VocabPool<T> kernel{fold<T>, add_row<T>, scale_row<T, Accumulator<T>>};

}  // namespace

template <>
const VocabPoolKernels& table_of<VocabPoolKernels, Isa::EMBLAS_ISA>() {
  static constexpr VocabPoolKernels table{kernel<float>, kernel<double>, kernel<bfloat16>,
                                          kernel<float16>};
  return table;
}

}  // namespace emblas
