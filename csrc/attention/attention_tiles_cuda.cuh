// What packed attention's kernels for tensor cores share, forward and backward: who owns which
// tile, tiles in shared memory, products of tiles, and who sees whom.
//
// Rows of a tile in shared memory are cut into pieces of 16 bytes, which are permuted so that the 8
// rows that ldmatrix reads at a time lie in different banks. A warp owns 16 rows of each product;
// its lanes hold rows lane / 4 and lane / 4 + 8, columns 2 (lane % 4) and the next of every 8.
// That layout of a result is also the layout of a factor of the next product.
#pragma once

#include "attention/varlen_attention_cuda.h"
#include "common/cuda/simt.h"

namespace emblas::cuda {

inline constexpr float kLog2E = 1.4426950408889634f;  // exponentials are of base 2 in hardware

// Rows of a tile that blocks walk through: 4 to 8 KiB of vectors of `dim` values.
template <int dim>
inline constexpr int kStepRows = dim <= 64 ? 64 : 4096 / dim;

// Whether every vector starts at a multiple of 16 bytes.
template <class T>
bool starts_whole(const HeadVectors<T>& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.token_stride % simt::kVector<T> == 0 &&
         x.head_stride % simt::kVector<T> == 0;
}

// Tokens [begin, begin + count) of a sequence, inside the batch whatever the offsets hold.
struct SequenceTokens {
  int64_t begin;
  int count;
};
__device__ inline SequenceTokens tokens_of(const int32_t* cu_seqlens, int64_t b, int64_t tokens) {
  const int64_t begin = min(max(int64_t(cu_seqlens[b]), int64_t(0)), tokens);
  const int64_t end = min(max(int64_t(cu_seqlens[b + 1]), begin), tokens);
  return {begin, int(end - begin)};
}

__device__ inline int64_t slot_of_sequence(const int32_t* cu_seqlens, int64_t b, int64_t tokens) {
  return tokens_of(cu_seqlens, b, tokens).begin / kTileRows + b;
}
// The last sequence that starts at or before a slot.
__device__ inline int64_t sequence_of_slot(const int32_t* cu_seqlens, int64_t batch, int64_t tokens,
                                           int64_t slot) {
  int64_t low = 0, high = batch - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (slot_of_sequence(cu_seqlens, middle, tokens) <= slot) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// What a block owns: tokens [first, first + count) of a sequence. None where count is 0.
struct OwnTile {
  int64_t sequence;
  SequenceTokens tokens;
  int first, count;

  __device__ int64_t begin() const { return tokens.begin + first; }
};
__device__ inline OwnTile tile_of_slot(const int32_t* cu_seqlens, int64_t batch, int64_t tokens,
                                       int64_t slot) {
  const int64_t b = sequence_of_slot(cu_seqlens, batch, tokens, slot);
  const SequenceTokens own = tokens_of(cu_seqlens, b, tokens);
  const int64_t first = (slot - slot_of_sequence(cu_seqlens, b, tokens)) * kTileRows;
  if (first < 0 || first >= own.count) return {b, own, 0, 0};
  return {b, own, int(first), min(own.count - int(first), kTileRows)};
}

// Which of the keys of a sequence a query sees, by the query's position among them.
struct Window {
  int left, right, keys;

  __device__ int first_seen(int position) const { return max(position - left, 0); }
  __device__ int last_seen(int position) const { return min(position + right, keys - 1); }
};

// What becomes of a product q . k on the way to a score, in powers of 2.
struct Shape {
  float cap;     // 0: none
  float factor;  // of products: what tanh takes where there is a cap, else the score
  float slope;   // of ALiBi
};
template <class T>
__device__ inline Shape shape_of(const VarlenAttentionArgs<T>& args, int64_t b, int64_t head) {
  const ScoreArgs<float>& options = args.scores;
  const float* const slopes = options.alibi_slopes;
  return {options.softcap * kLog2E,
          options.softcap != 0 ? args.scale / options.softcap : args.scale * kLog2E,
          slopes ? slopes[b * options.alibi_stride + head] * kLog2E : 0};
}

// Where a piece of a row of `dim` values is, in pieces. Eight rows of one piece differ in their
// place in a line of 128 bytes, which all 32 banks make.
template <int dim>
__device__ inline int place_of_piece(int row, int piece) {
  constexpr int pieces = dim / 8, rows_of_line = dim < 64 ? 64 / dim : 1;
  constexpr int places = dim < 64 ? pieces : 8;
  return row * pieces + (piece ^ (row / rows_of_line % places));
}

// Rows of a tile to shared memory, behind the computation if they are aligned; zeros beyond `count`
// rows and `width` values.
template <class T, int dim, int rows, int threads>
__device__ inline void load_rows(const T* from, int64_t stride, int count, int width, bool aligned,
                                 uint4* to) {
  constexpr int pieces = dim / 8;
  const int piece = threadIdx.x % pieces, first_row = threadIdx.x / pieces;
  constexpr int step = threads / pieces;
  const int of_row = min(max(width - 8 * piece, 0), 8);  // values
  from += 8 * piece;
  if (aligned) {
#pragma unroll(dim < 256 ? 8 : 2)  // registers
    for (int row = first_row; row < rows; row += step) {
      simt::cp_async_16(to + place_of_piece<dim>(row, piece), from + row * stride,
                        row < count ? of_row * int(sizeof(T)) : 0);
    }
    return;
  }
#pragma unroll 1  // registers
  for (int row = first_row; row < rows; row += step) {
    T* const target = reinterpret_cast<T*>(to + place_of_piece<dim>(row, piece));
    for (int i = 0; i < 8; ++i) {
      target[i] = row < count && i < of_row ? from[row * stride + i] : T{};
    }
  }
}

// The way back.
template <class T, int dim, int threads>
__device__ inline void store_rows(const uint4* from, T* to, int64_t stride, int count, int width) {
  constexpr int pieces = dim / 8;
  const int piece = threadIdx.x % pieces, first = 8 * piece;
  for (int row = threadIdx.x / pieces; row < count; row += threads / pieces) {
    const uint4* const source = from + place_of_piece<dim>(row, piece);
    const simt::Vector<T> values = simt::load_vector(reinterpret_cast<const T*>(source));
    T* const target = to + row * stride + first;
    if (width % 8 == 0) {
      if (first < width) simt::store_vector(target, values);
    } else {
      for (int i = 0; i < 8; ++i) {
        if (first + i < width) target[i] = values.at[i];
      }
    }
  }
}

// Two values in a register, as mma takes them.
template <class T>
__device__ inline uint32_t pair_of(float first, float second) {
  T values[2];
  simt::from_accumulator(first, &values[0]);
  simt::from_accumulator(second, &values[1]);
  uint32_t pair;
  memcpy(&pair, values, sizeof(pair));
  return pair;
}

// Multiplies with two tiles of 8 columns, as ldmatrix_x4 brings them.
template <class T>
__device__ inline void multiply(const uint32_t (&a)[4], const uint32_t (&b)[4], float (&left)[4],
                                float (&right)[4]) {
  const uint32_t b_left[2] = {b[0], b[1]}, b_right[2] = {b[2], b[3]};
  simt::mma_m16n8k16(T{}, left, a, b_left);
  simt::mma_m16n8k16(T{}, right, a, b_right);
}

// The rows of a warp from `first_row` on, to be left factors.
template <int dim>
__device__ inline void take_rows(const uint4* tile, int first_row, uint32_t (&rows)[dim / 16][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < dim / 16; ++step) {
    const int place = place_of_piece<dim>(first_row + lane % 16, 2 * step + lane / 16);
    simt::ldmatrix_x4(rows[step], tile + place);
  }
}

// products += dot products of the warp's rows and those of a tile.
template <class T, int dim, int tiles>
__device__ inline void multiply_rows(const uint32_t (&rows)[dim / 16][4], const uint4* tile,
                                     float (&products)[tiles][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < dim / 16; ++step) {
#pragma unroll
    for (int n = 0; n < tiles; n += 2) {
      uint32_t factor[4];
      const int row = 8 * n + lane % 8 + lane / 16 * 8, piece = 2 * step + lane / 8 % 2;
      simt::ldmatrix_x4(factor, tile + place_of_piece<dim>(row, piece));
      multiply<T>(rows[step], factor, products[n], products[n + 1]);
    }
  }
}

// totals += sums of the rows of a tile, so weighted; of all columns, or some from a piece on.
template <class T, int dim, int tiles, int columns>
__device__ inline void add_rows(const float (&weights)[tiles][4], const uint4* tile,
                                int first_piece, float (&totals)[columns][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < tiles; j += 2) {
    const float (&low)[4] = weights[j], (&high)[4] = weights[j + 1];
    const uint32_t rounded[4] = {pair_of<T>(low[0], low[1]), pair_of<T>(low[2], low[3]),
                                 pair_of<T>(high[0], high[1]), pair_of<T>(high[2], high[3])};
#pragma unroll
    for (int n = 0; n < columns; n += 2) {
      uint32_t factor[4];
      const int piece = first_piece + n + lane / 16;
      simt::ldmatrix_x4_transposed(factor, tile + place_of_piece<dim>(8 * j + lane % 16, piece));
      multiply<T>(rounded, factor, totals[n], totals[n + 1]);
    }
  }
}

// The warp's rows, times a factor for each, to a tile.
template <class T, int dim, int columns>
__device__ inline void put_rows(const float (&totals)[columns][4], const float (&factor)[2],
                                int first_row, int first_piece, uint4* tile) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row + lane / 4 + 8 * r;
#pragma unroll
    for (int n = 0; n < columns; ++n) {
      uint4* const place = tile + place_of_piece<dim>(row, first_piece + n);
      uint32_t* const words = reinterpret_cast<uint32_t*>(place);
      words[lane % 4] = pair_of<T>(totals[n][2 * r] * factor[r], totals[n][2 * r + 1] * factor[r]);
    }
  }
}

}  // namespace emblas::cuda
