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

// The rows of consecutive ids, id by id, as offsets from the first row. Ids are hashed a block at a
// time and two blocks are kept, so that the rows of later ids are known at every id.
class Rows {
 public:
  // Of the ids [first, last), rows `row_stride` elements apart.
  Rows(const HashedIds& hashed, int64_t row_stride, int64_t first, int64_t last)
      : hashed_(hashed),
        modulo_(hashed.num_embeddings),
        row_stride_(row_stride),
        first_(first),
        last_(last),
        filled_(first) {}

  // Makes the rows of an id known; those of ids more than kBlock before are lost.
  void reach(int64_t id) {
    while (filled_ <= id && filled_ < last_) fill();
  }
  // The num_hashes rows of an id, followed by those of the ids up to end_of_run(id).
  const int64_t* of(int64_t id) const { return rows_ + place(id) * hashed_.num_hashes; }
  int64_t end_of_run(int64_t id) const {
    const int64_t end = id + kKept - place(id);
    return end < filled_ ? end : filled_;
  }

 private:
  static constexpr int kKept = 2 * kBlock;

  int64_t place(int64_t id) const { return (id - first_) & (kKept - 1); }

  void fill() {
    constexpr int lanes = EMBLAS_VECTOR_BYTES / 8;
    int64_t* to = rows_ + place(filled_) * hashed_.num_hashes;
    const int count = last_ - filled_ < kBlock ? int(last_ - filled_) : kBlock;
    for (int i = 0; i < count; ++i) ids_[i] = hashed_.ids[(filled_ + i) * hashed_.stride];
    for (int i = 0; i < count; i += lanes) {  // lanes past the count hold ids of before
      vuint64 id;
      std::memcpy(&id, ids_ + i, sizeof id);
      for (int key = 0; key < hashed_.num_hashes; key += 4) {
        const Hash128<vuint64> words = four_keys(hashed_.family, hashed_.seed, id, key / 4);
        const vuint64 keys[4] = {words.low & 0xffffffff, words.low >> 32, words.high & 0xffffffff,
                                 words.high >> 32};
        int64_t rows[4][lanes];
        for (int j = 0; j < 4; ++j) {
          const vuint64 offsets = modulo_(keys[j]) * uint64_t(row_stride_);
          std::memcpy(rows[j], &offsets, sizeof offsets);
        }
        const int group = hashed_.num_hashes - key < 4 ? int(hashed_.num_hashes) - key : 4;
        for (int lane = 0; lane < lanes; ++lane) {
          for (int j = 0; j < group; ++j) {
            to[(i + lane) * hashed_.num_hashes + key + j] = rows[j][lane];
          }
        }
      }
    }
    filled_ += count;
  }

  const HashedIds& hashed_;
  const VectorModulo modulo_;
  const int64_t row_stride_, first_, last_;
  int64_t filled_;  // the ids before it are done
  alignas(64) int64_t ids_[kBlock] = {};
  alignas(64) int64_t rows_[kKept * kMaxHashes];
};

template <class Row>
void hash_ids(const HashedIds& hashed, int64_t first, int64_t last, Row* keys) {
  Rows rows(hashed, 1, first, last);
  Row* to = keys + first * hashed.num_hashes;
  for (int64_t id = first, end; id < last; id = end) {
    rows.reach(id);
    end = rows.end_of_run(id);
    const int64_t count = (end - id) * hashed.num_hashes;
    for (int64_t i = 0; i < count; ++i) to[i] = Row(rows.of(id)[i]);
    to += count;
  }
}

// A run of rows of ids that follow each other.
template <class T, bool weighted>
struct RowRun {
  const T* table;
  const int64_t *offsets, *later;
  const Accumulator<T>* coefficients;

  const T* row(int l) const { return table + offsets[l]; }
  const T* later_row(int l) const { return table + later[l]; }
  Accumulator<T> coefficient(int l) const {
    if constexpr (weighted) return coefficients[l];
    return 1;
  }
};

// The table rows of the ids [first, last), which are asked for in rising order.
template <class T>
class RowStream {
 public:
  RowStream(const HashBagArgs<T>& args, int64_t first, int64_t last)
      : numbers_(args.hashed, args.row_stride, first, last),
        args_(args),
        num_hashes_(int(args.hashed.num_hashes)),
        fetch_(fetch_of(int64_t(args.hashed.num_embeddings) * args.dim * int64_t(sizeof(T)))),
        far_(fetch_ != Fetch::nothing),
        ahead_(prefetch_distance(args.hashed.num_hashes * args.dim * int64_t(sizeof(T)))),
        last_(last) {
    for (int64_t id = first; far_ && id < first + ahead_ && id < last; ++id) prefetch_rows(id);
  }

  // num_hashes rows of an id; null if it is the padding id. Those of a later id are asked for.
  const T* const* of(int64_t id) {
    if (far_) prefetch_rows(later(id));
    numbers_.reach(id);
    if (is_padding(args_.hashed, id)) return nullptr;
    for (int j = 0; j < num_hashes_; ++j) rows_[j] = args_.table + numbers_.of(id)[j];
    return rows_;
  }

  // total += the rows of the ids [begin, end), weighted; returns whether there were any.
  bool add(int64_t begin, int64_t end, Accumulator<T>* total) {
    bool any = false;
    for (int64_t id = begin; id < end;) {
      numbers_.reach(later(id));
      if (is_padding(args_.hashed, id)) {
        ++id;
        continue;
      }
      any = true;
      int64_t run_end = numbers_.end_of_run(id);
      if (run_end > end) run_end = end;
      if (run_end > id + kMost / num_hashes_) run_end = id + kMost / num_hashes_;
      for (int64_t i = id + 1; args_.hashed.padding_id && i < run_end; ++i) {
        if (is_padding(args_.hashed, i)) run_end = i;
      }
      switch (fetch_) {
        case Fetch::nothing:
          id = add_run<Fetch::nothing>(id, run_end, total);
          break;
        case Fetch::first_level:
          id = add_run<Fetch::first_level>(id, run_end, total);
          break;
        case Fetch::second_level:
          id = add_run<Fetch::second_level>(id, run_end, total);
      }
    }
    return any;
  }

 private:
  static constexpr int kMost = 2 * kMaxHashes;  // rows in a run

  int64_t later(int64_t id) const { return far_ && id + ahead_ < last_ ? id + ahead_ : id; }
  void prefetch_rows(int64_t id) {
    numbers_.reach(id);
    for (int j = 0; j < num_hashes_; ++j) prefetch(args_.table + numbers_.of(id)[j], args_.dim);
  }

  // Adds the rows of the ids [id, end) or of some of them, and returns where it ended.
  template <Fetch fetch>
  int64_t add_run(int64_t id, int64_t end, Accumulator<T>* total) {
    const int64_t* later_rows = numbers_.of(later(id));
    if constexpr (fetch != Fetch::nothing) {
      const int64_t known = numbers_.end_of_run(later(id)) - later(id);
      if (end > id + known) end = id + known;
    }
    const int count = int(end - id) * num_hashes_;
    const int64_t* rows = numbers_.of(id);
    if (args_.weights) {
      for (int l = 0; l < count;) {
        const Accumulator<T> weight = args_.weights[id + l / num_hashes_];
        for (int j = 0; j < num_hashes_; ++j) coefficients_[l++] = weight;
      }
      const RowRun<T, true> run{args_.table, rows, later_rows, coefficients_};
      add_rows<fetch, T>(total, total, run, count, args_.dim);
    } else {
      const RowRun<T, false> run{args_.table, rows, later_rows, nullptr};
      add_rows<fetch, T>(total, total, run, count, args_.dim);
    }
    return end;
  }

  Rows numbers_;
  const HashBagArgs<T>& args_;
  const int num_hashes_;
  const Fetch fetch_;
  const bool far_;
  const int ahead_;  // ids
  const int64_t last_;
  const T* rows_[kMaxHashes];
  Accumulator<T> coefficients_[kMost];
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
    if (end - begin == 1) {
      const T* const* rows = stream.of(begin);
      const A weight = args.weights ? args.weights[begin] : A(1);
      if (rows) {
        sum_rows<false>(to, rows, num_hashes, weight, args.dim);
        continue;
      }
    } else {
      std::memset(scratch, 0, args.dim * sizeof(A));
      if (stream.add(begin, end, scratch)) {
        store_row(to, scratch, args.dim);
        continue;
      }
    }
    std::memset(to, 0, args.dim * sizeof(T));  // an empty bag
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
      const T* const* rows = stream.of(i);
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
  const bool far = (last - first) * args.dim * int64_t(sizeof(A)) > kCachedBytes;
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
      if (far && l + ahead < count) {
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
