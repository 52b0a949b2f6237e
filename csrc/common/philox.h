// Philox4x32-10: random words as a pure function of a 128-bit counter and a 64-bit key (Salmon,
// Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC 2011). No state: any element
// of a random tensor can be made anywhere, in any order, with the same bits.
//
// In an anonymous namespace for the reason that simd.h gives.
#pragma once

#include <cmath>
#include <cstdint>

namespace emblas {
namespace {

struct Philox4 {
  uint32_t word[4];
};

struct PhiloxKey {
  uint32_t low, high;

  explicit PhiloxKey(uint64_t key) : low(uint32_t(key)), high(uint32_t(key >> 32)) {}
  void advance() {
    low += 0x9e3779b9;
    high += 0xbb67ae85;
  }
};

inline constexpr int kPhiloxRounds = 10;

inline Philox4 philox_round(Philox4 counter, PhiloxKey key) {
  const uint64_t first = uint64_t(counter.word[0]) * 0xd2511f53;
  const uint64_t second = uint64_t(counter.word[2]) * 0xcd9e8d57;
  return {{uint32_t(second >> 32) ^ counter.word[1] ^ key.low, uint32_t(second),
           uint32_t(first >> 32) ^ counter.word[3] ^ key.high, uint32_t(first)}};
}

inline Philox4 philox4x32(Philox4 counter, uint64_t seed) {
  PhiloxKey key(seed);
  for (int round = 0; round < kPhiloxRounds; ++round, key.advance()) {
    counter = philox_round(counter, key);
  }
  return counter;
}

// Four independent standard normal numbers (Box and Muller 1958).
inline void philox_normal(Philox4 counter, uint64_t key, double out[4]) {
  const Philox4 bits = philox4x32(counter, key);
  for (int pair = 0; pair < 2; ++pair) {
    const double radius = std::sqrt(-2 * std::log((bits.word[2 * pair] + 1.0) * 0x1p-32));
    const double angle = bits.word[2 * pair + 1] * 0x1.921fb54442d18p-30;  // 2 pi 2^-32
    out[2 * pair] = radius * std::cos(angle);
    out[2 * pair + 1] = radius * std::sin(angle);
  }
}

}  // namespace
}  // namespace emblas
