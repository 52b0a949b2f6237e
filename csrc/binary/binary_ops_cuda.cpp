// Bit codes as torch operators on CUDA tensors: emblas::<op>_cuda, which the router of the public
// operator calls.
#include <algorithm>
#include <optional>
#include <tuple>

#include "binary/binary_cuda.h"
#include "common/cuda/device_call.h"

namespace emblas {
namespace {

Tensor pack_sign_cuda(const Tensor& x, const std::optional<Tensor>& threshold) {
  const DeviceCall call(x);
  call.check_rows(x, "x must be a tensor (rows, dim) with a contiguous last dimension");
  check(x.size(1) < int64_t(1) << 31, "x must have less than 2^31 dimensions");
  return visit_float(
      x.scalar_type(), "x must be float32, float64, bfloat16 or float16", [&](auto element) {
        using T = decltype(element);
        using A = Accumulator<T>;
        const int64_t rows = x.size(0), dim = x.size(1);
        if (threshold) {
          call.check_vector<A>(*threshold, dim,
                               "threshold must be a contiguous vector of dim values on the device "
                               "of x, float64 if x is, float32 otherwise");
        }
        const Tensor codes = call.empty<2>(ScalarType::Byte, {rows, (dim + 7) / 8});
        cuda::pack_sign<T>({call.read<T>(x), x.stride(0), rows, dim, call.read<A>(threshold),
                            call.write<uint8_t>(codes)},
                           call.stream());
        return codes;
      });
}

Tensor unpack_planes_cuda(const Tensor& codes, int64_t dim, ScalarType dtype) {
  const DeviceCall call(codes);
  call.check_rows(codes, "codes must be uint8 (rows, bytes), rows contiguous");
  check(has_dtype<uint8_t>(codes), "codes must be uint8 (rows, bytes), rows contiguous");
  const int64_t rows = codes.size(0), bytes = codes.size(1), width = (dim + 7) / 8;
  check(dim > 0 && bytes > 0 && bytes % width == 0 && bytes / width <= kMaxPlanes,
        "codes must hold 1 to 24 planes of ceil(dim / 8) bytes");
  check(dim < int64_t(1) << 31, "codes must have less than 2^31 dimensions");
  return visit_float(dtype, "dtype must be float32, float64, bfloat16 or float16",
                     [&](auto element) {
                       using T = decltype(element);
                       const Tensor out = call.empty<2>(dtype, {rows, dim});
                       cuda::unpack_planes<T>({call.read<uint8_t>(codes), codes.stride(0), rows,
                                               dim, bytes / width, call.write<T>(out)},
                                              call.stream());
                       return out;
                     });
}

Tensor rotate(const Tensor& x, const Tensor& signs, bool inverse) {
  const DeviceCall call(x);
  call.check_rows(x, "x must be a tensor (rows, dim) with a contiguous last dimension");
  check(call.holds(signs) && has_dtype<int8_t>(signs) && signs.dim() == 2 &&
            signs.is_contiguous() && signs.size(1) == x.size(1),
        "signs must be contiguous int8 (rounds, dim) on the device of x");
  return visit_float(
      x.scalar_type(), "x must be float32, float64, bfloat16 or float16", [&](auto element) {
        using T = decltype(element);
        const int64_t rows = x.size(0), dim = x.size(1);
        check(dim * int64_t(sizeof(Accumulator<T>)) <= cuda::kRotateBytes,
              "x must have at most 12288 dimensions, 6144 in float64");
        const Tensor out = call.empty<2>(x.scalar_type(), {rows, dim});
        cuda::hadamard_rotate<T>({call.read<T>(x), x.stride(0), dim, call.read<int8_t>(signs),
                                  signs.size(0), inverse, call.write<T>(out)},
                                 rows, call.stream());
        return out;
      });
}
Tensor hadamard_rotate_cuda(const Tensor& x, const Tensor& signs) {
  return rotate(x, signs, false);
}
Tensor hadamard_unrotate_cuda(const Tensor& x, const Tensor& signs) {
  return rotate(x, signs, true);
}

cuda::CodeRows code_rows(const DeviceCall& call, const Tensor& codes, const char* message) {
  call.check_rows(codes, message);
  check(has_dtype<uint8_t>(codes), message);
  check(codes.size(1) <= cuda::kMaxCodeBytes, "codes must not be longer than 4095 bytes");
  check(codes.size(0) <= cuda::kMaxRows, "codes must have less than 2^32 rows");
  return {call.read<uint8_t>(codes), codes.stride(0), codes.size(0)};
}

// Ids are not looked at: kernels pass over those that are no rows.
cuda::RowFilter row_filter(const DeviceCall& call, const std::optional<Tensor>& filter,
                           int64_t queries, int64_t rows) {
  if (!filter) return {};
  check(call.holds(*filter) && filter->is_contiguous(),
        "filter must be contiguous and on the device of queries");
  if (has_dtype<uint8_t>(*filter)) {
    check(filter->dim() == 2 && filter->size(1) == (rows + 7) / 8 &&
              (filter->size(0) == 1 || filter->size(0) == queries),
          "filter must be bitmaps (1 or queries, ceil(rows / 8))");
    return {call.read<uint8_t>(*filter), filter->size(0) == 1 ? 0 : filter->size(1), nullptr, 0};
  }
  call.check_vector<int64_t>(*filter, -1, "filter must be uint8 bitmaps or a vector of int64 ids");
  static constexpr int64_t none = 0;  // an empty list still is a list
  return {nullptr, 0, filter->size(0) ? call.read<int64_t>(*filter) : &none, filter->size(0)};
}

// A search, with its workspaces and the results that don't depend on what is searched. `queries`:
// for how many the workspaces are; `blocks`: how many fill the device.
struct Prepared {
  Tensor lists, merged, list_counts, ids, counts;
  cuda::Search search;
};
Prepared prepare(const DeviceCall& call, int64_t queries, const Tensor& codes, int64_t k,
                 const std::optional<Tensor>& filter, bool count, int64_t blocks,
                 int queries_per_block, int64_t queries_at_once) {
  check(k >= 0 && k <= cuda::kMaxResults, "the number of results must be between 0 and 2^27");
  check(blocks >= 1, "blocks must be at least 1");
  const int64_t rows = codes.size(0);
  cuda::Search search{};
  search.queries = queries;
  search.rows = rows;
  search.k = k;
  search.filter = row_filter(call, filter, queries, rows);
  search.plan = cuda::plan_search(queries_at_once, search.places(), k, blocks, queries_per_block);
  const cuda::Workspaces sizes = cuda::search_workspaces(search.plan, queries_at_once, k);
  Prepared out{call.empty<1>(ScalarType::Long, {sizes.lists}),
               call.empty<1>(ScalarType::Long, {sizes.merged}),
               call.empty<2>(ScalarType::Long, {count ? queries : 0, search.plan.lists.count}),
               call.empty<2>(ScalarType::Long, {queries, k}),
               call.empty<1>(ScalarType::Long, {count ? queries : 0}),
               search};
  out.search.lists = call.write<uint64_t>(out.lists);
  out.search.merged = call.write<uint64_t>(out.merged);
  out.search.list_counts = count ? call.write<int64_t>(out.list_counts) : nullptr;
  out.search.ids = call.write<int64_t>(out.ids);
  out.search.counts = call.write<int64_t>(out.counts);
  return out;
}

struct QueriesAndCodes {
  cuda::CodeRows queries, codes;
};
QueriesAndCodes queries_and_codes(const DeviceCall& call, const Tensor& queries,
                                  const Tensor& codes) {
  check(queries.dim() == 2 && codes.dim() == 2 && queries.size(1) == codes.size(1),
        "queries and codes must have the same width in bytes");
  return {code_rows(call, queries, "queries must be uint8 (queries, bytes), rows contiguous"),
          code_rows(call, codes, "codes must be uint8 (rows, bytes), rows contiguous")};
}

// counts, distances, ids. `blocks` and `tensor_cores` are for tests.
std::tuple<Tensor, Tensor, Tensor> search_codes(const Tensor& queries, const Tensor& codes,
                                                int64_t k, int64_t radius,
                                                const std::optional<Tensor>& filter,
                                                bool later_only, bool count, int64_t blocks,
                                                bool tensor_cores) {
  const DeviceCall call(queries);
  const auto [wanted, documents] = queries_and_codes(call, queries, codes);
  Prepared prepared =
      prepare(call, wanted.count, codes, k, filter, count, blocks,
              cuda::hamming_queries_per_block(wanted.count, tensor_cores), wanted.count);
  prepared.search.later_only = later_only;
  const Tensor distances = call.empty<2>(ScalarType::Int, {wanted.count, k});
  cuda::hamming_search(prepared.search, wanted, documents, codes.size(1), radius,
                       call.write<int32_t>(distances), call.stream());
  return {prepared.counts, distances, prepared.ids};
}

std::tuple<Tensor, Tensor> hamming_topk_cuda(const Tensor& queries, const Tensor& codes, int64_t k,
                                             const std::optional<Tensor>& filter, int64_t blocks,
                                             bool tensor_cores) {
  const auto [counts, distances, ids] = search_codes(queries, codes, k, 8 * cuda::kMaxCodeBytes,
                                                     filter, false, false, blocks, tensor_cores);
  return {distances, ids};
}

std::tuple<Tensor, Tensor, Tensor> range_search_cuda(const Tensor& queries, const Tensor& codes,
                                                     int64_t radius, int64_t max_results,
                                                     const std::optional<Tensor>& filter,
                                                     bool later_only, int64_t blocks,
                                                     bool tensor_cores) {
  check(radius >= 0, "radius must not be negative");
  return search_codes(queries, codes, max_results, radius, filter, later_only, true, blocks,
                      tensor_cores);
}

std::tuple<Tensor, Tensor, Tensor> range_search_csr_cuda(const Tensor& queries, const Tensor& codes,
                                                         int64_t radius,
                                                         const std::optional<Tensor>& filter,
                                                         bool later_only, int64_t blocks,
                                                         bool tensor_cores) {
  check(radius >= 0, "radius must not be negative");
  check(blocks >= 1, "blocks must be at least 1");
  const DeviceCall call(queries);
  const auto [wanted, documents] = queries_and_codes(call, queries, codes);
  const int64_t count = wanted.count, bytes = codes.size(1);
  cuda::Search search{};
  search.queries = count;
  search.rows = documents.count;
  search.later_only = later_only;
  search.filter = row_filter(call, filter, count, documents.count);
  search.plan = cuda::plan_search(count, search.places(), 0, blocks,
                                  cuda::hamming_queries_per_block(count, tensor_cores));
  const Tensor list_counts = call.empty<2>(ScalarType::Long, {count, search.plan.lists.count});
  const Tensor offsets = call.empty<1>(ScalarType::Long, {count + 1});
  search.list_counts = call.write<int64_t>(list_counts);
  int64_t* begins = call.write<int64_t>(offsets);
  cuda::hamming_count(search, wanted, documents, bytes, radius, begins, call.stream());

  const int64_t found = call.wait_for_last(offsets);
  const Tensor distances = call.empty<1>(ScalarType::Int, {found});
  const Tensor ids = call.empty<1>(ScalarType::Long, {found});
  if (found == 0) return {offsets, distances, ids};
  const Tensor entries = call.empty<1>(ScalarType::Long, {found});
  const Tensor spare = call.empty<1>(ScalarType::Long, {found});
  search.lists = call.write<uint64_t>(entries);
  search.merged = call.write<uint64_t>(spare);
  search.ids = call.write<int64_t>(ids);
  cuda::hamming_collect(search, wanted, documents, bytes, radius, begins,
                        call.write<int32_t>(distances), call.stream());
  return {offsets, distances, ids};
}

std::tuple<Tensor, Tensor> asymmetric_topk_cuda(const Tensor& queries, const Tensor& codes,
                                                int64_t k, const std::optional<Tensor>& filter,
                                                const std::optional<Tensor>& scale,
                                                int64_t blocks) {
  const DeviceCall call(queries);
  call.check_rows(queries, "queries must be float32 (queries, dim), rows contiguous");
  check(has_dtype<float>(queries), "queries must be float32 (queries, dim), rows contiguous");
  const auto documents =
      code_rows(call, codes, "codes must be uint8 (rows, bytes), rows contiguous");
  const int64_t count = queries.size(0), dim = queries.size(1), width = (dim + 7) / 8;
  const int64_t bytes = codes.size(1), at_once = std::min(count, cuda::kScoreQueries);
  check(dim > 0 && bytes > 0 && bytes % width == 0,
        "codes must hold one or more planes of ceil(dim / 8) bytes");
  if (scale) {
    call.check_vector<float>(*scale, documents.count,
                             "scale must be a float32 vector, one per code");
  }
  const Prepared prepared = prepare(call, count, codes, k, filter, false, blocks,
                                    cuda::score_queries_per_block(count), at_once);
  const Tensor scores = call.empty<2>(ScalarType::Float, {count, k});
  const Tensor tables = call.empty<1>(ScalarType::Float, {at_once * bytes * 32});
  cuda::asymmetric_search(prepared.search,
                          {call.read<float>(queries), queries.stride(0), dim, documents, bytes,
                           call.read<float>(scale), call.write<float>(tables)},
                          call.write<float>(scores), call.stream());
  return {scores, prepared.ids};
}

constexpr char kDocuments[] =
    "documents must be float32, bfloat16, float16 or int8, queries float32, rows contiguous";

// visit(T{}) with the element type of documents that queries in float32 can be compared with.
template <class Visit>
auto visit_documents(ScalarType dtype, const Visit& visit) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return visit(bfloat16{});
    case ScalarType::Half:
      return visit(float16{});
    case ScalarType::Char:
      return visit(int8_t{});
    default:
      check(dtype == ScalarType::Float, kDocuments);
      return visit(float{});
  }
}

void check_dense(const DeviceCall& call, const Tensor& queries, const Tensor& documents,
                 int64_t metric) {
  call.check_rows(queries, kDocuments);
  call.check_rows(documents, kDocuments);
  check(has_dtype<float>(queries), kDocuments);
  check(queries.size(1) == documents.size(1), "queries and documents must have the same dim");
  check(queries.size(1) < int64_t(1) << 28, "documents must have less than 2^28 dimensions");
  check(documents.size(0) <= cuda::kMaxRows, "documents must have less than 2^32 rows");
  check(metric >= 0 && metric <= 2, "metric must be 0 (dot), 1 (cosine) or 2 (l2)");
}
template <class T>
cuda::DenseArgs<T> dense_args(const DeviceCall& call, const Tensor& queries,
                              const Tensor& documents, int64_t metric) {
  return {call.read<float>(queries), queries.stride(0), call.read<T>(documents),
          documents.stride(0),       queries.size(1),   cuda::Metric(metric)};
}

std::tuple<Tensor, Tensor> dense_topk_cuda(const Tensor& queries, const Tensor& documents,
                                           int64_t k, int64_t metric,
                                           const std::optional<Tensor>& filter, int64_t blocks) {
  const DeviceCall call(queries);
  check_dense(call, queries, documents, metric);
  const int64_t count = queries.size(0);
  const Prepared prepared = prepare(call, count, documents, k, filter, false, blocks,
                                    cuda::dense_queries_per_block(count), count);
  const Tensor scores = call.empty<2>(ScalarType::Float, {count, k});
  visit_documents(documents.scalar_type(), [&](auto element) {
    using T = decltype(element);
    cuda::dense_search<T>(prepared.search, dense_args<T>(call, queries, documents, metric),
                          call.write<float>(scores), call.stream());
  });
  return {scores, prepared.ids};
}

Tensor gather_scores_cuda(const Tensor& queries, const Tensor& documents, const Tensor& ids,
                          int64_t metric) {
  const DeviceCall call(queries);
  check_dense(call, queries, documents, metric);
  check(call.holds(ids) && has_dtype<int64_t>(ids) && ids.dim() == 2 && ids.is_contiguous() &&
            ids.size(0) == queries.size(0),
        "ids must be contiguous int64 (queries, candidates) on the device of queries");
  const Tensor scores = call.empty<2>(ScalarType::Float, {ids.size(0), ids.size(1)});
  visit_documents(documents.scalar_type(), [&](auto element) {
    using T = decltype(element);
    cuda::gather_scores<T>(dense_args<T>(call, queries, documents, metric), call.read<int64_t>(ids),
                           ids.size(0), ids.size(1), documents.size(0), call.write<float>(scores),
                           call.stream());
  });
  return scores;
}

Tensor hamming_distance_cuda(const Tensor& a, const Tensor& b, int64_t blocks, bool tensor_cores) {
  const DeviceCall call(a);
  const auto left = code_rows(call, a, "a must be uint8 (rows, bytes), rows contiguous");
  const auto right = code_rows(call, b, "b must be uint8 (rows, bytes), rows contiguous");
  check(a.size(1) == b.size(1), "a and b must have the same width in bytes");
  const Tensor distances = call.empty<2>(ScalarType::Int, {left.count, right.count});
  cuda::hamming_distance(
      left, right, a.size(1),
      cuda::plan_search(left.count, right.count, 0, blocks,
                        cuda::hamming_queries_per_block(left.count, tensor_cores)),
      call.write<int32_t>(distances), call.stream());
  return distances;
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(EMBLAS_CUDA_NAMESPACE, library) {
  library.def("pack_sign_cuda(Tensor x, Tensor? threshold=None) -> Tensor");
  library.def("unpack_planes_cuda(Tensor codes, int dim, ScalarType dtype) -> Tensor");
  library.def("hadamard_rotate_cuda(Tensor x, Tensor signs) -> Tensor");
  library.def("hadamard_unrotate_cuda(Tensor x, Tensor signs) -> Tensor");
  library.def(
      "hamming_topk_cuda(Tensor queries, Tensor codes, int k, Tensor? filter=None,"
      " int blocks=1024, bool tensor_cores=True) -> (Tensor distances, Tensor ids)");
  library.def(
      "range_search_cuda(Tensor queries, Tensor codes, int radius, int max_results,"
      " Tensor? filter=None, bool later_only=False, int blocks=1024, bool tensor_cores=True)"
      " -> (Tensor counts, Tensor distances, Tensor ids)");
  library.def(
      "range_search_csr_cuda(Tensor queries, Tensor codes, int radius, Tensor? filter=None,"
      " bool later_only=False, int blocks=1024, bool tensor_cores=True)"
      " -> (Tensor offsets, Tensor distances, Tensor ids)");
  library.def(
      "hamming_distance_cuda(Tensor a, Tensor b, int blocks=1024, bool tensor_cores=True)"
      " -> Tensor");
  library.def(
      "asymmetric_topk_cuda(Tensor queries, Tensor codes, int k, Tensor? filter=None,"
      " Tensor? scale=None, int blocks=1024) -> (Tensor scores, Tensor ids)");
  library.def(
      "gather_scores_cuda(Tensor queries, Tensor documents, Tensor ids, int metric) -> Tensor");
  library.def(
      "dense_topk_cuda(Tensor queries, Tensor documents, int k, int metric, Tensor? filter=None,"
      " int blocks=1024) -> (Tensor scores, Tensor ids)");
}
STABLE_TORCH_LIBRARY_IMPL(EMBLAS_CUDA_NAMESPACE, EMBLAS_CUDA_KEY, library) {
  library.impl("pack_sign_cuda", TORCH_BOX(&emblas::pack_sign_cuda));
  library.impl("unpack_planes_cuda", TORCH_BOX(&emblas::unpack_planes_cuda));
  library.impl("hadamard_rotate_cuda", TORCH_BOX(&emblas::hadamard_rotate_cuda));
  library.impl("hadamard_unrotate_cuda", TORCH_BOX(&emblas::hadamard_unrotate_cuda));
  library.impl("hamming_topk_cuda", TORCH_BOX(&emblas::hamming_topk_cuda));
  library.impl("range_search_cuda", TORCH_BOX(&emblas::range_search_cuda));
  library.impl("range_search_csr_cuda", TORCH_BOX(&emblas::range_search_csr_cuda));
  library.impl("asymmetric_topk_cuda", TORCH_BOX(&emblas::asymmetric_topk_cuda));
  library.impl("gather_scores_cuda", TORCH_BOX(&emblas::gather_scores_cuda));
  library.impl("dense_topk_cuda", TORCH_BOX(&emblas::dense_topk_cuda));
  library.impl("hamming_distance_cuda", TORCH_BOX(&emblas::hamming_distance_cuda));
}
