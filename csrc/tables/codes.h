// Random numbers that are functions of an id: embeddings that need no memory.
//
//   w_{4b+j}  word j of Philox4x32-10 with counter (b, low and high half of id, sequence), key seed
//   uniform   (w + 1/2) 2^-31 - 1
//   sparse    -sqrt(s) if w < p, sqrt(s) if p <= w < 2 p, else 0;  p = 2^31 / s, rounded
//   normal    of words u, v in pairs: r cos a and r sin a, r = sqrt(-2 ln((u + 1) 2^-32)),
//             a = 2 pi v 2^-32
//
// All in double, and rounded to the result once. IEEE 754 rounds sums, products, quotients and
// square roots exactly, and logarithm and sine are series of these, cut where a double ends: with
// no fused multiply-add (the build switches it off for this kernel) every machine gives the same
// bits. No gradient: an id is no number.
//
// Bytes: ids are read and numbers written; but four numbers take twenty multiplications of words,
// and a normal one about sixty operations on doubles. These are the bound.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace emblas {

enum class CodeKind : int64_t { normal, uniform, sparse };
inline constexpr int64_t kCodeKinds = 3;

struct CodeArgs {
  CodeKind kind;
  uint64_t seed;
  int64_t sparsity;  // 1 to 2^31
  int64_t dim;
  const int64_t* ids;
  const int64_t* sequences;  // 0 to 2^32 - 1, `sequence_step` apart
  int64_t sequence_step;
};

template <class T>
struct Codes {
  // out [ids, dim] for the ids [first, last).
  void (*fill)(const CodeArgs&, int64_t first, int64_t last, T* out);
};

struct CodesKernels {
  ByDtype<Codes> codes;
};

}  // namespace emblas
