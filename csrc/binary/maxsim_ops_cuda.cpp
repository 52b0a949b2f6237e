// Late interaction as torch operators on CUDA tensors.
#include <tuple>

#include "binary/binary_cuda.h"
#include "common/cuda/device_call.h"

namespace emblas {
namespace {

constexpr char kTokens[] =
    "queries and documents must be tensors (tokens, dim) of floats, or (tokens, ceil(dim / 8)) of "
    "uint8 codes, with contiguous rows and less than 2^28 dimensions";

cuda::TokenRows token_rows(const DeviceCall& call, const Tensor& tokens, const Tensor& offsets,
                           const uint8_t* data) {
  call.check_vector<int32_t>(offsets, -1, "offsets must be contiguous int32 vectors");
  check(offsets.size(0) > 1 || (offsets.size(0) == 1 && tokens.size(0) == 0),
        "offsets must have an element, and two where there are tokens");
  const int64_t size = tokens.element_size();
  return {data,           tokens.stride(0) * size,     int(tokens.size(1) * size),
          tokens.size(0), call.read<int32_t>(offsets), offsets.size(0) - 1};
}
template <class T>
const uint8_t* bytes_of(const T* data) {
  return reinterpret_cast<const uint8_t*>(data);
}

// `tensor_cores` is for tests.
std::tuple<Tensor, Tensor> maxsim_cuda(const Tensor& queries, const Tensor& query_offsets,
                                       const Tensor& documents, const Tensor& document_offsets,
                                       int64_t dim, bool need_argmax, bool tensor_cores) {
  const DeviceCall call(queries);
  const bool bits = has_dtype<uint8_t>(documents);
  const bool same = queries.scalar_type() == documents.scalar_type();
  check(dim >= 0 && dim < int64_t(1) << 28, kTokens);
  for (const Tensor* tokens : {&queries, &documents}) {
    call.check_rows(*tokens, kTokens);
    check(tokens->size(1) == (has_dtype<uint8_t>(*tokens) ? (dim + 7) / 8 : dim), kTokens);
  }
  check(same || (bits && has_dtype<float>(queries)),
        "queries must have the dtype of documents, or be float32 if those are bits");
  const auto run = [&](auto query, auto document) {
    using Q = decltype(query);
    using D = decltype(document);
    using A = cuda::Score<Q>;
    constexpr bool codes = std::is_same_v<D, cuda::Bits>;
    const auto data = [&](const Tensor& tokens, auto element) {
      using T = decltype(element);
      using Stored = std::conditional_t<std::is_same_v<T, cuda::Bits>, uint8_t, T>;
      return bytes_of(call.read<Stored>(tokens));
    };
    static_assert(codes || !std::is_same_v<Q, cuda::Bits>);
    const auto wanted = token_rows(call, queries, query_offsets, data(queries, query));
    const auto given = token_rows(call, documents, document_offsets, data(documents, document));
    check(wanted.sets * given.sets < int64_t(1) << 31, "there must be less than 2^31 scores");
    const Tensor scores = call.empty<2>(kScalarType<A>, {wanted.sets, given.sets});
    const Tensor argmax =
        call.empty<2>(ScalarType::Int, {need_argmax ? wanted.count : 0, given.sets});
    int32_t* where = call.write<int32_t>(argmax);
    cuda::maxsim<Q, D>({wanted, given, dim, call.write<A>(scores), need_argmax ? where : nullptr},
                       tensor_cores, call.stream());
    return std::make_tuple(scores, argmax);
  };
  if (bits && same) return run(cuda::Bits{}, cuda::Bits{});
  if (bits) return run(float{}, cuda::Bits{});
  return visit_float(documents.scalar_type(), kTokens,
                     [&](auto element) { return run(element, element); });
}

std::tuple<Tensor, Tensor> maxsim_backward_cuda(const Tensor& grad, const Tensor& queries,
                                                const Tensor& query_offsets,
                                                const Tensor& documents,
                                                const Tensor& document_offsets,
                                                const Tensor& argmax) {
  const DeviceCall call(grad);
  const bool wide = has_dtype<double>(grad);
  const auto is_matrix = [&](const Tensor& x, int64_t rows, int64_t columns) {
    return call.holds(x) && x.dim() == 2 && x.is_contiguous() && x.size(0) == rows &&
           x.size(1) == columns;
  };
  check(queries.dim() == 2 && documents.dim() == 2 && query_offsets.dim() == 1 &&
            document_offsets.dim() == 1,
        kTokens);
  const int64_t tokens = queries.size(0), count = document_offsets.size(0) - 1;
  const int64_t dim = queries.size(1);
  for (const Tensor* x : {&grad, &queries, &documents}) {
    check(wide ? has_dtype<double>(*x) : has_dtype<float>(*x),
          "grad, queries and documents must be of one dtype, float32 or float64");
  }
  check(is_matrix(queries, tokens, dim) && is_matrix(documents, documents.size(0), dim) &&
            is_matrix(grad, query_offsets.size(0) - 1, count),
        "grad, queries and documents must be contiguous and fit together");
  check(dim < int64_t(1) << 22, "queries must have less than 2^22 dimensions");
  check(has_dtype<int32_t>(argmax) && is_matrix(argmax, tokens, count),
        "argmax must be the forward's second output");
  const auto run = [&](auto element) {
    using A = decltype(element);
    const A *query_values = call.read<A>(queries), *values = call.read<A>(documents);
    const auto wanted = token_rows(call, queries, query_offsets, bytes_of(query_values));
    const auto given = token_rows(call, documents, document_offsets, bytes_of(values));
    const Tensor grad_queries = call.empty<2>(grad.scalar_type(), {tokens, dim});
    const Tensor grad_documents = call.empty<2>(grad.scalar_type(), {given.count, dim});
    cuda::maxsim_backward<A>(
        {call.read<A>(grad), wanted, given, query_values, values, dim, call.read<int32_t>(argmax),
         call.write<A>(grad_queries), call.write<A>(grad_documents)},
        call.stream());
    return std::make_tuple(grad_queries, grad_documents);
  };
  return wide ? run(double{}) : run(float{});
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(EMBLAS_CUDA_NAMESPACE, library) {
  library.def(
      "maxsim_cuda(Tensor queries, Tensor query_offsets, Tensor documents,"
      " Tensor document_offsets, int dim, bool need_argmax, bool tensor_cores=True)"
      " -> (Tensor scores, Tensor argmax)");
  library.def(
      "maxsim_backward_cuda(Tensor grad, Tensor queries, Tensor query_offsets, Tensor documents,"
      " Tensor document_offsets, Tensor argmax) -> (Tensor grad_queries, Tensor grad_documents)");
}
STABLE_TORCH_LIBRARY_IMPL(EMBLAS_CUDA_NAMESPACE, EMBLAS_CUDA_KEY, library) {
  library.impl("maxsim_cuda", TORCH_BOX(&emblas::maxsim_cuda));
  library.impl("maxsim_backward_cuda", TORCH_BOX(&emblas::maxsim_backward_cuda));
}
