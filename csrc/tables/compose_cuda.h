// Composed tables on a GPU: what compose_cuda.cu launches, on a stream (a cudaStream_t), never
// waiting. The formulas stand in compose.h.
#pragma once

#include "tables/compose.h"
#include "tables/tables_cuda.h"

namespace emblas::cuda {

// What the parts are travels in the arguments of the kernels, which hold 4 KiB.
inline constexpr int kMostParts = 32;

struct ComposePart {
  uint64_t a, b, p;
  uint64_t reciprocal;  // Modulo::reciprocal(rows), for hashes
  int64_t base;
  int32_t rows, stride, width, column;
  int32_t first_row;  // of its table, among the rows of all tables
  uint8_t kind, is_signed, feature;
  uint8_t slot_first, slot_size;  // its slot is the parts slot_first ... + slot_size - 1
};

struct Composed {
  ComposePart parts[kMostParts];
  uint8_t first_part[kMostParts + 1];  // of each feature, and behind the last
  int num_parts, num_features;
  int most_parts;  // of one feature
  int64_t dim;

  EMBLAS_HOST_DEVICE int parts_of(int feature) const {
    return first_part[feature + 1] - first_part[feature];
  }
};

struct ComposedIds {
  const int64_t* ids;
  int64_t count, bags;
  const int32_t* offsets;  // [features * bags + 1], or null: id b features + f is bag b's
  bool has_padding;
  int64_t padding_id;
};

template <class T>
struct ComposeBagArgs {
  ComposedIds ids;
  Combine combine;
  BagMode mode;
  const T* table;
  const Accumulator<T>* weights;  // [ids, weights_per_id] or null
  int64_t weights_per_id;         // 0, 1 or the parts of every feature
};

template <class T>
struct ComposeGradientArgs {
  ComposeBagArgs<T> forward;
  const int32_t* segment_of;    // [ids] feature * bags + bag; null where offsets are
  const uint32_t* numbers;      // [ids, most_parts] rows with their sign bit
  const int32_t* argmax;        // [bags, dim], for BagMode::max
  const Accumulator<T>* scale;  // [features * bags] of BagMode::mean, else null
  const T* grad_out;            // [bags, dim]
};

// The rows of one table: places bounds[r] to bounds[r + 1] - 1 of `order`, lookups i most_parts +
// p.
template <class T>
struct TableGradient {
  const int64_t* order;
  const int32_t* bounds;  // [rows + 1]
  int64_t lookups, rows, width;
  T* grad;  // [rows, width]
};

// The lookups of one table among those of all, sorted by their rows among those of all tables.
struct SortedLookups {
  const int64_t* order;  // lookups i most_parts + p
  const int32_t* keys;   // their rows, rising
  int64_t lookups;
  int64_t first_row, rows, width;  // of the table
};

// Its rows and an optimizer's state, from its first row on.
template <class T>
struct OptimizerArgs {
  T* table;                           // [rows, width]
  Accumulator<T>*first, *second;      // as OptimizerStep says: [rows], [rows, width], or not used
  int64_t* last_step;                 // [rows], of Adam
  const int64_t* steps;               // taken, with this one
  const Accumulator<T>* corrections;  // [2], see count_optimizer_step
};

// out [bags, dim]; argmax [bags, dim] for BagMode::max, -1 where a bag is empty. `aligned`: rows
// and columns start at multiples of 16 bytes.
template <class T>
void compose_bag(const ComposeBagArgs<T>& args, const Composed& composed, bool aligned, T* out,
                 int32_t* argmax, void* stream);

// numbers [ids, most_parts], kNoRow for ids that count for nothing; keys: the same among the rows
// of all tables, and `rows`, their number.
void compose_lookups(const ComposedIds& ids, const Composed& composed, const int32_t* segment_of,
                     int64_t rows, uint32_t* numbers, int32_t* keys, void* stream);

// scale [features * bags]: 1 / the ids that count in each bag; infinite where none does.
template <class A>
void bag_scales(const ComposedIds& ids, const Composed& composed, A* scale, void* stream);

// partial: workspace of piece_rows(lookups) x width.
template <class T>
void compose_table_gradient(const ComposeGradientArgs<T>& args, const Composed& composed,
                            const TableGradient<T>& table, bool aligned, Accumulator<T>* partial,
                            void* stream);

// ranks [lookups] 1 where a row of the table begins, else 0: with their sums, list_used_rows writes
// the numbers of the rows in use, and their `count`.
void mark_used_rows(const SortedLookups& sorted, int32_t* marks, void* stream);
void list_used_rows(const SortedLookups& sorted, const int64_t* ranks, int64_t* rows,
                    int64_t* count, void* stream);

// Gradients of the rows in use, `stride` apart: those of the rows by rank, or where ranks are null
// by the place of their first lookup. E: T or its accumulator; partial: as above.
template <class T, class E>
void compose_used_gradient(const ComposeGradientArgs<T>& args, const Composed& composed,
                           const SortedLookups& sorted, bool aligned, Accumulator<T>* partial,
                           const int64_t* ranks, E* gradients, int64_t stride, void* stream);

// Counts a step; corrections: Adam's rate, and what its second moments are multiplied by.
template <class A>
void count_optimizer_step(const OptimizerStep& step, int64_t* steps, A* corrections, void* stream);

// Takes the step on each row in use where its gradient is summed up.
template <class T>
void compose_update(const ComposeGradientArgs<T>& args, const Composed& composed,
                    const SortedLookups& sorted, bool aligned, Accumulator<T>* partial,
                    const OptimizerStep& step, const OptimizerArgs<T>& optimizer, void* stream);
// It does so for narrow rows whose gradients are sums of others times numbers.
template <class T>
bool updates_in_sums(Combine combine, BagMode mode, int64_t width);
// Else from gradients by the place of first lookups.
template <class T>
void update_used_rows(const SortedLookups& sorted, bool aligned, const Accumulator<T>* gradients,
                      int64_t stride, const OptimizerStep& step, const OptimizerArgs<T>& optimizer,
                      void* stream);

// grad_weights [ids, weights_per_id]; most_width: of one part.
template <class T>
void compose_weight_gradient(const ComposeGradientArgs<T>& args, const Composed& composed,
                             int64_t most_width, bool aligned, Accumulator<T>* grad_weights,
                             void* stream);

}  // namespace emblas::cuda
