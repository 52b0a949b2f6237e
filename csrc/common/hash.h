// Hash functions on 64-bit ids and on bytes, and the reduction of a hash to a row of a table.
//
// Those on ids are templates over the word: U is uint64_t, or a vector of uint64_t that hashes one
// id per lane with the same bits. All arithmetic is modulo 2^64; bytes are read little-endian.
// Everything is in an anonymous namespace for the reason that simd.h gives.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/types.h"

namespace emblas {
namespace {

template <class U>
struct Hash128 {
  U low, high;
};

template <class U>
EMBLAS_HOST_DEVICE inline U rotate_left(U x, int bits) {
  return x << bits | x >> (64 - bits);
}

// --- MurmurHash3_x64_128 (Austin Appleby, public domain) -----------------------------------------

inline constexpr uint64_t kMurmur3First = 0x87c37b91114253d5;
inline constexpr uint64_t kMurmur3Second = 0x4cf5ad432745937f;

template <class U>
EMBLAS_HOST_DEVICE inline U murmur3_mix(U k) {
  k ^= k >> 33;
  k *= 0xff51afd7ed558ccd;
  k ^= k >> 33;
  k *= 0xc4ceb9fe1a85ec53;
  return k ^ k >> 33;
}

template <class U>
EMBLAS_HOST_DEVICE inline Hash128<U> murmur3_finish(U h1, U h2) {
  h1 += h2;
  h2 += h1;
  h1 = murmur3_mix(h1);
  h2 = murmur3_mix(h2);
  h1 += h2;
  h2 += h1;
  return {h1, h2};
}

// Of the eight bytes of one id. Seed 8 is degenerate: it cancels the length, which makes h2 start
// from zero, and then both halves of the result are multiples of one 64-bit value.
template <class U>
EMBLAS_HOST_DEVICE inline Hash128<U> murmur3(U id, uint32_t seed) {
  const uint64_t start = seed ^ 8u;
  const U h1 = rotate_left(id * kMurmur3First, 31) * kMurmur3Second ^ start;
  return murmur3_finish<U>(h1, U{} + start);
}

inline Hash128<uint64_t> murmur3(const void* data, int64_t size, uint32_t seed) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  uint64_t h1 = seed, h2 = seed;
  for (; size - (bytes - static_cast<const unsigned char*>(data)) >= 16; bytes += 16) {
    uint64_t k1, k2;
    std::memcpy(&k1, bytes, 8);
    std::memcpy(&k2, bytes + 8, 8);
    h1 ^= rotate_left(k1 * kMurmur3First, 31) * kMurmur3Second;
    h1 = (rotate_left(h1, 27) + h2) * 5 + 0x52dce729;
    h2 ^= rotate_left(k2 * kMurmur3Second, 33) * kMurmur3First;
    h2 = (rotate_left(h2, 31) + h1) * 5 + 0x38495ab5;
  }
  uint64_t tail[2] = {};  // of zeros: they leave h1 and h2 as they are
  if (size % 16) std::memcpy(tail, bytes, size % 16);
  h1 ^= rotate_left(tail[0] * kMurmur3First, 31) * kMurmur3Second;
  h2 ^= rotate_left(tail[1] * kMurmur3Second, 33) * kMurmur3First;
  return murmur3_finish(h1 ^ uint64_t(size), h2 ^ uint64_t(size));
}

// --- MurmurHash64A (Austin Appleby, public domain): ids of strings and of n-grams in spaCy -------

inline uint64_t murmur64a(const void* data, int64_t size, uint64_t seed) {
  constexpr uint64_t multiplier = 0xc6a4a7935bd1e995;
  const auto* bytes = static_cast<const unsigned char*>(data);
  uint64_t h = seed ^ uint64_t(size) * multiplier;
  for (int64_t i = 0; i < size / 8; ++i, bytes += 8) {
    uint64_t k;
    std::memcpy(&k, bytes, 8);
    k *= multiplier;
    h = (h ^ (k ^ k >> 47) * multiplier) * multiplier;
  }
  if (size % 8) {
    uint64_t tail = 0;
    std::memcpy(&tail, bytes, size % 8);
    h = (h ^ tail) * multiplier;
  }
  h = (h ^ h >> 47) * multiplier;
  return h ^ h >> 47;
}

// --- splitmix64 (Steele, Lea, Flood 2014): the generator's state after a step gives its output ---

inline constexpr uint64_t kSplitmixStep = 0x9e3779b97f4a7c15;

template <class U>
EMBLAS_HOST_DEVICE inline U splitmix64_mix(U x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

// --- reduction -----------------------------------------------------------------------------------

// key % divisor for keys below 2^32 and divisors 1 to 2^32, exact, without a division: the
// fraction key / divisor in 64 bits, multiplied by the divisor (Lemire, Kaser, Kurz 2019).
class Modulo {
 public:
  explicit Modulo(uint64_t divisor) : Modulo(divisor, reciprocal(divisor)) {}
  // Where dividing is slow: with the reciprocal of the divisor.
  EMBLAS_HOST_DEVICE Modulo(uint64_t divisor, uint64_t reciprocal)
      : divisor_(divisor), reciprocal_(reciprocal) {}
  static uint64_t reciprocal(uint64_t divisor) { return UINT64_MAX / divisor + 1; }  // rounded up

  template <class U>
  EMBLAS_HOST_DEVICE U operator()(U key) const {
    const U fraction = key * reciprocal_;
    // The high 64 bits of fraction * divisor, whose low half carries at most 32 bits upward.
    return ((fraction >> 32) * divisor_ + ((fraction & 0xffffffff) * divisor_ >> 32)) >> 32;
  }

 private:
  uint64_t divisor_, reciprocal_;
};

}  // namespace
}  // namespace emblas
