// Bit codes: packing signs, unpacking them, and rotating vectors before they are packed.
//
// A code holds one bit per dimension, bit = value > threshold; bit 7 of byte 0 is dimension 0
// (numpy's packbits), tail bits are 0. Several planes are such codes one after the other: plane t
// stands for 2^-t where its bit is set and for -2^-t elsewhere. Searching codes is scan.h.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace emblas {

template <class T>
struct PackSign {
  // Rows [first, last) of x, `row_stride` elements apart, to codes of ceil(dim / 8) bytes. The
  // threshold is one value per dimension, or null for 0.
  void (*pack)(const T* x, int64_t row_stride, const Accumulator<T>* threshold, int64_t dim,
               int64_t first, int64_t last, uint8_t* codes);
};
using PackSignKernels = ByDtype<PackSign>;

inline constexpr int64_t kMaxPlanes = 24;  // so that a float holds their sums

// The sum of the planes of each dimension. Its bits, those of the first plane highest, are a number
// b below 2^planes, and the sum is (2 b - (2^planes - 1)) 2^(1 - planes).
template <class T>
struct UnpackPlanesArgs {
  const uint8_t* codes;  // [rows, planes * ceil(dim / 8)], rows `row_stride` bytes apart
  int64_t row_stride, rows, dim, planes;
  T* out;  // [rows, dim]
};
template <class T>
struct UnpackPlanes {
  void (*unpack)(const UnpackPlanesArgs<T>&, int64_t first, int64_t last);  // rows [first, last)
};
using UnpackPlanesKernels = ByDtype<UnpackPlanes>;

// A random rotation in dim * log2(dim) steps, x -> H D_r ... H D_1 x: round t flips the signs D_t
// and applies the normalized Hadamard matrix H to the largest power of two of dimensions that fits,
// the first ones in even rounds and the last ones in odd rounds. Orthogonal for any dimension.
template <class T>
struct HadamardRotateArgs {
  const T* x;
  int64_t row_stride, dim;
  const int8_t* signs;  // [rounds, dim], +1 or -1
  int64_t rounds;
  bool inverse;  // the transpose: the rounds backwards
  T* out;        // [rows, dim]
};
template <class T>
struct HadamardRotate {
  // `buffer` holds dim values and belongs to the calling thread.
  void (*rotate)(const HadamardRotateArgs<T>&, int64_t first, int64_t last, Accumulator<T>* buffer);
};
using HadamardRotateKernels = ByDtype<HadamardRotate>;

}  // namespace emblas
