// Philox4x32-10 on a GPU, see philox.h.
#pragma once

#include "common/cuda/simt.h"

namespace emblas::cuda {

struct Words {
  uint32_t at[4];
};

__device__ inline Words random_words(Words counter, uint64_t seed) {
  uint32_t low = uint32_t(seed), high = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t(counter.at[0]) * 0xd2511f53;
    const uint64_t second = uint64_t(counter.at[2]) * 0xcd9e8d57;
    counter = {{uint32_t(second >> 32) ^ counter.at[1] ^ low, uint32_t(second),
                uint32_t(first >> 32) ^ counter.at[3] ^ high, uint32_t(first)}};
    low += 0x9e3779b9;
    high += 0xbb67ae85;
  }
  return counter;
}

}  // namespace emblas::cuda
