// Numbers of the rows that ids have in composed tables, for their CPU kernels.
#pragma once

#include "tables/compose.h"
#include "tables/lookup.h"

namespace emblas {
namespace {

constexpr int kMostNumbers = 2048;  // kept at once

// The rows of consecutive ids of a feature, with their sign bits. Ids are taken a block at a time
// and the numbers of two blocks are kept, so that those of later ids are known at every id.
class Numbers {
 public:
  // Of the ids [first, last).
  Numbers(const Feature& feature, const int64_t* padding_id, int64_t first, int64_t last)
      : feature_(feature), padding_id_(padding_id), first_(first), last_(last), filled_(first) {
    while (size_ * feature.num_parts > kMostNumbers) size_ /= 2;
  }

  int most_ahead() const { return size_ / 2; }

  // Makes the rows of an id known; those of ids more than most_ahead() before are lost.
  void reach(int64_t id) {
    while (filled_ <= id && filled_ < last_) fill();
  }
  uint32_t of(int64_t id, int64_t part) const { return *block(id, part); }
  // The numbers of a part for most_ahead() ids from a multiple of so many on.
  const uint32_t* block(int64_t id, int64_t part) const {
    return numbers_ + part * size_ + ((id - first_) & (size_ - 1));
  }

 private:
  static constexpr int lanes = EMBLAS_VECTOR_BYTES / 8;

  void fill() {
    const int half = size_ / 2, count = last_ - filled_ < half ? int(last_ - filled_) : half;
    const int at = int((filled_ - first_) & (size_ - 1));
    for (int i = 0; i < count; ++i) ids_[i] = feature_.ids[(filled_ + i) * feature_.step];
    const Part* hashed = nullptr;  // the part that words_ belong to
    for (int64_t p = 0; p < feature_.num_parts; ++p) {
      const Part& part = feature_.parts[p];
      uint32_t* to = numbers_ + p * size_ + at;
      if (KeyKind(part.kind) == KeyKind::radix) {
        const uint64_t a = uint64_t(part.a), rows = uint64_t(part.rows);
        if (a == 1 && part.limit > 0 && part.limit <= part.rows) {  // the id itself
          for (int i = 0; i < count; ++i) to[i] = uint32_t(ids_[i]);
          continue;
        }
        for (int i = 0; i < count; ++i) {
          const uint64_t id = uint64_t(ids_[i]), key = a == 1 ? id : id / a;
          to[i] = uint32_t(key < rows ? key : key % rows);  // divisions are slow, and seldom needed
        }
      } else if (KeyKind(part.kind) == KeyKind::linear) {
        for (int i = 0; i < count; ++i) {
          const auto key =
              (unsigned __int128)(uint64_t(part.a)) * uint64_t(ids_[i]) + uint64_t(part.b);
          to[i] = uint32_t(uint64_t(key % uint64_t(part.p)) % uint64_t(part.rows));
        }
      } else {
        if (!hashed || hashed->kind != part.kind || hashed->a != part.a ||
            hashed->b / 4 != part.b / 4) {
          hash(part, count);
          hashed = &part;
        }
        reduce(part, count, to);
      }
    }
    for (int i = 0; padding_id_ && i < count; ++i) {
      if (ids_[i] != *padding_id_) continue;
      for (int64_t p = 0; p < feature_.num_parts; ++p) numbers_[p * size_ + at + i] = kNoRow;
    }
    filled_ += count;
  }

  void hash(const Part& part, int count) {
    const auto family =
        KeyKind(part.kind) == KeyKind::murmur3 ? HashFamily::murmur3 : HashFamily::splitmix64;
    for (int i = 0; i < count; i += lanes) {  // lanes past the count hold ids of before
      vuint64 id;
      std::memcpy(&id, ids_ + i, sizeof id);
      const Hash128<vuint64> words = four_keys(family, uint32_t(part.a), id, int(part.b / 4));
      std::memcpy(words_[0] + i, &words.low, sizeof id);
      std::memcpy(words_[1] + i, &words.high, sizeof id);
    }
  }

  void reduce(const Part& part, int count, uint32_t* to) const {
    const VectorModulo modulo(uint64_t(part.rows));
    const uint64_t* words = words_[part.b / 2 % 2];
    const uint64_t sign = part.is_signed ? kSignBit : 0;
    for (int i = 0; i < count; i += lanes) {
      vuint64 word;
      std::memcpy(&word, words + i, sizeof word);
      const vuint64 key = part.b % 2 ? word >> 32 : word & 0xffffffff;
      const vuint64 number = modulo(key) | (key & sign);
      for (int lane = 0; lane < lanes && i + lane < count; ++lane) {
        to[i + lane] = uint32_t(number[lane]);
      }
    }
  }

  const Feature& feature_;
  const int64_t* padding_id_;
  const int64_t first_, last_;
  int64_t filled_;         // the ids before it are done
  int size_ = 2 * kBlock;  // of a part's numbers, a power of two
  alignas(64) int64_t ids_[kBlock] = {};
  alignas(64) uint64_t words_[2][kBlock];
  alignas(64) uint32_t numbers_[kMostNumbers];
};

}  // namespace
}  // namespace emblas
