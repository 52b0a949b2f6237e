// The numpy door of texts: strings or Arrow-like arrays in, ids and offsets out.
#pragma once

#include <pybind11/typing.h>

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common/numpy.h"
#include "tables/text.h"

namespace emblas {

using IdsAndOffsets = std::pair<Array<int64_t>, Array<int32_t>>;
using Texts = std::vector<std::string_view>;

// --- texts ---------------------------------------------------------------------------------------

// The UTF-8 of a str, which keeps it.
inline std::string_view view_of(py::handle string, const char* message) {
  if (!PyUnicode_Check(string.ptr())) throw py::type_error(message);
  Py_ssize_t size = 0;
  const char* data = PyUnicode_AsUTF8AndSize(string.ptr(), &size);
  if (!data) throw py::error_already_set();
  return {data, size_t(size)};
}

inline Texts views_of(const py::typing::List<py::str>& strings) {
  Texts texts;
  texts.reserve(strings.size());
  for (const py::handle string : strings) {
    texts.push_back(view_of(string, "strings must be a list of str"));
  }
  return texts;
}

// Starts inside `size` elements, one more for the end.
inline const int64_t* checked_starts(const Array<int64_t>& starts, int64_t size,
                                     const std::string& name, const std::string& what) {
  const int64_t count = starts.shape(0) - 1;
  check_array(count >= 0, name + " must have at least one element");
  const int64_t* at = starts.data();
  bool valid = at[0] >= 0 && at[count] <= size;
  for (int64_t i = 0; i < count; ++i) valid &= at[i] <= at[i + 1];
  check_array(valid, name + " must lie inside " + what + " and never decrease");
  return at;
}

inline Texts views_of(const Array<uint8_t>& data, const Array<int64_t>& starts) {
  const int64_t* at = checked_starts(starts, data.shape(0), "offsets", "bytes");
  Texts texts(size_t(starts.shape(0) - 1));
  for (size_t i = 0; i < texts.size(); ++i) {
    texts[i] = {reinterpret_cast<const char*>(data.data()) + at[i], size_t(at[i + 1] - at[i])};
  }
  return texts;
}

// --- ids -----------------------------------------------------------------------------------------

// append(i, &ids) for `count` texts, without the GIL; it returns whether text i is UTF-8. The texts
// must outlive the call.
template <class Append>
IdsAndOffsets collect_ids(int64_t count, const Append& append) {
  Array<int32_t> offsets(count + 1);
  std::vector<int64_t> ids;
  int64_t invalid = -1;
  {
    int32_t* to = offsets.mutable_data();
    const py::gil_scoped_release unlocked;
    to[0] = 0;
    for (int64_t i = 0; i < count && invalid < 0; ++i) {
      if (!append(i, &ids)) invalid = i;
      check_array(ids.size() < size_t(1) << 31, "there can be at most 2^31 - 1 ids");
      to[i + 1] = int32_t(ids.size());
    }
  }
  check_array(invalid < 0, "strings must be UTF-8, number " + std::to_string(invalid) + " is not");
  Array<int64_t> out(int64_t(ids.size()));
  std::copy(ids.begin(), ids.end(), out.mutable_data());
  return {out, offsets};
}

inline char python_kind(uint32_t point) {
  const Py_UCS4 c = point;
  if (Py_UNICODE_ISALPHA(c)) return Py_UNICODE_ISUPPER(c) ? 'X' : 'x';
  return Py_UNICODE_ISDIGIT(c) ? 'd' : 0;
}
inline uint32_t python_lower(uint32_t point) { return Py_UNICODE_TOLOWER(Py_UCS4(point)); }
inline void python_lower_text(std::string_view text, std::string* lower) {
  const py::gil_scoped_acquire locked;
  *lower = py::str(text.data(), text.size()).attr("lower")().cast<std::string>();
}

inline IdsAndOffsets text_ids_of(const Texts& texts, int64_t kind, int64_t min_n, int64_t max_n,
                                 uint64_t multiplier, int64_t modulus) {
  check_array(0 <= kind && kind <= int64_t(TextKind::kmers), "unknown kind of text ids");
  check_array(1 <= min_n && min_n <= max_n, "min_n must be 1 to max_n");
  check_array(TextKind(kind) != TextKind::kmers || max_n <= 31, "n must be at most 31");
  TextIds append({TextKind(kind), min_n, max_n, multiplier},
                 {python_kind, python_lower, python_lower_text});
  return collect_ids(int64_t(texts.size()), [&](int64_t i, std::vector<int64_t>* ids) {
    const size_t before = ids->size();
    if (!append.append(texts[size_t(i)], ids)) return false;
    for (size_t k = before; modulus > 0 && k < ids->size(); ++k) {
      int64_t& id = (*ids)[k];
      id %= modulus;
      if (id < 0) id += modulus;  // the remainder that is not negative
    }
    return true;
  });
}

inline IdsAndOffsets text_ids_of_strings(const py::typing::List<py::str>& strings, int64_t kind,
                                         int64_t min_n, int64_t max_n, uint64_t multiplier,
                                         int64_t modulus) {
  return text_ids_of(views_of(strings), kind, min_n, max_n, multiplier, modulus);
}

inline IdsAndOffsets text_ids_of_bytes(const py::array& bytes, const py::array& offsets,
                                       int64_t kind, int64_t min_n, int64_t max_n,
                                       uint64_t multiplier, int64_t modulus) {
  const auto data = as_array<uint8_t>(bytes, 1, "bytes");
  const auto starts = as_array<int64_t>(offsets, 1, "offsets");
  return text_ids_of(views_of(data, starts), kind, min_n, max_n, multiplier, modulus);
}

inline IdsAndOffsets floret_ids_of(const Texts& words, int64_t min_n, int64_t max_n,
                                   int64_t num_hashes, uint32_t seed, uint32_t num_buckets) {
  check_array(1 <= min_n && min_n <= max_n, "min_n must be 1 to max_n");
  check_array(1 <= num_hashes && num_hashes <= 4, "num_hashes must be 1 to 4");
  check_array(num_buckets >= 1, "num_buckets must be at least 1");
  FloretIds append({min_n, max_n, num_hashes, seed, num_buckets});
  return collect_ids(int64_t(words.size()), [&](int64_t i, std::vector<int64_t>* ids) {
    return append.append(words[size_t(i)], ids);
  });
}

inline IdsAndOffsets floret_ids_of_strings(const py::typing::List<py::str>& strings, int64_t min_n,
                                           int64_t max_n, int64_t num_hashes, uint32_t seed,
                                           uint32_t num_buckets) {
  return floret_ids_of(views_of(strings), min_n, max_n, num_hashes, seed, num_buckets);
}

inline IdsAndOffsets floret_ids_of_bytes(const py::array& bytes, const py::array& offsets,
                                         int64_t min_n, int64_t max_n, int64_t num_hashes,
                                         uint32_t seed, uint32_t num_buckets) {
  const auto data = as_array<uint8_t>(bytes, 1, "bytes");
  const auto starts = as_array<int64_t>(offsets, 1, "offsets");
  return floret_ids_of(views_of(data, starts), min_n, max_n, num_hashes, seed, num_buckets);
}

// sentences: positions in words where each starts, one more for the end.
inline IdsAndOffsets word_ngram_ids_of(const Texts& words, const int64_t* sentences, int64_t count,
                                       int64_t max_n, uint64_t num_buckets) {
  check_array(max_n >= 2, "max_n must be at least 2");
  check_array(1 <= num_buckets && num_buckets <= uint64_t(1) << 62,
              "num_buckets must be 1 to 2^62");
  std::vector<uint64_t> hashes;
  return collect_ids(count, [&](int64_t i, std::vector<int64_t>* ids) {
    append_word_ngrams(words.data() + sentences[i], sentences[i + 1] - sentences[i], max_n,
                       num_buckets, &hashes, ids);
    return true;
  });
}

inline IdsAndOffsets word_ngram_ids_of_strings(
    const py::typing::List<py::typing::List<py::str>>& sentences, int64_t max_n,
    uint64_t num_buckets) {
  Texts words;
  std::vector<int64_t> starts{0};
  std::vector<py::tuple> kept;  // other threads may change the lists
  for (const py::handle sentence : sentences) {
    constexpr char message[] = "sentences must be sequences of words, each a str";
    if (PyUnicode_Check(sentence.ptr()) || !PySequence_Check(sentence.ptr())) {
      throw py::type_error(message);
    }
    kept.push_back(py::reinterpret_steal<py::tuple>(PySequence_Tuple(sentence.ptr())));
    if (!kept.back()) throw py::error_already_set();
    for (const py::handle word : kept.back()) words.push_back(view_of(word, message));
    starts.push_back(int64_t(words.size()));
  }
  return word_ngram_ids_of(words, starts.data(), int64_t(starts.size()) - 1, max_n, num_buckets);
}

inline IdsAndOffsets word_ngram_ids_of_bytes(const py::array& bytes, const py::array& offsets,
                                             const py::array& sentences, int64_t max_n,
                                             uint64_t num_buckets) {
  const auto data = as_array<uint8_t>(bytes, 1, "bytes");
  const auto starts = as_array<int64_t>(offsets, 1, "offsets");
  const auto sentence_starts = as_array<int64_t>(sentences, 1, "sentences");
  const Texts words = views_of(data, starts);
  const int64_t* at =
      checked_starts(sentence_starts, int64_t(words.size()), "offsets of sentences", "the words");
  return word_ngram_ids_of(words, at, sentence_starts.shape(0) - 1, max_n, num_buckets);
}

inline void bind_text(py::module_& module) {
  module.def("text_ids_of_strings", &text_ids_of_strings, py::arg("strings"), py::arg("kind"),
             py::arg("min_n"), py::arg("max_n"), py::arg("multiplier"), py::arg("modulus"));
  module.def("text_ids_of_bytes", &text_ids_of_bytes, py::arg("bytes"), py::arg("offsets"),
             py::arg("kind"), py::arg("min_n"), py::arg("max_n"), py::arg("multiplier"),
             py::arg("modulus"));
  module.def("floret_ids_of_strings", &floret_ids_of_strings, py::arg("strings"), py::arg("min_n"),
             py::arg("max_n"), py::arg("num_hashes"), py::arg("seed"), py::arg("num_buckets"));
  module.def("floret_ids_of_bytes", &floret_ids_of_bytes, py::arg("bytes"), py::arg("offsets"),
             py::arg("min_n"), py::arg("max_n"), py::arg("num_hashes"), py::arg("seed"),
             py::arg("num_buckets"));
  module.def("word_ngram_ids_of_strings", &word_ngram_ids_of_strings, py::arg("sentences"),
             py::arg("max_n"), py::arg("num_buckets"));
  module.def("word_ngram_ids_of_bytes", &word_ngram_ids_of_bytes, py::arg("bytes"),
             py::arg("offsets"), py::arg("sentences"), py::arg("max_n"), py::arg("num_buckets"));
}

}  // namespace emblas
