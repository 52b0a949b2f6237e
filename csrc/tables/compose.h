// Composed embeddings: the vector of an id is put together from rows of one or several tables.
//
//   row_p(id)  = key_p(id) mod m_p                        the row that part p takes from its table
//   e_s(id)    = sum | mean | product of s_p E_p[row_p]   over the parts p of slot s
//   e(id)      = (e_1(id), e_2(id), ...)                  the slots of its feature side by side
//   out_b      = sum | mean | max of w e(id) over the ids of bag b; zero if the bag is empty
//
// s_p = -1 where the part is signed and the highest bit of its key is set, else 1. w is a weight of
// the id, or one weight for each of its parts (then it stands inside the sum). Several features,
// each with its ids, write their columns of one output. All tables lie in one flat array: row r of
// a part starts at base + r stride; with stride < width rows overlap (chunks of a memory array).
//
// With one slot this is the hashing trick (1 part), thinc's HashEmbed (4), hash embeddings (weights
// per part) and the quotient-remainder trick (product); with several slots, the concatenation of
// partitions, feature multiplexing and ROBE.
//
// Backward, g_b = d loss / d out_b, bag b of id i, c = w s_p times the mean's 1 / count:
//   dE_p[r]  = sum of c g_b, times the other factors of a product, over the lookups of row r
//   dw_i     = e(id_i) . g_b,   or for weights per part   dw_ip = s_p E_p[row_p] . g_b
//
// Bytes: forward reads ids and the rows in use and writes out. Backward has two ways, chosen by
// size. A large table: sort the lookups by row (a stable counting sort, 12
// bytes per lookup) and add up one row at a time in registers, reading grad_out rows in random
// order; a row of the gradient is written once. A small table that many lookups share: each task
// owns a range of rows, goes through all lookups in their order and adds up those in its range, so
// that grad_out is read once, in order, and the rows stay in the cache. Either way a row is added
// up by one thread, by feature, then id, then part, and an optimizer is applied to it on the spot.
// Where ids are bags of their own and most of them repeat, both ways work on one sum of gradients
// for each id (repeats.h): grad_out is read once, not once for each part.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace emblas {

// radix: key = id / a, row = key mod m. linear: key = (a id + b) mod p, exact in 128 bits. Hashes:
// a is the seed and b the number of the 32-bit key (tables.h).
enum class KeyKind : int64_t { murmur3, splitmix64, radix, linear };
inline constexpr int64_t kKeyKinds = 4;
enum class Combine : int64_t { sum, mean, product };
enum class BagMode : int64_t { sum, mean, max };
inline constexpr int64_t kMaxParts = 256;       // of one feature
inline constexpr uint32_t kNoRow = 0x7fffffff;  // of the padding id
inline constexpr uint32_t kSignBit = 0x80000000;

// As the operators take it: so many integers in this order.
struct Part {
  int64_t feature, kind, a, b, p;
  int64_t rows;   // m, 1 to 2^31 - 1
  int64_t limit;  // ids must be below it; 0 for any 64-bit pattern
  int64_t base, stride, width, column;
  int64_t is_signed;
};
inline constexpr int64_t kPartFields = sizeof(Part) / sizeof(int64_t);

struct Feature {
  const Part* parts;
  int64_t num_parts;
  const int64_t* ids;  // `step` elements apart
  int64_t first;       // position in all ids of the first one
  int64_t step, count;
  const int32_t* offsets;  // [bags + 1] positions in all ids, or null: one id per bag
  uint32_t* numbers;       // [count, num_parts] rows with their sign bit, for the backward pass
};

template <class T>
struct ComposeArgs {
  Combine combine;
  BagMode mode;
  const T* table;
  const Accumulator<T>* weights;  // [ids, weights_per_id] or null
  int64_t weights_per_id;         // 0, 1 or num_parts
  const int64_t* padding_id;      // contributes nothing; null for none
  int64_t bags, dim;
};

struct Lookup {
  uint32_t row, id, part;  // id and part count inside the feature, which `part` names:
};  // numbers of parts go on from one feature to the next

template <class T>
struct ComposeGradient {
  ComposeArgs<T> args;
  const Feature* features;
  const Part* parts;            // of all features
  const int32_t* bag_of;        // [ids], or null: one id per bag
  const int32_t* argmax;        // [bags, dim] positions, for BagMode::max
  const Accumulator<T>* scale;  // [features, bags] of BagMode::mean, else null
  const T* grad_out;            // [bags, dim]
};

enum class OptimizerKind : int64_t { sgd, row_wise_adagrad, adagrad, adam };
inline constexpr int64_t kOptimizers = 4;

// Optimizer state beside one row. Adam's moments decay by beta^(steps since the row was last
// touched) and its weight decay counts those steps too; the row itself stood still meanwhile.
struct OptimizerStep {
  OptimizerKind kind;
  double learning_rate, epsilon, beta1, beta2, weight_decay;
  int64_t step;  // from 1
};

template <class T>
struct Compose {
  // The columns of one feature in out [bags, dim] for the bags [first, last); scratch holds dim
  // accumulators twice. argmax is written for BagMode::max.
  void (*forward)(const ComposeArgs<T>&, const Feature&, int64_t first, int64_t last,
                  Accumulator<T>* scratch, T* out, int32_t* argmax);
  // grad_weights of the ids [first, last) of one feature, from feature.numbers.
  void (*grad_weights)(const ComposeGradient<T>&, const Feature&, int64_t first, int64_t last,
                       Accumulator<T>* grad_weights);
  // total [width] = the gradient of lookups [first, last), at least one, all of one row.
  void (*add_lookups)(const ComposeGradient<T>&, const Lookup* first, const Lookup* last,
                      const Lookup* end, Accumulator<T>* total, Accumulator<T>* scratch);
  // Adds the gradients of the rows [first, last) of the table that these parts use, in the order of
  // the lookups, to total [last - first, width]; sets used[row - first] unless it is null. Not for
  // products and maxima.
  void (*add_in_order)(const ComposeGradient<T>&, const int64_t* parts, int64_t num_parts,
                       int64_t first, int64_t last, Accumulator<T>* total, uint8_t* used);
  void (*store_row)(T* to, const Accumulator<T>* from, int64_t width);
  // One step on one row. first and second: the optimizer's state of this row ([1] or [width]);
  // last_step: Adam's, of this row.
  void (*update_row)(const OptimizerStep&, T* row, const Accumulator<T>* gradient, int64_t width,
                     Accumulator<T>* first, Accumulator<T>* second, int64_t* last_step);
};

struct ComposeKernels {
  // feature.numbers for its ids [first, last).
  void (*numbers)(const Feature&, const int64_t* padding_id, int64_t first, int64_t last);
  ByDtype<Compose> compose;
};

}  // namespace emblas
