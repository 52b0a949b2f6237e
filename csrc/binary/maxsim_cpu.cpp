// The products of maxsim.h.
#include "binary/maxsim.h"
#include "common/isa.h"
#include "common/simd.h"

namespace emblas {
namespace {

#if defined(EMBLAS_HAS_AVX512) || defined(EMBLAS_HAS_NEON)
constexpr int kRows = 12;  // of two vectors each: what 32 registers hold
#else
constexpr int kRows = 6;  // what 16 hold
#endif
constexpr int kFewRows = kRows / 3;

// [vector of query tokens][dim][lane], zeros beyond the last token.
template <class A>
void pack(const A* queries, int64_t tokens, int64_t dim, A* packed) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t first = 0; first < tokens; first += lanes, packed += dim * lanes) {
    for (int64_t i = 0; i < dim; ++i) {
      for (int64_t j = 0; j < lanes; ++j) {
        packed[i * lanes + j] = first + j < tokens ? queries[(first + j) * dim + i] : A(0);
      }
    }
  }
}

// Tokens [first, first + rows) of a document with one or two vectors of query tokens. What will be
// read next is fetched on the way: rows values per step.
template <int vectors, int rows, class A>
inline void products(const A* const* row, const A* next, int64_t first, int64_t dim,
                     const A* queries, A* best, int32_t* where) {
  using V = Vector<A>;
  constexpr int lanes = kLanes<A>;
  V total[rows][vectors] = {};
  for (int64_t i = 0; i < dim; ++i) {
    __builtin_prefetch(next + i * rows);
    V wanted[vectors];
    for (int v = 0; v < vectors; ++v) wanted[v] = load(queries + (v * dim + i) * lanes);
    for (int r = 0; r < rows; ++r) {
      const V value = broadcast<V>(row[r][i]);
      for (int v = 0; v < vectors; ++v) total[r][v] += wanted[v] * value;
    }
  }
  if (where) {
    for (int r = 0; r < rows; ++r) {
      A product[vectors * lanes];
      for (int v = 0; v < vectors; ++v) store(product + v * lanes, total[r][v]);
      for (int j = 0; j < vectors * lanes; ++j) {
        if (first + r > 0 && !(product[j] > best[j])) continue;
        best[j] = product[j];
        where[j] = int32_t(first + r);
      }
    }
    return;
  }
  for (int v = 0; v < vectors; ++v) {
    V largest = first > 0 ? load(best + v * lanes) : total[0][v];
    for (int r = 0; r < rows; ++r) largest = total[r][v] > largest ? total[r][v] : largest;
    store(best + v * lanes, largest);
  }
}

template <int rows, class A>
inline void all_products(const A* const* row, const A* next, int64_t first, int64_t dim,
                         const A* queries, int64_t query_tokens, A* best, int32_t* where) {
  constexpr int64_t lanes = kLanes<A>;
  int64_t t = 0;
  for (; t + lanes < query_tokens; t += 2 * lanes) {
    products<2, rows>(row, next, first, dim, queries + t * dim, best + t,
                      where ? where + t : nullptr);
  }
  if (t < query_tokens) {
    products<1, rows>(row, next, first, dim, queries + t * dim, best + t,
                      where ? where + t : nullptr);
  }
}

// The values of a token as the products take them: in place, or widened to `out`.
inline const float* values_of(const float* token, int64_t, float*) { return token; }
inline const double* values_of(const double* token, int64_t, double*) { return token; }
template <class T>
inline const float* values_of(const T* token, int64_t dim, float* out) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t i = 0;
  for (; i + lanes <= dim; i += lanes) store(out + i, load(token + i));
  for (; i < dim; ++i) out[i] = to_accumulator(token[i]);
  return out;
}
#if !defined(EMBLAS_HAS_AVX512)
struct Signs {
  float of[16][4] = {};
  constexpr Signs() {
    for (int n = 0; n < 16; ++n) {
      for (int i = 0; i < 4; ++i) of[n][i] = n >> (3 - i) & 1 ? 1.0f : -1.0f;
    }
  }
};
constexpr Signs kSigns;

inline const float* values_of(const uint8_t* code, int64_t dim, float* out) {
  for (int64_t i = 0; i < dim; i += 4) {
    const int nibble = i % 8 == 0 ? code[i / 8] >> 4 : code[i / 8] & 15;
    std::memcpy(out + i, kSigns.of[nibble], sizeof(float) * size_t(dim - i < 4 ? dim - i : 4));
  }
  return out;
}
#endif

template <class T>
void best(const MaxSimDocument<T>& document) {
  using A = Accumulator<T>;
  const int64_t dim = document.dim;
  for (int64_t first = 0; first < document.count;) {
    const int64_t left = document.count - first;
    const int rows = left > kFewRows ? kRows : kFewRows;
    const A* row[kRows];
    for (int r = 0; r < rows; ++r) {
      // The last token stands in for those after it: it can't be better than itself.
      row[r] = r < left ? values_of(document.tokens + (first + r) * document.stride, dim,
                                    document.buffer + r * dim)
                        : row[r - 1];
    }
    const auto run = rows == kRows ? all_products<kRows, A> : all_products<kFewRows, A>;
    run(row, row[rows - 1] + document.stride, first, dim, document.queries, document.query_tokens,
        document.best, document.where);
    first += rows;
  }
}

int64_t packed_values(int64_t dim) { return dim; }

#if defined(EMBLAS_HAS_AVX512)

constexpr int kTokens = 8, kVectors = 3;  // query tokens and vectors of 16 codes at a time
constexpr int kCodes = 16 * kVectors;

// table[index], of which only the low 4 bits count.
inline vfloat look_up(vfloat table, vuint32 index) {
  return (vfloat)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
}

// A code read as little-endian words: nibble n holds the bits 4 n to 4 n + 3, and bit 8 p + i of it
// is dimension 8 p + 7 - i.
int64_t packed_tables(int64_t dim) { return (dim + 7) / 8 * 2 * 16; }

// [kTokens query tokens][nibble][token][16]: the sum of the four dimensions for each nibble.
void pack_tables(const float* queries, int64_t tokens, int64_t dim, float* packed) {
  const int64_t nibbles = (dim + 7) / 8 * 2;
  for (int64_t t = 0; t < maxsim_padded(tokens); ++t) {
    for (int64_t n = 0; n < nibbles; ++n) {
      float value[4];
      for (int64_t i = 0; i < 4; ++i) {
        const int64_t bit = 4 * n + i, at = bit / 8 * 8 + 7 - bit % 8;
        value[i] = t < tokens && at < dim ? queries[t * dim + at] : 0.0f;
      }
      float* table = packed + ((t / kTokens * nibbles + n) * kTokens + t % kTokens) * 16;
      for (int entry = 0; entry < 16; ++entry) {
        float total = 0;
        for (int i = 0; i < 4; ++i) total += entry >> i & 1 ? value[i] : -value[i];
        table[entry] = total;
      }
    }
  }
}

void best_of_codes(const MaxSimDocument<uint8_t>& document) {
  const int64_t bytes = (document.dim + 7) / 8, words = (bytes + 3) / 4;
  for (int64_t first = 0; first < document.count; first += kCodes) {
    for (int64_t c = 0; c < kCodes; ++c) {
      const int64_t at = first + c < document.count ? first + c : document.count - 1;
      const uint8_t* code = document.tokens + at * document.stride;
      for (int64_t w = 0; w < bytes / 4; ++w) {
        std::memcpy(document.buffer + w * kCodes + c, code + 4 * w, 4);
      }
      if (bytes % 4) {
        uint32_t word = 0;
        std::memcpy(&word, code + bytes / 4 * 4, size_t(bytes % 4));
        std::memcpy(document.buffer + bytes / 4 * kCodes + c, &word, 4);
      }
    }
    const float* table = document.queries;
    for (int64_t t0 = 0; t0 < document.query_tokens; t0 += kTokens) {
      vfloat total[kTokens][kVectors] = {};
      for (int64_t w = 0; w < words; ++w) {
        vuint32 index[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          index[v] = (vuint32)load(document.buffer + w * kCodes + 16 * v);
        }
        const int64_t nibbles = 2 * (bytes - 4 * w) < 8 ? 2 * (bytes - 4 * w) : 8;
        for (int64_t n = 0; n < nibbles; ++n, table += 16 * kTokens) {
          for (int t = 0; t < kTokens; ++t) {
            const vfloat entries = load(table + 16 * t);
            for (int v = 0; v < kVectors; ++v) total[t][v] += look_up(entries, index[v]);
          }
          for (int v = 0; v < kVectors; ++v) index[v] >>= 4;
        }
      }
      for (int t = 0; t < kTokens; ++t) {
        float& best = document.best[t0 + t];
        if (!document.where) {
          vfloat largest = total[t][0];
          for (int v = 1; v < kVectors; ++v) {
            largest = total[t][v] > largest ? total[t][v] : largest;
          }
          const float product = _mm512_reduce_max_ps((__m512)largest);
          if (first == 0 || product > best) best = product;
          continue;
        }
        float product[kCodes];
        for (int v = 0; v < kVectors; ++v) store(product + 16 * v, total[t][v]);
        for (int64_t c = 0; c < kCodes; ++c) {
          if (first + c > 0 && !(product[c] > best)) continue;
          best = product[c];
          document.where[t0 + t] = int32_t(first + c);
        }
      }
    }
  }
}
constexpr MaxSim<uint8_t> kBits{packed_tables, pack_tables, best_of_codes};

#else
constexpr MaxSim<uint8_t> kBits{packed_values, pack<float>, best<uint8_t>};
#endif

}  // namespace

template <>
const MaxSimKernels& table_of<MaxSimKernels, Isa::EMBLAS_ISA>() {
  static constexpr MaxSimKernels table{{{packed_values, pack<float>, best<float>},
                                        {packed_values, pack<double>, best<double>},
                                        {packed_values, pack<float>, best<bfloat16>},
                                        {packed_values, pack<float>, best<float16>}},
                                       kBits};
  return table;
}

}  // namespace emblas
