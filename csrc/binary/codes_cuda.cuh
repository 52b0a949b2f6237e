// Codes from global to shared memory, by 16-byte loads that are contiguous over a warp where rows
// are aligned, a tile of 256 at a time.
#pragma once

#include "binary/nearest_cuda.cuh"

namespace emblas::cuda {

// What address, stride and width of codes are multiples of: 16, 4 or 1.
inline int unit_of(const CodeRows& rows, int64_t bytes) {
  const uint64_t all =
      reinterpret_cast<uintptr_t>(rows.data) | uint64_t(rows.stride) | uint64_t(bytes);
  return all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : 1;
}

__device__ inline int bits_set(const uint4& a) {
  return __popc(a.x) + __popc(a.y) + __popc(a.z) + __popc(a.w);
}
__device__ inline int differing_bits(const uint4& a, const uint4& b) {
  return bits_set({a.x ^ b.x, a.y ^ b.y, a.z ^ b.z, a.w ^ b.w});
}

// `valid` bytes of a code, filled up with zeros to 16. `unit`: see unit_of.
template <int unit>
__device__ inline uint4 load_piece(const uint8_t* from, int valid) {
  if constexpr (unit == 16) {
    return valid > 0 ? simt::load_16_bytes(from) : uint4{};
  } else {
    uint32_t words[4] = {};
    if constexpr (unit == 4) {
      for (int i = 0; i < 4; ++i) {
        if (4 * i < valid) words[i] = reinterpret_cast<const uint32_t*>(from)[i];
      }
    } else {
      for (int i = 0; i < 16; ++i) {
        if (i < valid) words[i / 4] |= uint32_t(from[i]) << i % 4 * 8;
      }
    }
    return {words[0], words[1], words[2], words[3]};
  }
}

// Copies `pieces` times 16 bytes of each code of a tile to shared memory. Rows there are an odd
// number of pieces apart, so that 16-byte reads of neighbouring rows fall into different banks.
template <int unit, int width>
__device__ inline void load_codes(const CodeRows& codes, const Places& places, int64_t first_place,
                                  int bytes, int offset, int pieces,
                                  uint4 (&tile)[kTileRows][width]) {
  static_assert(kTileRows == kSearchThreads);
  uint4 piece[width - 1];  // all on their way at once
  for (int j = 0; j < width - 1; ++j) {
    if (j >= pieces) continue;
    const int at = threadIdx.x + j * kSearchThreads, byte = offset + at % pieces * 16;
    const int64_t row = places.row(first_place + at / pieces);
    piece[j] = load_piece<unit>(codes.data + row * codes.stride + byte, bytes - byte);
  }
  for (int j = 0; j < width - 1; ++j) {
    if (j >= pieces) continue;
    const int at = threadIdx.x + j * kSearchThreads;
    simt::store_16_bytes(&tile[at / pieces][at % pieces], piece[j]);
  }
}

}  // namespace emblas::cuda
