// Late interaction: score(Q, D) = sum over tokens i of Q of max over tokens j of D of <q_i, d_j>.
//
// Query tokens stand side by side in the lanes of vectors, packed once per call. Each value of a
// document token is multiplied with all of them, so a lane holds the product of one pair: the
// maximum over a document's tokens is one instruction per vector, nothing is added across lanes and
// no product is written. A pair's terms are added in the order of dimensions, whatever it is
// computed together with.
//
// Bits against real queries, with AVX-512: four dimensions of a code are the index into a table of
// the query token's 16 sums, which fills a register (vpermps). Here the lanes are document tokens,
// and an instruction and an addition stand for 64 multiplications. Elsewhere bits become +1 and -1.
//
// Bytes: documents once, packed queries from L1 or L2. Bound by multiplication: per value of kRows
// tokens and two vectors of query tokens, 2 loads, kRows broadcasts and 2 kRows multiply-adds.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace emblas {

// Tokens of a document, floating-point or uint8 codes, and the queries that `pack` has packed.
template <class T>
struct MaxSimDocument {
  const T* tokens;
  int64_t stride, count, dim;  // at least one token
  const Accumulator<T>* queries;
  int64_t query_tokens;
  Accumulator<T>* buffer;  // maxsim_buffer(dim)
  Accumulator<T>* best;    // [maxsim_padded(query_tokens)] largest product
  int32_t* where;          // [maxsim_padded(query_tokens)] its first token; or null
};

inline int64_t maxsim_padded(int64_t query_tokens) { return (query_tokens + 15) / 16 * 16; }
inline int64_t maxsim_buffer(int64_t dim) { return 12 * dim + 64; }

template <class T>
struct MaxSim {
  int64_t (*packed)(int64_t dim);  // values of a packed query token
  // queries [tokens, dim] to maxsim_padded(tokens) packed ones; 64-byte aligned.
  void (*pack)(const Accumulator<T>* queries, int64_t tokens, int64_t dim, Accumulator<T>* packed);
  void (*best)(const MaxSimDocument<T>&);
};
struct MaxSimKernels {
  ByDtype<MaxSim> floats;
  MaxSim<uint8_t> bits;

  const MaxSim<uint8_t>& of(uint8_t) const { return bits; }
  template <class T>
  const MaxSim<T>& of(T element) const {
    return floats.of(element);
  }
};

}  // namespace emblas
