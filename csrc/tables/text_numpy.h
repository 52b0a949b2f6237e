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

inline char python_character_class(uint32_t point) {
  const Py_UCS4 c = point;
  if (Py_UNICODE_ISALPHA(c)) return Py_UNICODE_ISUPPER(c) ? 'X' : 'x';
  return Py_UNICODE_ISDIGIT(c) ? 'd' : 0;
}

// The texts must outlive the call; the GIL is released here.
inline IdsAndOffsets text_ids_of(const std::vector<std::string_view>& texts,
                                 const TextOptions& options, int64_t modulus) {
  const int64_t count = int64_t(texts.size());
  Array<int32_t> offsets(count + 1);
  std::vector<int64_t> ids;
  int64_t invalid = -1;
  {
    int32_t* to = offsets.mutable_data();
    const py::gil_scoped_release unlocked;
    TextIds append(options, python_character_class);
    to[0] = 0;
    for (int64_t i = 0; i < count && invalid < 0; ++i) {
      if (!append.append(texts[i], &ids)) invalid = i;
      check_array(ids.size() < size_t(1) << 31, "there can be at most 2^31 - 1 ids");
      to[i + 1] = int32_t(ids.size());
    }
    for (int64_t& id : ids) {  // the remainder that is not negative
      if (modulus > 0) id = (id % modulus + modulus) % modulus;
    }
  }
  check_array(invalid < 0, "strings must be UTF-8, number " + std::to_string(invalid) + " is not");
  Array<int64_t> out(int64_t(ids.size()));
  std::copy(ids.begin(), ids.end(), out.mutable_data());
  return {out, offsets};
}

inline TextOptions text_options(int64_t kind, int64_t min_n, int64_t max_n, uint64_t multiplier) {
  check_array(0 <= kind && kind <= int64_t(TextKind::kmers), "unknown kind of text ids");
  check_array(1 <= min_n && min_n <= max_n, "min_n must be 1 to max_n");
  check_array(TextKind(kind) != TextKind::kmers || max_n <= 31, "n must be at most 31");
  return {TextKind(kind), min_n, max_n, multiplier};
}

inline IdsAndOffsets text_ids_of_strings(const py::typing::List<py::str>& strings, int64_t kind,
                                         int64_t min_n, int64_t max_n, uint64_t multiplier,
                                         int64_t modulus) {
  std::vector<std::string_view> texts;
  texts.reserve(strings.size());
  for (const py::handle string : strings) {  // the list keeps the strings, and they their UTF-8
    Py_ssize_t size = 0;
    const char* data =
        PyUnicode_Check(string.ptr()) ? PyUnicode_AsUTF8AndSize(string.ptr(), &size) : nullptr;
    if (!data && PyErr_Occurred()) throw py::error_already_set();
    if (!data) throw py::type_error("strings must be a list of str");
    texts.emplace_back(data, size_t(size));
  }
  return text_ids_of(texts, text_options(kind, min_n, max_n, multiplier), modulus);
}

inline IdsAndOffsets text_ids_of_bytes(const py::array& bytes, const py::array& offsets,
                                       int64_t kind, int64_t min_n, int64_t max_n,
                                       uint64_t multiplier, int64_t modulus) {
  const auto data = as_array<uint8_t>(bytes, 1, "bytes");
  const auto starts = as_array<int64_t>(offsets, 1, "offsets");
  const int64_t count = starts.shape(0) - 1;
  check_array(count >= 0, "offsets must have at least one element");
  const int64_t* at = starts.data();
  bool valid = at[0] >= 0 && at[count] <= data.shape(0);
  for (int64_t i = 0; i < count; ++i) valid &= at[i] <= at[i + 1];
  check_array(valid, "offsets must lie inside bytes and never decrease");
  std::vector<std::string_view> texts;
  texts.reserve(size_t(count));
  for (int64_t i = 0; i < count; ++i) {
    texts.emplace_back(reinterpret_cast<const char*>(data.data()) + at[i],
                       size_t(at[i + 1] - at[i]));
  }
  return text_ids_of(texts, text_options(kind, min_n, max_n, multiplier), modulus);
}

inline void bind_text(py::module_& module) {
  module.def("text_ids_of_strings", &text_ids_of_strings, py::arg("strings"), py::arg("kind"),
             py::arg("min_n"), py::arg("max_n"), py::arg("multiplier"), py::arg("modulus"));
  module.def("text_ids_of_bytes", &text_ids_of_bytes, py::arg("bytes"), py::arg("offsets"),
             py::arg("kind"), py::arg("min_n"), py::arg("max_n"), py::arg("multiplier"),
             py::arg("modulus"));
}

}  // namespace emblas
