// Strings to ids, for the tables that look them up. Plain functions over UTF-8 bytes; each appends
// the ids of one string. What a character is (a letter, upper case, a digit) the caller tells, as
// only Python has Unicode's tables.
//
//   string      MurmurHash64A with seed 1: spaCy's id; the empty string is 0
//   norm, prefix, suffix, shape   the same of the string in lower case, of its first character, its
//               last three, and its shape: X, x, d or the character itself, runs cut to four; LONG
//               from 100 characters on
//   subwords    fastText's n-grams of characters of "<string>", hashed by FNV-1a in which each byte
//               is extended by its sign first
//   code_points, bytes            the characters and the bytes themselves
//   byte_ngrams BLT's hash of the n bytes up to each byte, zeros before the first:
//               sum_i t_i P^i modulo 2^64
//   kmers       runs of k letters A C G T as a number of base 4; others in the run: none
//
// Two more, with arguments of their own:
//
//   floret      "<string>" and its n-grams of characters, each as the first words of its
//               MurmurHash3_x64_128, modulo the number of rows
//   word n-grams  fastText's: h = h 116049371 + hash(word) modulo 2^64 over the words, each hash
//               extended by its sign, then modulo the number of rows
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "common/hash.h"

namespace emblas {

enum class TextKind {
  string,
  norm,
  prefix,
  suffix,
  shape,
  subwords,
  code_points,
  bytes,
  byte_ngrams,
  kmers
};

struct TextOptions {
  TextKind kind;
  int64_t min_n, max_n;  // subwords; byte_ngrams and kmers take max_n
  uint64_t multiplier;   // P of byte_ngrams
};

// Unicode's tables, as far as texts need them.
struct Characters {
  // 'X' upper case, 'x' another letter, 'd' a digit, 0 anything else.
  char (*kind)(uint32_t point);
  uint32_t (*lower)(uint32_t point);
  // The same of a whole text, where one character isn't enough to tell: the small final sigma looks
  // at its neighbours, and I with a dot becomes two characters.
  void (*lower_text)(std::string_view text, std::string* lower);
};
constexpr uint32_t kCapitalSigma = 0x3a3, kDottedCapitalI = 0x130;

// The character at text[i], and how many bytes it takes: 0 if they aren't UTF-8. Each character has
// one form only: longer ones, halves of surrogate pairs and numbers past 0x10ffff are refused.
inline int decode_one(std::string_view text, size_t i, uint32_t* point) {
  constexpr uint32_t least[] = {0, 0x80, 0x800, 0x10000};
  const auto lead = static_cast<unsigned char>(text[i]);
  const int more = lead < 0x80       ? 0
                   : lead >> 5 == 6  ? 1
                   : lead >> 4 == 14 ? 2
                   : lead >> 3 == 30 ? 3
                                     : -1;
  if (more < 0 || i + size_t(more) >= text.size()) return 0;
  *point = more ? lead & (0x3f >> more) : lead;
  for (int k = 1; k <= more; ++k) {
    const auto byte = static_cast<unsigned char>(text[i + size_t(k)]);
    if (byte >> 6 != 2) return 0;
    *point = *point << 6 | (byte & 0x3f);
  }
  const bool surrogate = *point >> 11 == 0xd800 >> 11;
  return *point < least[more] || *point > 0x10ffff || surrogate ? 0 : more + 1;
}

// Code points and where they start, one more start for the end. False if the bytes aren't UTF-8.
inline bool decode(std::string_view text, std::vector<uint32_t>* points,
                   std::vector<int64_t>* starts) {
  points->clear();
  starts->clear();
  for (size_t i = 0; i < text.size();) {
    uint32_t point;
    const int size = decode_one(text, i, &point);
    if (size == 0) return false;
    points->push_back(point);
    starts->push_back(int64_t(i));
    i += size_t(size);
  }
  starts->push_back(int64_t(text.size()));
  return true;
}

inline void append_utf8(uint32_t point, std::string* text) {
  const int more = point < 0x80 ? 0 : point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
  constexpr unsigned char lead[] = {0, 0xc0, 0xe0, 0xf0};
  *text += char(lead[more] | point >> 6 * more);
  for (int k = more - 1; k >= 0; --k) *text += char(0x80 | (point >> 6 * k & 0x3f));
}

inline uint32_t fasttext_hash(std::string_view text) {
  uint32_t h = 2166136261u;
  for (char c : text) h = (h ^ uint32_t(int32_t(static_cast<signed char>(c)))) * 16777619u;
  return h;
}

inline int64_t spacy_id(std::string_view text) {
  return text.empty() ? 0 : int64_t(murmur64a(text.data(), int64_t(text.size()), 1));
}

class TextIds {
 public:
  TextIds(const TextOptions& options, const Characters& characters)
      : options_(options), characters_(characters) {}

  // Appends the ids of one string; false if it isn't UTF-8.
  bool append(std::string_view text, std::vector<int64_t>* ids) {
    switch (options_.kind) {
      case TextKind::string:
        ids->push_back(spacy_id(text));
        return true;
      case TextKind::norm:
        if (!lower(text)) return false;
        ids->push_back(spacy_id(buffer_));
        return true;
      case TextKind::bytes:
        for (char c : text) ids->push_back(static_cast<unsigned char>(c));
        return true;
      case TextKind::byte_ngrams:
        append_byte_ngrams(text, ids);
        return true;
      case TextKind::kmers:
        append_kmers(text, ids);
        return true;
      case TextKind::subwords:
        buffer_.assign(1, '<').append(text).append(1, '>');
        if (!decode(buffer_, &points_, &starts_)) return false;
        append_subwords(ids);
        return true;
      default:
        break;
    }
    if (!decode(text, &points_, &starts_)) return false;
    const int64_t count = int64_t(points_.size());
    if (options_.kind == TextKind::code_points) {
      ids->insert(ids->end(), points_.begin(), points_.end());
    } else if (options_.kind == TextKind::prefix) {
      ids->push_back(spacy_id(text.substr(0, size_t(starts_[count > 0]))));
    } else if (options_.kind == TextKind::suffix) {
      ids->push_back(spacy_id(text.substr(size_t(starts_[count > 3 ? count - 3 : 0]))));
    } else {
      ids->push_back(spacy_id(shape(text)));
    }
    return true;
  }

 private:
  void append_byte_ngrams(std::string_view text, std::vector<int64_t>* ids) const {
    for (int64_t i = 0; i < int64_t(text.size()); ++i) {
      uint64_t h = 0;
      for (int64_t k = 0; k < options_.max_n; ++k) {  // Horner's rule, from the current byte back
        const int64_t at = i - k;
        h = h * options_.multiplier + (at >= 0 ? static_cast<unsigned char>(text[at]) : 0);
      }
      ids->push_back(int64_t(h));
    }
  }

  void append_kmers(std::string_view text, std::vector<int64_t>* ids) const {
    const uint64_t mask = (uint64_t(1) << 2 * options_.max_n) - 1;
    uint64_t number = 0;
    int64_t run = 0;
    for (char c : text) {
      const char upper = char(c & ~32);
      const int digit = upper == 'A'   ? 0
                        : upper == 'C' ? 1
                        : upper == 'G' ? 2
                        : upper == 'T' ? 3
                                       : -1;
      run = digit < 0 ? 0 : run + 1;
      number = (number << 2 | uint64_t(digit & 3)) & mask;
      if (run >= options_.max_n) ids->push_back(int64_t(number));
    }
  }

  void append_subwords(std::vector<int64_t>* ids) const {
    const int64_t count = int64_t(points_.size());
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t n = options_.min_n; n <= options_.max_n && i + n <= count; ++n) {
        if (n == 1 && (i == 0 || i + 1 == count)) continue;  // a bracket alone
        const auto begin = size_t(starts_[i]), end = size_t(starts_[i + n]);
        ids->push_back(fasttext_hash(std::string_view(buffer_).substr(begin, end - begin)));
      }
    }
  }

  // Sets buffer_; false if the text isn't UTF-8.
  bool lower(std::string_view text) {
    buffer_.assign(text);
    unsigned char bits = 0;
    for (char& c : buffer_) {
      bits |= static_cast<unsigned char>(c);
      c = 'A' <= c && c <= 'Z' ? char(c + 32) : c;
    }
    if (bits < 0x80) return true;
    if (!decode(text, &points_, &starts_)) return false;
    buffer_.clear();
    for (uint32_t point : points_) {
      if (point == kCapitalSigma || point == kDottedCapitalI) {
        characters_.lower_text(text, &buffer_);
        return true;
      }
      append_utf8(characters_.lower(point), &buffer_);
    }
    return true;
  }

  std::string_view shape(std::string_view text) {
    constexpr size_t long_length = 100;
    constexpr int longest_run = 4;
    if (points_.size() >= long_length) return "LONG";
    buffer_.clear();
    uint32_t last = 0;
    int run = 0;
    for (size_t i = 0; i < points_.size(); ++i) {
      const char kind = characters_.kind(points_[i]);
      const uint32_t unit = kind ? uint32_t(kind) : points_[i];
      run = unit == last ? run + 1 : 1;
      last = unit;
      if (run > longest_run) continue;
      if (kind) {
        buffer_ += kind;
      } else {
        buffer_ += text.substr(size_t(starts_[i]), size_t(starts_[i + 1] - starts_[i]));
      }
    }
    return buffer_;
  }

  TextOptions options_;
  Characters characters_;
  std::string buffer_;
  std::vector<uint32_t> points_;
  std::vector<int64_t> starts_;
};

struct FloretOptions {
  int64_t min_n, max_n;  // characters
  int64_t num_hashes;    // 1 to 4
  uint32_t seed, num_buckets;
};

class FloretIds {
 public:
  explicit FloretIds(const FloretOptions& options) : options_(options) {}

  // Appends the rows of one word; false if it isn't UTF-8.
  bool append(std::string_view word, std::vector<int64_t>* ids) {
    buffer_.assign(1, '<').append(word).append(1, '>');
    if (!decode(buffer_, &points_, &starts_)) return false;
    append_rows(buffer_, ids);
    const int64_t count = int64_t(points_.size());
    for (int64_t n = options_.min_n; n <= options_.max_n && n <= count; ++n) {
      for (int64_t i = 0; i + n <= count; ++i) {
        const auto begin = size_t(starts_[i]), end = size_t(starts_[i + n]);
        append_rows(std::string_view(buffer_).substr(begin, end - begin), ids);
      }
    }
    return true;
  }

 private:
  void append_rows(std::string_view text, std::vector<int64_t>* ids) const {
    const Hash128<uint64_t> hash = murmur3(text.data(), int64_t(text.size()), options_.seed);
    const uint64_t words[] = {hash.low & 0xffffffff, hash.low >> 32, hash.high & 0xffffffff,
                              hash.high >> 32};
    for (int64_t j = 0; j < options_.num_hashes; ++j) {
      ids->push_back(int64_t(words[j] % options_.num_buckets));
    }
  }

  FloretOptions options_;
  std::string buffer_;
  std::vector<uint32_t> points_;
  std::vector<int64_t> starts_;
};

// Appends the rows of the n-grams of 2 to max_n words, by first word, then by length.
inline void append_word_ngrams(const std::string_view* words, int64_t count, int64_t max_n,
                               uint64_t num_buckets, std::vector<uint64_t>* hashes,
                               std::vector<int64_t>* ids) {
  constexpr uint64_t multiplier = 116049371;
  hashes->clear();
  for (int64_t i = 0; i < count; ++i) {
    hashes->push_back(uint64_t(int64_t(int32_t(fasttext_hash(words[i])))));
  }
  for (int64_t i = 0; i < count; ++i) {
    uint64_t h = (*hashes)[i];
    for (int64_t last = i + 1; last < count && last - i < max_n; ++last) {
      h = h * multiplier + (*hashes)[last];
      ids->push_back(int64_t(h % num_buckets));
    }
  }
}

}  // namespace emblas
