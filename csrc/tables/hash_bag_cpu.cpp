// Hashed lookups on a CPU. Ids are hashed a block at a time, one id per 64-bit lane, into row
// numbers that stay in the first-level cache; the rows of later ids are prefetched while those of
// the current one are added in registers.
#include "common/isa.h"
#include "tables/lookup.h"
#include "tables/tables.h"

namespace emblas {
namespace {

bool is_padding(const HashedIds& hashed, int64_t i) {
  return hashed.padding_id && hashed.ids[i * hashed.stride] == *hashed.padding_id;
}

// The rows of consecutive ids. They are hashed a block at a time and two blocks are kept, so that
// the rows of later ids are known at every id.
class Rows {
 public:
  // Of the ids [first, last).
  Rows(const HashedIds& hashed, int64_t first, int64_t last)
      : hashed_(hashed),
        modulo_(hashed.num_embeddings),
        first_(first),
        last_(last),
        filled_(first) {}

  // Makes the rows of an id known; those of ids more than kBlock before are lost.
  void reach(int64_t id) {
    while (filled_ <= id && filled_ < last_) fill();
  }
  uint64_t of(int64_t id, int64_t j) const { return rows_[j][(id - first_) & (kKept - 1)]; }

 private:
  static constexpr int kKept = 2 * kBlock;

  void fill() {
    constexpr int lanes = EMBLAS_VECTOR_BYTES / 8;
    const int64_t at = (filled_ - first_) & (kKept - 1);
    const int count = last_ - filled_ < kBlock ? int(last_ - filled_) : kBlock;
    for (int i = 0; i < count; ++i) ids_[i] = hashed_.ids[(filled_ + i) * hashed_.stride];
    for (int i = 0; i < count; i += lanes) {  // lanes past the count hold ids of before
      vuint64 id;
      std::memcpy(&id, ids_ + i, sizeof id);
      for (int key = 0; key < hashed_.num_hashes; key += 4) {
        const Hash128<vuint64> words = four_keys(hashed_.family, hashed_.seed, id, key / 4);
        const vuint64 keys[4] = {words.low & 0xffffffff, words.low >> 32, words.high & 0xffffffff,
                                 words.high >> 32};
        for (int j = 0; j < 4 && key + j < hashed_.num_hashes; ++j) {
          const vuint64 rows = modulo_(keys[j]);
          std::memcpy(rows_[key + j] + at + i, &rows, sizeof rows);
        }
      }
    }
    filled_ += count;
  }

  const HashedIds& hashed_;
  const Modulo modulo_;
  const int64_t first_, last_;
  int64_t filled_;  // the ids before it are done
  alignas(64) int64_t ids_[kBlock] = {};
  alignas(64) uint64_t rows_[kMaxHashes][kKept];
};

template <class Row>
void hash_ids(const HashedIds& hashed, int64_t first, int64_t last, Row* keys) {
  Rows rows(hashed, first, last);
  Row* to = keys + first * hashed.num_hashes;
  for (int64_t id = first; id < last; ++id) {
    rows.reach(id);
    for (int j = 0; j < hashed.num_hashes; ++j) *to++ = Row(rows.of(id, j));
  }
}

// The table rows of consecutive ids, one id per call of next().
template <class T>
class RowStream {
 public:
  RowStream(const HashBagArgs<T>& args, int64_t first, int64_t last)
      : numbers_(args.hashed, first, last),
        args_(args),
        far_(int64_t(args.hashed.num_embeddings) * args.dim * int64_t(sizeof(T)) > kCachedBytes),
        ahead_(prefetch_distance(args.hashed.num_hashes * args.dim * int64_t(sizeof(T)))),
        next_(first),
        last_(last) {
    for (int64_t id = first; far_ && id < first + ahead_ && id < last; ++id) {
      numbers_.reach(id);
      prefetch_rows(id);
    }
  }

  bool far() const { return far_; }

  // num_hashes rows of the next id; null if it is the padding id.
  const T* const* next() {
    const int64_t id = next_++;
    later_ = id + ahead_ < last_ ? id + ahead_ : id;
    numbers_.reach(later_);
    if (is_padding(args_.hashed, id)) return nullptr;
    for (int j = 0; j < args_.hashed.num_hashes; ++j) rows_[j] = row(id, j);
    return rows_;
  }
  // Row j of the id that comes `ahead` after the one that next() gave; null if the table is near.
  const T* later(int j) const { return far_ ? row(later_, j) : nullptr; }
  // Asks for the rows of that id at once.
  void prefetch_later() const {
    if (far_) prefetch_rows(later_);
  }

 private:
  const T* row(int64_t id, int j) const {
    return args_.table + int64_t(numbers_.of(id, j)) * args_.row_stride;
  }
  void prefetch_rows(int64_t id) const {
    for (int j = 0; j < args_.hashed.num_hashes; ++j) prefetch(row(id, j), args_.dim);
  }

  Rows numbers_;
  const HashBagArgs<T>& args_;
  const bool far_;
  const int ahead_;  // ids
  int64_t next_, last_, later_ = 0;
  const T* rows_[kMaxHashes];
};

// The first id of a bag; ids of the bags [first, last) are those from first_id(first) on.
template <class T>
int64_t first_id(const HashBagArgs<T>& args, int64_t bag) {
  return args.offsets ? args.offsets[bag] : bag;
}

template <class T>
void forward(const HashBagArgs<T>& args, int64_t first, int64_t last, Accumulator<T>* scratch,
             T* out) {
  using A = Accumulator<T>;
  const int num_hashes = int(args.hashed.num_hashes);
  RowStream<T> stream(args, first_id(args, first), first_id(args, last));
  for (int64_t b = first; b < last; ++b) {
    const int64_t begin = first_id(args, b), end = first_id(args, b + 1);
    T* to = out + b * args.dim;
    const bool single = end - begin == 1;
    RowSum<T> sum(scratch, args.dim, stream.far());
    if (!single) std::memset(scratch, 0, args.dim * sizeof(A));
    bool empty = true;
    for (int64_t i = begin; i < end; ++i) {
      const T* const* rows = stream.next();
      if (!rows) continue;
      empty = false;
      const A weight = args.weights ? args.weights[i] : A(1);
      if (single) {
        stream.prefetch_later();
        sum_rows<false>(to, rows, num_hashes, weight, args.dim);
      } else {
        for (int j = 0; j < num_hashes; ++j) sum.add(rows[j], weight, stream.later(j));
      }
    }
    sum.flush();
    if (empty) {
      std::memset(to, 0, args.dim * sizeof(T));
    } else if (!single) {
      store_row(to, scratch, args.dim);
    }
  }
}

// (sum_j rows[j]) . other
template <class T>
Accumulator<T> dot_rows(const T* const* rows, int count, const T* other, int64_t dim) {
  constexpr int lanes = kLanes<T>;
  Vector<T> products{};
  int64_t i = 0;
  for (; i + lanes <= dim; i += lanes) {
    Vector<T> total = load(rows[0] + i);
    for (int j = 1; j < count; ++j) total += load(rows[j] + i);
    products += total * load(other + i);
  }
  Accumulator<T> result = sum(products);
  for (; i < dim; ++i) {
    Accumulator<T> total = to_accumulator(rows[0][i]);
    for (int j = 1; j < count; ++j) total += to_accumulator(rows[j][i]);
    result += total * to_accumulator(other[i]);
  }
  return result;
}

template <class T>
void grad_weights(const HashBagArgs<T>& args, int64_t first, int64_t last, const T* grad_out,
                  Accumulator<T>* grad_weights) {
  const int num_hashes = int(args.hashed.num_hashes);
  RowStream<T> stream(args, first_id(args, first), first_id(args, last));
  for (int64_t b = first; b < last; ++b) {
    const T* grad = grad_out + b * args.dim;
    for (int64_t i = first_id(args, b); i < first_id(args, b + 1); ++i) {
      const T* const* rows = stream.next();
      stream.prefetch_later();
      grad_weights[i] = rows ? dot_rows(rows, num_hashes, grad, args.dim) : Accumulator<T>(0);
    }
  }
}

template <class T>
void grad_table(const HashBagTableArgs<T>& args, int64_t first, int64_t last,
                Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  constexpr bool in_place = sizeof(T) == sizeof(A);
  T* out = args.grad_table + first * args.dim;
  A* total = scratch;
  if constexpr (in_place) total = out;
  std::memset(total, 0, (last - first) * args.dim * sizeof(A));

  struct Lookup {
    int64_t row, bag;
    A weight;
  } lookups[kBlock * kMaxHashes + 1];
  const int ahead = prefetch_distance(2 * args.dim * int64_t(sizeof(T)));
  const int64_t num_hashes = args.hashed.num_hashes;
  const int64_t ids = args.offsets ? args.offsets[args.bags] : args.bags;
  int64_t bag = 0;
  for (int64_t block = 0; block < ids; block += kBlock) {
    const int64_t block_end = block + kBlock < ids ? block + kBlock : ids;
    int count = 0;
    for (int64_t i = block; i < block_end; ++i) {
      if (!args.offsets) {
        bag = i;
      } else {
        while (i >= args.offsets[bag + 1]) ++bag;
      }
      if (is_padding(args.hashed, i)) continue;
      const A weight = args.weights ? args.weights[i] : A(1);
      for (int64_t j = 0; j < num_hashes; ++j) {
        const int64_t row = args.rows[i * num_hashes + j] - first;
        lookups[count] = {row, bag, weight};
        count += uint64_t(row) < uint64_t(last - first);  // no branch: it couldn't be foretold
      }
    }
    for (int l = 0; l < count; ++l) {
      if (l + ahead < count) {
        const Lookup& later = lookups[l + ahead];
        prefetch(total + later.row * args.dim, args.dim);
        prefetch(args.grad_out + later.bag * args.dim, args.dim);
      }
      const T* grad = args.grad_out + lookups[l].bag * args.dim;
      sum_rows<true, 1>(total + lookups[l].row * args.dim, &grad, 1, lookups[l].weight, args.dim);
    }
  }
  if constexpr (!in_place) store_row(out, total, (last - first) * args.dim);
}

template <class T>
constexpr HashBag<T> kernel{forward<T>, grad_weights<T>, grad_table<T>};

}  // namespace

template <>
const TablesKernels& table_of<TablesKernels, Isa::EMBLAS_ISA>() {
  static constexpr TablesKernels table{
      hash_ids<int64_t>,
      hash_ids<uint32_t>,
      {kernel<float>, kernel<double>, kernel<bfloat16>, kernel<float16>}};
  return table;
}

}  // namespace emblas
