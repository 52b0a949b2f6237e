// Bit codes as torch operators on CPU tensors.
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "binary/arguments.h"
#include "binary/binary.h"
#include "binary/scores.h"
#include "binary/search.h"
#include "common/isa.h"
#include "common/tensor.h"

namespace emblas {
namespace {

constexpr char kDtypes[] = "x must be float32, float64, bfloat16 or float16";

Tensor pack_sign(const Tensor& x, const std::optional<Tensor>& threshold) {
  check_rows(x, "x must be a CPU tensor (rows, dim) with a contiguous last dimension");
  return visit_float(x.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const int64_t rows = x.size(0), dim = x.size(1), bytes = (dim + 7) / 8;
    if (threshold) {
      check_vector<A>(*threshold, dim,
                      "threshold must be a contiguous vector of dim values, float64 if x is, "
                      "float32 otherwise");
    }
    const A* limits = threshold ? read<A>(*threshold) : nullptr;
    Tensor codes = empty_cpu<2>(ScalarType::Byte, {rows, bytes});
    const auto& kernel = kernels<PackSignKernels>().of(element);
    parallel_for(rows, dim * int64_t(sizeof(T)), [&](int64_t first, int64_t last) {
      kernel.pack(read<T>(x), x.stride(0), limits, dim, first, last, write<uint8_t>(codes));
    });
    return codes;
  });
}

Tensor unpack_planes(const Tensor& codes, int64_t dim, ScalarType dtype) {
  const Codes rows = codes_of(codes, kCodes);
  const int64_t width = (dim + 7) / 8;
  check(dim > 0 && rows.bytes > 0 && rows.bytes % width == 0 && rows.bytes / width <= kMaxPlanes,
        "codes must hold 1 to 24 planes of ceil(dim / 8) bytes");
  return visit_float(
      dtype, "dtype must be float32, float64, bfloat16 or float16", [&](auto element) {
        using T = decltype(element);
        Tensor out = empty_cpu<2>(dtype, {rows.count, dim});
        const UnpackPlanesArgs<T> args{rows.data, rows.stride,        rows.count,
                                       dim,       rows.bytes / width, write<T>(out)};
        const auto& kernel = kernels<UnpackPlanesKernels>().of(element);
        parallel_for(rows.count, dim * int64_t(sizeof(T)),
                     [&](int64_t first, int64_t last) { kernel.unpack(args, first, last); });
        return out;
      });
}

Tensor rotate(const Tensor& x, const Tensor& signs, bool inverse) {
  check_rows(x, "x must be a CPU tensor (rows, dim) with a contiguous last dimension");
  check(signs.is_cpu() && has_dtype<int8_t>(signs) && signs.dim() == 2 && signs.is_contiguous() &&
            signs.size(1) == x.size(1),
        "signs must be a contiguous int8 CPU tensor (rounds, dim)");
  return visit_float(x.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    const int64_t rows = x.size(0), dim = x.size(1);
    Tensor out = empty_cpu<2>(x.scalar_type(), {rows, dim});
    const HadamardRotateArgs<T> args{read<T>(x),    x.stride(0), dim,          read<int8_t>(signs),
                                     signs.size(0), inverse,     write<T>(out)};
    const auto& kernel = kernels<HadamardRotateKernels>().of(element);
    if (dim == 0) return out;
    parallel_for(rows, dim * int64_t(sizeof(T)) * 8, [&](int64_t first, int64_t last) {
      std::vector<Accumulator<T>> buffer(dim);
      kernel.rotate(args, first, last, buffer.data());
    });
    return out;
  });
}
Tensor hadamard_rotate(const Tensor& x, const Tensor& signs) { return rotate(x, signs, false); }
Tensor hadamard_unrotate(const Tensor& x, const Tensor& signs) { return rotate(x, signs, true); }

std::tuple<Tensor, Tensor> hamming_topk(const Tensor& queries, const Tensor& codes, int64_t k,
                                        const std::optional<Tensor>& filter) {
  const Codes query_codes = codes_of(queries, kQueries), documents = codes_of(codes, kCodes);
  check_search(query_codes.bytes, documents, HammingScan::kRowBits);
  check(k >= 0, "k must not be negative");
  const SearchOptions options{filter_of(filter, query_codes.count, documents.count)};
  Tensor distances = empty_cpu<2>(ScalarType::Int, {query_codes.count, k});
  Tensor ids = empty_cpu<2>(ScalarType::Long, {query_codes.count, k});
  if (k > 0) {
    const auto found = search(HammingScan(query_codes, k), documents, options, kParallel);
    write_topk<HammingScan>(found, k, std::numeric_limits<int32_t>::max(),
                            write<int32_t>(distances), write<int64_t>(ids));
  }
  return {distances, ids};
}

Tensor hamming_distance(const Tensor& a, const Tensor& b) {
  const Codes left = codes_of(a, "a must be a uint8 CPU tensor (rows, bytes), rows contiguous");
  const Codes right = codes_of(b, "b must be a uint8 CPU tensor (rows, bytes), rows contiguous");
  check(left.bytes == right.bytes, "a and b must have the same width in bytes");
  Tensor distances = empty_cpu<2>(ScalarType::Int, {left.count, right.count});
  parallel_for(right.count, (right.bytes + 4) * left.count, [&](int64_t first, int64_t last) {
    hamming_distances(left, right, first, last, write<int32_t>(distances));
  });
  return distances;
}

std::vector<Collector> within_radius(const Tensor& queries, const Tensor& codes, int64_t radius,
                                     int64_t most, const std::optional<Tensor>& filter,
                                     bool later_only) {
  const Codes query_codes = codes_of(queries, kQueries), documents = codes_of(codes, kCodes);
  check_search(query_codes.bytes, documents, HammingScan::kRowBits);
  check(radius >= 0, "radius must not be negative");
  const SearchOptions options{filter_of(filter, query_codes.count, documents.count), later_only};
  return search(HammingScan(query_codes, most, radius), documents, options, kParallel);
}

std::tuple<Tensor, Tensor, Tensor> range_search(const Tensor& queries, const Tensor& codes,
                                                int64_t radius, int64_t max_results,
                                                const std::optional<Tensor>& filter,
                                                bool later_only) {
  check(max_results >= 0, "max_results must not be negative");
  const auto found = within_radius(queries, codes, radius, max_results, filter, later_only);
  const int64_t count = int64_t(found.size());
  Tensor counts = empty_cpu<1>(ScalarType::Long, {count});
  Tensor distances = empty_cpu<2>(ScalarType::Int, {count, max_results});
  Tensor ids = empty_cpu<2>(ScalarType::Long, {count, max_results});
  for (int64_t q = 0; q < count; ++q) {
    write<int64_t>(counts)[q] = found[size_t(q)].dropped + int64_t(found[size_t(q)].keys.size());
  }
  write_topk<HammingScan>(found, max_results, std::numeric_limits<int32_t>::max(),
                          write<int32_t>(distances), write<int64_t>(ids));
  return {counts, distances, ids};
}

std::tuple<Tensor, Tensor, Tensor> range_search_csr(const Tensor& queries, const Tensor& codes,
                                                    int64_t radius,
                                                    const std::optional<Tensor>& filter,
                                                    bool later_only) {
  const auto found = within_radius(queries, codes, radius, kKeepAll, filter, later_only);
  const int64_t count = int64_t(found.size());
  Tensor offsets = empty_cpu<1>(ScalarType::Long, {count + 1});
  int64_t* offset = write<int64_t>(offsets);
  offset[0] = 0;
  for (int64_t q = 0; q < count; ++q) {
    offset[q + 1] = offset[q] + int64_t(found[size_t(q)].keys.size());
  }
  Tensor distances = empty_cpu<1>(ScalarType::Int, {offset[count]});
  Tensor ids = empty_cpu<1>(ScalarType::Long, {offset[count]});
  for (int64_t q = 0; q < count; ++q) {
    int64_t at = offset[q];
    for (const uint64_t key : found[size_t(q)].keys) {
      write<int32_t>(distances)[at] = HammingScan::distance(key);
      write<int64_t>(ids)[at++] = HammingScan::row(key);
    }
  }
  return {offsets, distances, ids};
}

std::tuple<Tensor, Tensor> asymmetric_topk(const Tensor& queries, const Tensor& codes, int64_t k,
                                           const std::optional<Tensor>& filter,
                                           const std::optional<Tensor>& scale) {
  check_rows(queries, "queries must be a CPU tensor (queries, dim) with contiguous rows");
  check(has_dtype<float>(queries), "queries must be float32");
  const Codes documents = codes_of(codes, kCodes);
  const int64_t dim = queries.size(1), width = (dim + 7) / 8, count = queries.size(0);
  check(dim > 0 && documents.bytes > 0 && documents.bytes % width == 0,
        "codes must hold one or more planes of ceil(dim / 8) bytes");
  check_search(documents.bytes, documents, ScoreKey::kRowBits);
  check(k >= 0, "k must not be negative");
  const Filter all = filter_of(filter, count, documents.count);
  const float* scales = nullptr;
  if (scale) {
    check_vector<float>(*scale, documents.count, "scale must be a float32 vector, one per code");
    scales = read<float>(*scale);
    for (int64_t i = 0; i < documents.count; ++i) {
      check(scales[i] > 0 && std::isfinite(scales[i]), "scale must be positive and finite");
    }
  }
  for (int64_t q = 0; q < count; ++q) {
    const float* query = read<float>(queries) + q * queries.stride(0);
    for (int64_t i = 0; i < dim; ++i) check(std::isfinite(query[i]), "queries must be finite");
  }
  Tensor scores = empty_cpu<2>(ScalarType::Float, {count, k});
  Tensor ids = empty_cpu<2>(ScalarType::Long, {count, k});
  constexpr int64_t kQueriesAtOnce = 256;  // bounds the memory of their tables
  for (int64_t first = 0; first < count && k > 0; first += kQueriesAtOnce) {
    const int64_t some = std::min(kQueriesAtOnce, count - first);
    const ScoreScan scan(read<float>(queries) + first * queries.stride(0), queries.stride(0), some,
                         dim, documents.bytes, k, scales, documents.count);
    SearchOptions options{all};
    if (options.filter.bitmaps) options.filter.bitmaps += first * options.filter.bitmap_stride;
    write_topk<ScoreKey>(search(scan, documents, options, kParallel), k,
                         -std::numeric_limits<float>::infinity(), write<float>(scores) + first * k,
                         write<int64_t>(ids) + first * k);
  }
  return {scores, ids};
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(emblas, library) {
  library.def("pack_sign(Tensor x, Tensor? threshold=None) -> Tensor");
  library.def("unpack_planes(Tensor codes, int dim, ScalarType dtype) -> Tensor");
  library.def("hadamard_rotate(Tensor x, Tensor signs) -> Tensor");
  library.def("hadamard_unrotate(Tensor x, Tensor signs) -> Tensor");
  library.def(
      "hamming_topk(Tensor queries, Tensor codes, int k, Tensor? filter=None)"
      " -> (Tensor distances, Tensor ids)");
  library.def("hamming_distance(Tensor a, Tensor b) -> Tensor");
  library.def(
      "range_search(Tensor queries, Tensor codes, int radius, int max_results,"
      " Tensor? filter=None, bool later_only=False)"
      " -> (Tensor counts, Tensor distances, Tensor ids)");
  library.def(
      "range_search_csr(Tensor queries, Tensor codes, int radius, Tensor? filter=None,"
      " bool later_only=False) -> (Tensor offsets, Tensor distances, Tensor ids)");
  library.def(
      "asymmetric_topk(Tensor queries, Tensor codes, int k, Tensor? filter=None,"
      " Tensor? scale=None)"
      " -> (Tensor scores, Tensor ids)");
}
STABLE_TORCH_LIBRARY_IMPL(emblas, CPU, library) {
  library.impl("pack_sign", TORCH_BOX(&emblas::pack_sign));
  library.impl("unpack_planes", TORCH_BOX(&emblas::unpack_planes));
  library.impl("hadamard_rotate", TORCH_BOX(&emblas::hadamard_rotate));
  library.impl("hadamard_unrotate", TORCH_BOX(&emblas::hadamard_unrotate));
  library.impl("hamming_topk", TORCH_BOX(&emblas::hamming_topk));
  library.impl("hamming_distance", TORCH_BOX(&emblas::hamming_distance));
  library.impl("range_search", TORCH_BOX(&emblas::range_search));
  library.impl("range_search_csr", TORCH_BOX(&emblas::range_search_csr));
  library.impl("asymmetric_topk", TORCH_BOX(&emblas::asymmetric_topk));
}
