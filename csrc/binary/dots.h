// Inner products of real-valued vectors, the base of exact float and int8 search and of rescoring.
//
// A few rows and a few queries are multiplied at a time, each pair with a vector of its own, so
// that every load serves several pairs; a pair's terms are added in an order that depends on the
// dimension only, whatever it is computed together with. Scores are selected from a small buffer
// and never all written. Bound by memory for a few queries, by multiplication for many.
//
// int8 rows would cost more than float32 ones, a conversion for each multiplication. Queries
// rounded to 16 bits leave whole-number products, twice as many to an instruction, of which two
// are added at once: they tell which rows may be among the best, and only those are multiplied
// with the query itself.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace emblas {

template <class T, class Query = Accumulator<T>, class Dot = Accumulator<T>>
struct DotsArgs {
  const T* data;
  int64_t stride;
  const int64_t* rows;  // [count] rows of data; null: 0, 1, ...
  int64_t count, dim;
  const Query* queries;
  int64_t query_stride, query_count;
  Dot* dots;  // [query_count, count]
};
using RoundedDotsArgs = DotsArgs<int8_t, int16_t, int32_t>;
template <class T>
struct Dots {
  void (*dots)(const DotsArgs<T>&);
  // squares[i] = squared length of row i
  void (*squares)(const DotsArgs<T>&, Accumulator<T>* squares);
};
struct DotsKernels {
  ByDtype<Dots> floats;
  Dots<int8_t> int8;
  void (*rounded_dots)(const RoundedDotsArgs&);  // of queries whose sums can't exceed 32 bits

  const Dots<int8_t>& of(int8_t) const { return int8; }
  template <class T>
  const Dots<T>& of(T element) const {
    return floats.of(element);
  }
};

}  // namespace emblas
