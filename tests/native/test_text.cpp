#include "native.h"
#include "tables/text.h"

namespace {

using emblas::TextKind;

// Unicode as far as these tests need it: ASCII, and Latin-1's and Greek's capitals.
const emblas::Characters kCharacters{
    [](uint32_t c) -> char {
      const bool upper = 'A' <= c && c <= 'Z', lower = 'a' <= c && c <= 'z';
      return upper ? 'X' : lower ? 'x' : '0' <= c && c <= '9' ? 'd' : 0;
    },
    [](uint32_t c) {
      const bool upper = ('A' <= c && c <= 'Z') || (0xc0 <= c && c <= 0xde) || c == 0x391;
      return upper ? c + 32 : c;
    },
    [](std::string_view text, std::string* lower) { *lower = "whole:" + std::string(text); }};

std::vector<int64_t> ids_of(TextKind kind, std::string_view text, bool* valid = nullptr) {
  std::vector<int64_t> ids;
  emblas::TextIds append({kind, 1, 3, 1000000007}, kCharacters);
  const bool ok = append.append(text, &ids);
  if (valid) *valid = ok;
  return ids;
}

}  // namespace

NATIVE_TEST(text_ids_recorded) {
  CHECK(uint64_t(ids_of(TextKind::norm, "APPLE")[0]) == 8566208034543834098u);
  CHECK(uint64_t(ids_of(TextKind::shape, "WNUT17")[0]) == 15842436937160261016u);
  CHECK(uint64_t(ids_of(TextKind::suffix, "WNUT17")[0]) == 7463336318720370622u);
  CHECK(emblas::fasttext_hash("na\xc3\xaf") == 3249590546u);
  for (TextKind kind :
       {TextKind::string, TextKind::norm, TextKind::prefix, TextKind::suffix, TextKind::shape}) {
    CHECK(ids_of(kind, "") == std::vector<int64_t>{0});
  }
}

NATIVE_TEST(text_in_lower_case) {
  const auto norm = [](std::string_view text) { return ids_of(TextKind::norm, text)[0]; };
  CHECK(norm("NA\xc3\x8fVE \xce\x91") == emblas::spacy_id("na\xc3\xafve \xce\xb1"));
  CHECK(norm("A\xf0\x9f\x99\x82\xe2\x82\xac") == emblas::spacy_id("a\xf0\x9f\x99\x82\xe2\x82\xac"));
  for (const char* special : {"A\xce\xa3", "\xc4\xb0"}) {  // a sigma, a dotted I
    CHECK(norm(special) == emblas::spacy_id("whole:" + std::string(special)));
  }
}

NATIVE_TEST(text_must_be_utf8) {
  const char* invalid[] = {
      "a\x80",             // continues nothing
      "\xc3",              // cut short
      "\xe2\x82",          //
      "\xf0\x9f\x99",      //
      "\xc3(",             // not continued
      "\xc0\xaf",          // a longer form of '/'
      "\xc1\xbf",          //
      "\xe0\x9f\xbf",      //
      "\xf0\x8f\xbf\xbf",  //
      "\xed\xa0\x80",      // half of a surrogate pair
      "\xed\xbf\xbf",      //
      "\xf4\x90\x80\x80",  // past the last character
      "\xf8\x88\x80\x80",  // no lead byte
      "\xff",
  };
  for (const char* text : invalid) {
    for (TextKind kind : {TextKind::norm, TextKind::prefix, TextKind::suffix, TextKind::shape,
                          TextKind::subwords, TextKind::code_points}) {
      bool valid = true;
      ids_of(kind, text, &valid);
      CHECK(!valid);
    }
  }
  // The first and last character of each length.
  const std::string valid =
      "\x01\x7f\xc2\x80\xdf\xbf\xe0\xa0\x80\xed\x9f\xbf\xee\x80\x80\xef\xbf\xbf"
      "\xf0\x90\x80\x80\xf4\x8f\xbf\xbf";
  const std::vector<int64_t> points{1,      0x7f,   0x80,   0x7ff,   0x800,
                                    0xd7ff, 0xe000, 0xffff, 0x10000, 0x10ffff};
  CHECK(ids_of(TextKind::code_points, valid) == points);
  std::string again;
  for (int64_t point : points) emblas::append_utf8(uint32_t(point), &again);
  CHECK(again == valid);
}

NATIVE_TEST(text_ids_of_any_bytes) {
  const auto bytes = native::random_bits<uint8_t>(4000, 3);
  for (int64_t kind = 0; kind <= int64_t(TextKind::kmers) + 1; ++kind) {
    for (size_t size : {0, 1, 2, 3, 4, 150}) {
      for (size_t at = 0; at + size <= bytes.size(); at += 37) {  // mostly not UTF-8
        const std::vector<char> own(bytes.begin() + at, bytes.begin() + at + size);
        const std::string_view text(own.data(), size);
        if (kind <= int64_t(TextKind::kmers)) {
          ids_of(TextKind(kind), text);
        } else {
          std::vector<int64_t> ids;
          emblas::FloretIds({1, 3, 4, 7, 5}).append(text, &ids);
        }
      }
    }
  }
}

NATIVE_TEST(floret_ids) {
  std::vector<int64_t> ids;
  emblas::FloretIds append({4, 5, 4, 2166136261u, 50000});
  CHECK(append.append("apple", &ids));
  CHECK(ids.size() == 4 * (1 + 4 + 3));
  const std::vector<int64_t> first{40534, 20033, 12939, 47746, 22888, 26128, 36640, 44173};
  CHECK(std::vector<int64_t>(ids.begin(), ids.begin() + 8) == first);
  ids.clear();
  CHECK(append.append("", &ids) && ids.size() == 4);  // "<>"
  CHECK(!append.append("\xc3", &ids));
}

NATIVE_TEST(word_ngram_ids) {
  const std::string_view words[] = {"hello", "world", "", "na\xc3\xaf"};
  std::vector<uint64_t> hashes;
  std::vector<int64_t> ids;
  emblas::append_word_ngrams(words, 2, 2, 2000000, &hashes, &ids);
  CHECK(ids == std::vector<int64_t>{1485020});
  ids.clear();
  emblas::append_word_ngrams(words, 4, 3, uint64_t(1) << 62, &hashes, &ids);
  CHECK(ids.size() == 5);  // 01, 012, 12, 123, 23
  const auto hash = [&](int i) {
    return uint64_t(int64_t(int32_t(emblas::fasttext_hash(words[i]))));
  };
  const uint64_t m = 116049371, last = ((hash(1) * m + hash(2)) * m + hash(3)) << 2 >> 2;
  CHECK(uint64_t(ids[3]) == last);
  for (int64_t count : {0, 1}) {
    ids.clear();
    emblas::append_word_ngrams(words, count, 9, 5, &hashes, &ids);
    CHECK(ids.empty());
  }
}
