// Checks of the arguments that the searches share.
#pragma once

#include <optional>

#include "binary/search.h"
#include "common/tensor.h"

namespace emblas {

inline Codes codes_of(const Tensor& tensor, const char* message) {
  check_rows(tensor, message);
  check(has_dtype<uint8_t>(tensor), message);
  check(tensor.size(1) < int64_t(1) << 20, "codes must be shorter than 2^20 bytes");
  return {read<uint8_t>(tensor), tensor.stride(0), tensor.size(0), tensor.size(1)};
}
inline constexpr char kQueries[] =
    "queries must be a uint8 CPU tensor (queries, bytes), rows contiguous";
inline constexpr char kCodes[] = "codes must be a uint8 CPU tensor (rows, bytes), rows contiguous";

inline void check_search(int64_t query_bytes, const Codes& codes, int row_bits) {
  check(query_bytes == codes.bytes, "queries and codes must have the same width in bytes");
  check(codes.count < int64_t(1) << row_bits, "codes have too many rows");
}

inline Filter filter_of(const std::optional<Tensor>& tensor, int64_t queries, int64_t rows) {
  Filter filter;
  if (!tensor) return filter;
  check(tensor->is_cpu() && tensor->is_contiguous(), "filter must be a contiguous CPU tensor");
  if (has_dtype<uint8_t>(*tensor)) {
    check(tensor->dim() == 2 && tensor->size(1) == (rows + 7) / 8 &&
              (tensor->size(0) == 1 || tensor->size(0) == queries),
          "filter must be bitmaps (1 or queries, ceil(rows / 8))");
    filter.bitmaps = read<uint8_t>(*tensor);
    filter.bitmap_stride = tensor->size(0) == 1 ? 0 : tensor->size(1);
    return filter;
  }
  check_vector<int64_t>(*tensor, -1, "filter must be uint8 bitmaps or a vector of int64 ids");
  static constexpr int64_t none = 0;  // an empty list still is a list
  filter.id_count = tensor->size(0);
  filter.ids = filter.id_count ? read<int64_t>(*tensor) : &none;
  for (int64_t i = 0; i < filter.id_count; ++i) {
    check(filter.ids[i] >= 0 && filter.ids[i] < rows, "filter must hold ids of rows of codes");
    check(i == 0 || filter.ids[i - 1] < filter.ids[i], "filter must hold ascending ids");
  }
  return filter;
}

inline constexpr auto kParallel = [](int64_t count, int64_t bytes, const auto& body) {
  parallel_for(count, bytes, body);
};

}  // namespace emblas
