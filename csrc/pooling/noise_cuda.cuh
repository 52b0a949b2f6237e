// Standard normal numbers on a GPU, one at a time: what philox_normal of common/philox.h gives four
// of, as a pure function of their place.
#pragma once

#include "common/philox_cuda.cuh"

namespace emblas::cuda {

// Cosine of the angle 2 pi / 2^32 w, to the last bits of a double. The function of that name keeps
// a table in local memory to bring large angles into [-pi / 4, pi / 4]; here integers do that.
__device__ inline double cosine_of_turn(uint32_t w) {
  const uint32_t quadrant = (w + (1u << 29)) >> 30;
  const double angle = int32_t(w - (quadrant << 30)) * 0x1.921fb54442d18p-30;
  const double square = angle * angle;
  double cosine = 1, sine = 1;  // Taylor series, the last terms first
#pragma unroll
  for (int n = 16; n >= 2; n -= 2) {
    cosine = 1 - square * (1.0 / (n * (n - 1))) * cosine;
    sine = 1 - square * (1.0 / (n * (n + 1))) * sine;
  }
  const double value = quadrant % 2 == 0 ? cosine : angle * sine;
  return quadrant == 1 || quadrant == 2 ? -value : value;
}

__device__ inline double normal_at(uint64_t seed, int64_t row, uint32_t stream, int64_t column) {
  const Words words =
      random_words({{uint32_t(column / 4), stream, uint32_t(row), uint32_t(row >> 32)}}, seed);
  // Box and Muller: the first of a pair is radius cos(angle), the second radius sin(angle), which
  // is the cosine of a quarter turn less.
  const bool second_pair = column % 4 >= 2;
  const uint32_t length = second_pair ? words.at[2] : words.at[0];
  const uint32_t turn = second_pair ? words.at[3] : words.at[1];
  const double radius = sqrt(-2 * log((length + 1.0) * 0x1p-32));
  return radius * cosine_of_turn(turn - (uint32_t(column % 2) << 30));
}

}  // namespace emblas::cuda
