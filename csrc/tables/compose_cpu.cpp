// Composed lookups on a CPU: rows of a block of ids first, one id per 64-bit lane where the key is
// a hash, then one pass per id over its rows.
#include "common/isa.h"
#include "tables/compose.h"
#include "tables/lookup.h"
#include "tables/numbers.h"
#include "tables/update.h"

namespace emblas {
namespace {

void write_numbers(const Feature& feature, const int64_t* padding_id, int64_t first, int64_t last) {
  Numbers numbers(feature, padding_id, first, last);
  uint32_t* to = feature.numbers + first * feature.num_parts;
  for (int64_t id = first; id < last; ++id) {
    numbers.reach(id);
    for (int64_t p = 0; p < feature.num_parts; ++p) *to++ = numbers.of(id, p);
  }
}

template <class T>
const T* row_of(const T* table, const Part& part, uint32_t number) {
  return table + part.base + int64_t(number & ~kSignBit) * part.stride;
}
template <class A>
A sign_of(uint32_t number) {
  return number & kSignBit ? A(-1) : A(1);
}

// Parts [p, slot_end(p)) of a feature form one slot.
int64_t slot_end(const Feature& feature, int64_t p) {
  const int64_t column = feature.parts[p].column;
  while (p < feature.num_parts && feature.parts[p].column == column) ++p;
  return p;
}

// The rows of one slot of one id.
template <class T>
struct Slot {
  int64_t column, width;
  int count = 0;
  bool plain = true;  // all coefficients are 1
  const T* rows[kMaxParts];
  Accumulator<T> coefficients[kMaxParts];
};

template <class T, class V>
V combined(Combine combine, const Slot<T>& slot, int64_t i, V lane) {
  V total = value(slot.rows[0] + i, lane) * slot.coefficients[0];
  for (int j = 1; j < slot.count; ++j) {
    const V next = value(slot.rows[j] + i, lane) * slot.coefficients[j];
    total = combine == Combine::product ? total * next : total + next;
  }
  return total;
}

// e_s(id) times `weight` into `to`.
template <bool add, class Out, class T>
void combine_rows(Combine combine, const Slot<T>& slot, Accumulator<T> weight, Out* to) {
  using A = Accumulator<T>;
  if (combine == Combine::mean) weight /= A(slot.count);
  if (combine != Combine::product && slot.plain) {
    return sum_rows<add>(to, slot.rows, slot.count, weight, slot.width);
  }
  map_lanes<T>(
      slot.width,
      [&](int64_t i, auto lane) {
        auto total = combined(combine, slot, i, lane) * weight;
        if constexpr (add) total += value(to + i, lane);
        return total;
      },
      [&](int64_t i, auto total) { put(to + i, total); });
}

template <class T>
Accumulator<T> id_weight(const ComposeArgs<T>& args, const Feature& feature, int64_t id) {
  if (args.weights_per_id != 1) return 1;
  return args.weights[feature.first + id * feature.step];
}
template <class T>
Accumulator<T> part_weight(const ComposeArgs<T>& args, const Feature& feature, int64_t id,
                           int64_t part) {
  if (args.weights_per_id <= 1) return 1;
  return args.weights[(feature.first + id * feature.step) * args.weights_per_id + part];
}

// visit(slot) for each slot of an id whose parts have the rows number(p).
template <class T, class Number, class Visit>
void for_slots(const ComposeArgs<T>& args, const Feature& feature, int64_t id, const Number& number,
               const Visit& visit) {
  Slot<T> slot;
  for (int64_t begin = 0, end; begin < feature.num_parts; begin = end) {
    end = slot_end(feature, begin);
    slot.column = feature.parts[begin].column;
    slot.width = feature.parts[begin].width;
    slot.count = 0;
    slot.plain = args.weights_per_id <= 1;
    for (int64_t p = begin; p < end; ++p) {
      const uint32_t n = number(p);
      slot.rows[slot.count] = row_of(args.table, feature.parts[p], n);
      slot.coefficients[slot.count++] =
          sign_of<Accumulator<T>>(n) * part_weight(args, feature, id, p);
      slot.plain &= !(n & kSignBit);
    }
    visit(slot, begin);
  }
}

template <class T>
Fetch fetch_of(const Feature& feature) {
  int64_t bytes = 0;
  for (int64_t p = 0; p < feature.num_parts; ++p) {
    const Part& part = feature.parts[p];
    const bool again = p > 0 && part.base == feature.parts[p - 1].base;
    if (!again) bytes += part.rows * part.stride * int64_t(sizeof(T));
  }
  return fetch_of(bytes);
}

// The rows of consecutive ids of a feature, id by id and part by part, as sum_bags takes them.
template <class T>
class FeatureRows {
 public:
  // Of the ids [first, last).
  FeatureRows(const ComposeArgs<T>& args, const Feature& feature, int64_t first, int64_t last)
      : numbers_(feature, args.padding_id, first, last),
        args_(args),
        feature_(feature),
        last_(last),
        begin_(first),
        end_(first),
        plain_(!args.weights) {
    int64_t id_bytes = 0;
    for (int64_t p = 0; p < feature.num_parts; ++p) {
      id_bytes += feature.parts[p].width * int64_t(sizeof(T));
      plain_ &= !feature.parts[p].is_signed;
    }
    ahead_ = prefetch_distance(id_bytes);
    if (ahead_ > numbers_.most_ahead() / 2) ahead_ = numbers_.most_ahead() / 2;
    for (A& coefficient : coefficients_) coefficient = 1;
    if (fetch_of<T>(feature) == Fetch::nothing) {
      ahead_ = 0;
    } else if (first < last) {
      reach(first);
      for (int64_t l = 0; l < ahead_ * feature.num_parts; ++l) {
        prefetch(rows_[l], feature.parts[l % feature.num_parts].width);
      }
    }
  }

  int64_t rows_per_id() const { return feature_.num_parts; }
  RowSpan<T> list(int64_t id) {
    reach(id);
    const int64_t l = (id - begin_) * feature_.num_parts;
    return {rows_ + l, coefficients_ + l, ahead_ * feature_.num_parts};
  }
  int64_t run_end(int64_t id, int64_t end) const {
    const int64_t listed = end_ < last_ ? end_ - ahead_ : last_;
    if (end > listed) end = listed;
    for (int64_t k = id; args_.padding_id && k < end; ++k) {
      if (numbers_.of(k, 0) == kNoRow) return k;
    }
    return end;
  }

 private:
  using A = Accumulator<T>;

  // Lists an id and those up to `ahead_` after it; ids before it are lost.
  void reach(int64_t id) {
    while (end_ < last_ && end_ <= id + ahead_) {
      const int64_t parts = feature_.num_parts, begin = id < end_ ? id : end_;
      const int64_t from = (begin - begin_) * parts, kept = (end_ - begin) * parts;
      std::memmove(rows_, rows_ + from, kept * sizeof rows_[0]);
      if (!plain_) std::memmove(coefficients_, coefficients_ + from, kept * sizeof(A));
      begin_ = begin;
      const int block = numbers_.most_ahead();
      list_block(last_ - end_ < block ? last_ - end_ : block);
    }
  }

  void list_block(int64_t count) {
    const int64_t parts = feature_.num_parts;
    const T** const to = rows_ + (end_ - begin_) * parts;
    A* const coefficients = coefficients_ + (end_ - begin_) * parts;
    numbers_.reach(end_);
    for (int64_t p = 0; p < parts; ++p) {
      const uint32_t* numbers = numbers_.block(end_, p);
      const T* table = args_.table + feature_.parts[p].base;
      const int64_t stride = feature_.parts[p].stride;
      for (int64_t k = 0; k < count; ++k) {
        to[k * parts + p] = table + int64_t(numbers[k] & ~kSignBit) * stride;
      }
      for (int64_t k = 0; !plain_ && k < count; ++k) {
        coefficients[k * parts + p] = sign_of<A>(numbers[k]) *
                                      id_weight(args_, feature_, end_ + k) *
                                      part_weight(args_, feature_, end_ + k, p);
      }
    }
    end_ += count;
    if (end_ == last_) {  // rows after the last are asked for, too
      for (int64_t l = 0; l < ahead_ * parts; ++l) to[count * parts + l] = args_.table;
    }
  }

  Numbers numbers_;
  const ComposeArgs<T>& args_;
  const Feature& feature_;
  const int64_t last_;
  int64_t begin_, end_;  // the ids that are listed
  bool plain_;           // all coefficients are 1
  int ahead_;            // ids
  const T* rows_[kMostNumbers];
  A coefficients_[kMostNumbers];
};

template <class T>
void forward(const ComposeArgs<T>& args, const Feature& feature, int64_t first, int64_t last,
             Accumulator<T>* scratch, T* out, int32_t* argmax) {
  using A = Accumulator<T>;
  const int64_t begin_column = feature.parts[0].column;
  const Part& end_part = feature.parts[feature.num_parts - 1];
  const int64_t width = end_part.column + end_part.width - begin_column;
  const auto position = [&](int64_t bag) {  // of the bag's first id, inside the feature
    return feature.offsets ? feature.offsets[bag] - feature.first : bag;
  };
  const bool single = args.mode != BagMode::max;
  if (single && slot_end(feature, 0) == feature.num_parts &&
      (args.combine == Combine::sum || feature.num_parts == 1)) {
    FeatureRows<T> rows(args, feature, position(first), position(last));
    return sum_bags(fetch_of<T>(feature), rows, position, first, last, args.mode == BagMode::mean,
                    width, scratch, out + begin_column, args.dim);
  }
  const bool far = fetch_of<T>(feature) != Fetch::nothing;
  int64_t id_bytes = 0;
  for (int64_t p = 0; p < feature.num_parts; ++p) id_bytes += feature.parts[p].width * sizeof(T);
  const int64_t ids_begin = position(first), ids_end = position(last);
  Numbers numbers(feature, args.padding_id, ids_begin, ids_end);
  int ahead = prefetch_distance(id_bytes);
  if (ahead > numbers.most_ahead()) ahead = numbers.most_ahead();
  const auto prefetch_id = [&](int64_t id) {
    for (int64_t p = 0; p < feature.num_parts; ++p) {
      const Part& part = feature.parts[p];
      prefetch(row_of(args.table, part, numbers.of(id, p)), part.width);
    }
  };
  for (int64_t id = ids_begin; far && id < ids_begin + ahead && id < ids_end; ++id) {
    numbers.reach(id);
    prefetch_id(id);
  }
  for (int64_t b = first; b < last; ++b) {
    const int64_t begin = position(b), end = position(b + 1);
    T* to = out + b * args.dim + begin_column;
    int32_t* from = args.mode == BagMode::max ? argmax + b * args.dim + begin_column : nullptr;
    if (from) {
      for (int64_t i = 0; i < width; ++i) from[i] = -1;
    }
    int64_t used = 0;
    for (int64_t id = begin; id < end; ++id) {
      const int64_t later = id + ahead < ids_end ? id + ahead : id;
      numbers.reach(later);
      if (far) prefetch_id(later);
      if (numbers.of(id, 0) == kNoRow) continue;
      const A weight = id_weight(args, feature, id);
      const auto number = [&](int64_t p) { return numbers.of(id, p); };
      for_slots(args, feature, id, number, [&](const Slot<T>& slot, int64_t) {
        const int64_t at = slot.column - begin_column;
        if (end - begin == 1 && single) {
          combine_rows<false>(args.combine, slot, weight, to + at);
        } else if (args.mode == BagMode::max) {
          combine_rows<false>(args.combine, slot, weight, scratch + width + at);
        } else if (used) {
          combine_rows<true>(args.combine, slot, weight, scratch + at);
        } else {
          combine_rows<false>(args.combine, slot, weight, scratch + at);
        }
      });
      if (args.mode == BagMode::max) {
        for (int64_t k = 0; k < width; ++k) {
          if (from[k] >= 0 && !(scratch[width + k] > scratch[k])) continue;
          scratch[k] = scratch[width + k];
          from[k] = int32_t(feature.first + id * feature.step);
        }
      }
      ++used;
    }
    if (!used) {
      std::memset(to, 0, width * sizeof(T));
    } else if (end - begin > 1 || !single) {
      if (args.mode == BagMode::mean) {
        for (int64_t k = 0; k < width; ++k) scratch[k] *= A(1) / A(used);
      }
      store_row(to, scratch, width);
    }
  }
}

template <class T>
int64_t bag_of(const ComposeGradient<T>& gradient, const Feature& feature, int64_t id) {
  return gradient.bag_of ? gradient.bag_of[feature.first + id] : id;
}

template <class T>
Accumulator<T> bag_scale(const ComposeGradient<T>& gradient, int64_t feature, int64_t bag) {
  return gradient.scale ? gradient.scale[feature * gradient.args.bags + bag] : Accumulator<T>(1);
}

// (product or coefficient-weighted sum of the slot's rows) . grad
template <class T>
Accumulator<T> dot_slot(Combine combine, const Slot<T>& slot, const T* grad) {
  using A = Accumulator<T>;
  Vector<T> products{};
  A rest = 0;
  for_each_lane<T>(slot.width, [&](int64_t i, auto lane) {
    const auto total = combined(combine, slot, i, lane);
    if constexpr (sizeof lane == sizeof(A)) {
      rest += total * value(grad + i, lane);
    } else {
      products += total * value(grad + i, lane);
    }
  });
  const A result = sum(products) + rest;
  return combine == Combine::mean ? result / A(slot.count) : result;
}

template <class T>
void grad_weights(const ComposeGradient<T>& gradient, const Feature& feature, int64_t first,
                  int64_t last, Accumulator<T>* grad_weights) {
  using A = Accumulator<T>;
  ComposeArgs<T> args = gradient.args;
  const int64_t per_id = args.weights_per_id;
  args.weights_per_id = 0;  // slots with the signs alone
  for (int64_t id = first; id < last; ++id) {
    const uint32_t* numbers = feature.numbers + id * feature.num_parts;
    A* to = grad_weights + (feature.first + id * feature.step) * per_id;
    for (int64_t k = 0; k < per_id; ++k) to[k] = 0;
    if (numbers[0] == kNoRow) continue;
    const T* grad = gradient.grad_out + bag_of(gradient, feature, id) * args.dim;
    for_slots(
        args, feature, id, [&](int64_t p) { return numbers[p]; },
        [&](const Slot<T>& slot, int64_t begin) {
          if (per_id == 1) {
            to[0] += dot_slot(args.combine, slot, grad + slot.column);
            return;
          }
          for (int j = 0; j < slot.count; ++j) {
            const A along = dot(slot.rows[j], grad + slot.column, slot.width);
            to[begin + j] = slot.coefficients[j] * along /
                            (args.combine == Combine::mean ? A(slot.count) : A(1));
          }
        });
  }
}

template <class T>
void add_lookups(const ComposeGradient<T>& gradient, const Lookup* first, const Lookup* last,
                 const Lookup* end, Accumulator<T>* total, Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  const ComposeArgs<T>& args = gradient.args;
  const bool product = args.combine == Combine::product, max = args.mode == BagMode::max;
  const int64_t width = gradient.parts[first->part].width;
  constexpr int most = 256;  // rows at once
  const T* rows[most];
  A coefficients[most];
  int count = 0;
  const A* from = nullptr;
  const auto add_listed = [&] {
    add_rows<Fetch::nothing, T>(total, from, RowSpan<T>{rows, coefficients, 0}, count, width);
    from = total;
    count = 0;
  };
  const bool far = args.bags * args.dim * int64_t(sizeof(T)) > kCachedBytes;
  const bool plain = args.combine == Combine::sum && !args.weights && !gradient.scale && !max;
  const int64_t ahead = far ? prefetch_distance(width * int64_t(sizeof(T))) : end - first;
  const auto grad_row = [&](const Lookup& lookup) {
    const Part& part = gradient.parts[lookup.part];
    const Feature& feature = gradient.features[part.feature];
    return gradient.grad_out + bag_of(gradient, feature, lookup.id) * args.dim + part.column;
  };
  for (const Lookup* lookup = first; lookup < last; ++lookup) {
    if (ahead < end - lookup) prefetch(grad_row(lookup[ahead]), width);
    const Part& part = gradient.parts[lookup->part];
    if (plain && !part.is_signed) {
      rows[count] = grad_row(*lookup);
      coefficients[count++] = 1;
      if (count == most) add_listed();
      continue;
    }
    const Feature& feature = gradient.features[part.feature];
    const int64_t own = &part - feature.parts, bag = bag_of(gradient, feature, lookup->id);
    const uint32_t* numbers = feature.numbers + int64_t(lookup->id) * feature.num_parts;
    const A weight = id_weight(args, feature, lookup->id) * bag_scale(gradient, part.feature, bag);
    A coefficient = sign_of<A>(numbers[own]) * weight;
    int64_t begin = own, slot_last = own + 1;
    if (args.combine != Combine::sum) {
      while (begin > 0 && feature.parts[begin - 1].column == part.column) --begin;
      slot_last = slot_end(feature, begin);
      if (args.combine == Combine::mean) coefficient *= A(1) / A(slot_last - begin);
    }
    coefficient *= part_weight(args, feature, lookup->id, own);
    const T* grad = grad_row(*lookup);
    if (!product && !max) {
      rows[count] = grad;
      coefficients[count++] = coefficient;
      if (count == most) add_listed();
      continue;
    }
    for (int64_t i = 0; i < width; ++i) scratch[i] = coefficient * to_accumulator(grad[i]);
    for (int64_t p = begin; product && p < slot_last; ++p) {
      if (p == own) continue;
      const T* other = row_of(args.table, feature.parts[p], numbers[p]);
      const A sign = sign_of<A>(numbers[p]);
      for (int64_t i = 0; i < width; ++i) scratch[i] *= sign * to_accumulator(other[i]);
    }
    if (max) {
      const int32_t* winner = gradient.argmax + bag * args.dim + part.column;
      const int32_t position = int32_t(feature.first + int64_t(lookup->id) * feature.step);
      for (int64_t i = 0; i < width; ++i) scratch[i] = winner[i] == position ? scratch[i] : A(0);
    }
    for (int64_t i = 0; i < width; ++i) total[i] = from ? total[i] + scratch[i] : scratch[i];
    from = total;
  }
  if (count > 0) add_listed();
}

template <class T>
void add_in_order(const ComposeGradient<T>& gradient, const int64_t* parts, int64_t num_parts,
                  int64_t first, int64_t last, Accumulator<T>* total, uint8_t* used) {
  using A = Accumulator<T>;
  constexpr int most = 1024;  // lookups at once
  const ComposeArgs<T>& args = gradient.args;
  struct Owned {
    int64_t row;
    const T* grad;
    A coefficient;
  } owned[most + 1];
  int count = 0;
  const int64_t width = gradient.parts[parts[0]].width;
  const int ahead = prefetch_distance(2 * width * int64_t(sizeof(T)));
  const bool far = (last - first) * width * int64_t(sizeof(A)) > kCachedBytes;
  const auto add_owned = [&] {
    for (int l = 0; l < count; ++l) {
      if (far && l + ahead < count) {
        prefetch(total + owned[l + ahead].row * width, width);
        prefetch(owned[l + ahead].grad, width);
      }
      sum_rows<true, 1>(total + owned[l].row * width, &owned[l].grad, 1, owned[l].coefficient,
                        width);
      if (used) used[owned[l].row] = 1;
    }
    count = 0;
  };
  for (int64_t begin = 0, end; begin < num_parts; begin = end) {
    const int64_t number = gradient.parts[parts[begin]].feature;
    const Feature& feature = gradient.features[number];
    for (end = begin; end < num_parts && gradient.parts[parts[end]].feature == number;) ++end;
    A shares[kMaxParts];  // of a mean over the parts of a slot
    for (int64_t p = begin; p < end; ++p) {
      const int64_t own = gradient.parts + parts[p] - feature.parts;
      int64_t slot_first = own;
      const int64_t column = feature.parts[own].column;
      while (slot_first > 0 && feature.parts[slot_first - 1].column == column) --slot_first;
      shares[p - begin] =
          args.combine == Combine::mean ? A(1) / A(slot_end(feature, own) - slot_first) : A(1);
    }
    for (int64_t id = 0; id < feature.count; ++id) {
      const uint32_t* numbers = feature.numbers + id * feature.num_parts;
      if (numbers[0] == kNoRow) continue;
      const int64_t bag = bag_of(gradient, feature, id);
      const A weight = id_weight(args, feature, id) * bag_scale(gradient, number, bag);
      for (int64_t p = begin; p < end; ++p) {
        const Part& part = gradient.parts[parts[p]];
        const int64_t own = &part - feature.parts;
        const int64_t row = int64_t(numbers[own] & ~kSignBit) - first;
        const A coefficient = sign_of<A>(numbers[own]) * weight * shares[p - begin] *
                              part_weight(args, feature, id, own);
        owned[count] = {row, gradient.grad_out + bag * args.dim + part.column, coefficient};
        count += uint64_t(row) < uint64_t(last - first);  // no branch: it couldn't be foretold
        if (count == most) add_owned();
      }
    }
  }
  add_owned();
}

template <class T>
constexpr Compose<T> kernel{forward<T>,      grad_weights<T>, add_lookups<T>,
                            add_in_order<T>, store_row<T>,    update_row<T>};

}  // namespace

template <>
const ComposeKernels& table_of<ComposeKernels, Isa::EMBLAS_ISA>() {
  static constexpr ComposeKernels table{
      write_numbers, {kernel<float>, kernel<double>, kernel<bfloat16>, kernel<float16>}};
  return table;
}

}  // namespace emblas
