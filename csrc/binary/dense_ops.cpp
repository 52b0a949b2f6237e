// Exact search over vectors, rescoring and late interaction as torch operators on CPU tensors.
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "binary/arguments.h"
#include "binary/dense.h"
#include "common/isa.h"
#include "common/packed.h"
#include "common/tensor.h"

namespace emblas {
namespace {

constexpr char kDocuments[] =
    "documents must be float32, bfloat16, float16 or int8, queries float32";

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

template <class T>
Vectors<T> vectors_of(const Tensor& documents) {
  return {read<T>(documents), documents.stride(0), documents.size(0), documents.size(1)};
}

Queries check_dense(const Tensor& queries, const Tensor& documents, int64_t metric) {
  check_rows(queries, "queries must be a CPU tensor (queries, dim) with contiguous rows");
  check_rows(documents, "documents must be a CPU tensor (rows, dim) with contiguous rows");
  check(has_dtype<float>(queries), kDocuments);
  check(queries.size(1) == documents.size(1), "queries and documents must have the same dim");
  check(documents.size(0) < int64_t(1) << ScoreKey::kRowBits, "documents have too many rows");
  check(metric >= 0 && metric <= 2, "metric must be 0 (dot), 1 (cosine) or 2 (l2)");
  const Queries rows{read<float>(queries), queries.stride(0), queries.size(0)};
  for (int64_t q = 0; q < rows.count; ++q) {
    for (int64_t i = 0; i < queries.size(1); ++i) {
      check(std::isfinite(rows.data[q * rows.stride + i]), "queries must be finite");
    }
  }
  return rows;
}

std::tuple<Tensor, Tensor> dense_topk(const Tensor& queries, const Tensor& documents, int64_t k,
                                      int64_t metric, const std::optional<Tensor>& filter) {
  const Queries wanted = check_dense(queries, documents, metric);
  check(k >= 0, "k must not be negative");
  const Filter allowed = filter_of(filter, wanted.count, documents.size(0));
  Tensor scores = empty_cpu<2>(ScalarType::Float, {wanted.count, k});
  Tensor ids = empty_cpu<2>(ScalarType::Long, {wanted.count, k});
  visit_documents(documents.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (k == 0) return;
    write_topk<ScoreKey>(
        dense_search(wanted, vectors_of<T>(documents), k, Metric(metric), allowed, kParallel), k,
        -std::numeric_limits<float>::infinity(), write<float>(scores), write<int64_t>(ids));
  });
  return {scores, ids};
}

Tensor gather_scores_op(const Tensor& queries, const Tensor& documents, const Tensor& ids,
                        int64_t metric) {
  const Queries wanted = check_dense(queries, documents, metric);
  check(ids.is_cpu() && has_dtype<int64_t>(ids) && ids.dim() == 2 && ids.is_contiguous() &&
            ids.size(0) == wanted.count,
        "ids must be a contiguous int64 CPU tensor (queries, candidates)");
  const int64_t count = ids.size(1);
  const int64_t* id = read<int64_t>(ids);
  for (int64_t i = 0; i < wanted.count * count; ++i) {
    check(id[i] >= -1 && id[i] < documents.size(0), "ids must be rows of documents, or -1");
  }
  Tensor scores = empty_cpu<2>(ScalarType::Float, {wanted.count, count});
  visit_documents(documents.scalar_type(), [&](auto element) {
    using T = decltype(element);
    parallel_for(wanted.count, count * documents.size(1) * int64_t(sizeof(T)),
                 [&](int64_t first, int64_t last) {
                   gather_scores(wanted, vectors_of<T>(documents), id, count, Metric(metric), first,
                                 last, write<float>(scores));
                 });
  });
  return scores;
}

// --- late interaction ----------------------------------------------------------------------------

struct Tokens {
  const int32_t* offsets;
  int64_t count, total;
};
Tokens tokens_of(const Tensor& tokens, const Tensor& offsets, const char* message) {
  check_rows(tokens, message);
  check_vector<int32_t>(offsets, -1, message);
  check(offsets.size(0) > 0 &&
            valid_cu_seqlens(read<int32_t>(offsets), offsets.size(0) - 1, tokens.size(0)),
        message);
  return {read<int32_t>(offsets), offsets.size(0) - 1, tokens.size(0)};
}
constexpr char kQueryTokens[] =
    "query_offsets must start at 0, never decrease and end at the number of query tokens";
constexpr char kDocumentTokens[] =
    "document_offsets must start at 0, never decrease and end at the number of document tokens";

std::tuple<Tensor, Tensor> maxsim_op(const Tensor& queries, const Tensor& query_offsets,
                                     const Tensor& documents, const Tensor& document_offsets,
                                     int64_t dim, bool need_argmax) {
  const Tokens wanted = tokens_of(queries, query_offsets, kQueryTokens);
  const Tokens given = tokens_of(documents, document_offsets, kDocumentTokens);
  const bool query_bits = has_dtype<uint8_t>(queries), bits = has_dtype<uint8_t>(documents);
  check(!query_bits || bits, "queries may be bits only if documents are");
  check(queries.size(1) == (query_bits ? (dim + 7) / 8 : dim) &&
            documents.size(1) == (bits ? (dim + 7) / 8 : dim),
        "queries and documents must have dim values or bits");
  check(queries.is_contiguous(), "queries must be contiguous");
  const bool wide = has_dtype<double>(documents);
  check(queries.scalar_type() == documents.scalar_type() || (bits && has_dtype<float>(queries)),
        "queries must have the dtype of documents, or be float32 if those are bits");
  Tensor scores =
      empty_cpu<2>(wide ? ScalarType::Double : ScalarType::Float, {wanted.count, given.count});
  Tensor argmax = empty_cpu<2>(ScalarType::Int, {need_argmax ? wanted.total : 0, given.count});
  int32_t* where = need_argmax ? write<int32_t>(argmax) : nullptr;
  const int64_t average = given.total / std::max<int64_t>(given.count, 1) + 1;
  const auto for_documents = [&](auto body) {
    parallel_for(given.count, average * dim * std::max<int64_t>(wanted.total, 1), body);
  };
  if (query_bits) {
    const MaxSimCodes codes(codes_of(queries, kQueryTokens), codes_of(documents, kDocumentTokens),
                            dim);
    for_documents([&](int64_t first, int64_t last) {
      Tile tile = codes.tile();
      maxsim_documents(wanted.offsets, wanted.count, wanted.total, given.offsets, given.count,
                       first, last, write<float>(scores), where,
                       [&](int64_t begin, int64_t end, float* best, int32_t* at) {
                         codes.best(begin, end, tile, best, at);
                       });
    });
    return {scores, argmax};
  }
  const auto run = [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const Tensor values =
        has_dtype<A>(queries) ? queries : torch::stable::to(queries, kScalarType<A>);
    const MaxSimArgs<T> args{read<A>(values),
                             wanted.offsets,
                             wanted.count,
                             wanted.total,
                             dim,
                             read<T>(documents),
                             documents.stride(0),
                             given.offsets,
                             given.count,
                             write<A>(scores),
                             where};
    const MaxSimQueries<T> packed(args);
    for_documents([&](int64_t first, int64_t last) { packed.run(first, last); });
  };
  if (bits) {
    run(uint8_t{});
  } else {
    visit_float(documents.scalar_type(), "documents must be floating-point or uint8 codes", run);
  }
  return {scores, argmax};
}

// The token that won carries the gradient: of its query token and of itself.
template <class A>
void maxsim_gradient(const A* grad, const A* queries, const Tokens& wanted, const A* documents,
                     const Tokens& given, int64_t dim, const int32_t* argmax, A* grad_queries,
                     A* grad_documents) {
  const auto add = [dim](A* out, const A* x, A scale) {
    for (int64_t c = 0; c < dim; ++c) out[c] += scale * x[c];
  };
  std::vector<int64_t> owner(size_t(wanted.total));
  for (int64_t b = 0; b < wanted.count; ++b) {
    for (int64_t i = wanted.offsets[b]; i < wanted.offsets[b + 1]; ++i) owner[size_t(i)] = b;
  }
  const int64_t bytes = dim * int64_t(sizeof(A));
  parallel_for(wanted.total, given.count * bytes, [&](int64_t first, int64_t last) {
    std::fill(grad_queries + first * dim, grad_queries + last * dim, A(0));
    for (int64_t i = first; i < last; ++i) {
      for (int64_t n = 0; n < given.count; ++n) {
        const int32_t j = argmax[i * given.count + n];
        if (j < 0) continue;
        add(grad_queries + i * dim, documents + j * dim, grad[owner[size_t(i)] * given.count + n]);
      }
    }
  });
  parallel_for(given.count, wanted.total * bytes, [&](int64_t first, int64_t last) {
    std::fill(grad_documents + given.offsets[first] * dim,
              grad_documents + given.offsets[last] * dim, A(0));
    for (int64_t n = first; n < last; ++n) {
      for (int64_t i = 0; i < wanted.total; ++i) {
        const int32_t j = argmax[i * given.count + n];
        if (j < 0) continue;
        add(grad_documents + j * dim, queries + i * dim, grad[owner[size_t(i)] * given.count + n]);
      }
    }
  });
}

std::tuple<Tensor, Tensor> maxsim_backward(const Tensor& grad, const Tensor& queries,
                                           const Tensor& query_offsets, const Tensor& documents,
                                           const Tensor& document_offsets, const Tensor& argmax) {
  const Tokens wanted = tokens_of(queries, query_offsets, kQueryTokens);
  const Tokens given = tokens_of(documents, document_offsets, kDocumentTokens);
  const bool wide = has_dtype<double>(documents);
  const int64_t dim = documents.size(1);
  const auto is = [wide](const Tensor& tensor, int64_t rows, int64_t columns) {
    return tensor.is_cpu() && tensor.dim() == 2 && tensor.is_contiguous() &&
           tensor.size(0) == rows && tensor.size(1) == columns &&
           (wide ? has_dtype<double>(tensor) : has_dtype<float>(tensor));
  };
  check(is(grad, wanted.count, given.count) && is(queries, wanted.total, dim) &&
            is(documents, given.total, dim),
        "grad, queries and documents must be contiguous, of one dtype, float32 or float64");
  check(argmax.is_cpu() && has_dtype<int32_t>(argmax) && argmax.dim() == 2 &&
            argmax.is_contiguous() && argmax.size(0) == wanted.total &&
            argmax.size(1) == given.count,
        "argmax must be the forward's second output");
  const int32_t* where = read<int32_t>(argmax);
  for (int64_t i = 0; i < wanted.total; ++i) {
    for (int64_t n = 0; n < given.count; ++n) {
      const int32_t j = where[i * given.count + n];
      check(j == -1 || (j >= given.offsets[n] && j < given.offsets[n + 1]),
            "argmax must be the forward's second output");
    }
  }
  Tensor grad_queries = empty_cpu<2>(documents.scalar_type(), {wanted.total, dim});
  Tensor grad_documents = empty_cpu<2>(documents.scalar_type(), {given.total, dim});
  const auto run = [&](auto element) {
    using A = decltype(element);
    maxsim_gradient(read<A>(grad), read<A>(queries), wanted, read<A>(documents), given, dim, where,
                    write<A>(grad_queries), write<A>(grad_documents));
  };
  wide ? run(double{}) : run(float{});
  return {grad_queries, grad_documents};
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(emblas, library) {
  library.def(
      "dense_topk(Tensor queries, Tensor documents, int k, int metric, Tensor? filter=None)"
      " -> (Tensor scores, Tensor ids)");
  library.def("gather_scores(Tensor queries, Tensor documents, Tensor ids, int metric) -> Tensor");
  library.def(
      "maxsim(Tensor queries, Tensor query_offsets, Tensor documents, Tensor document_offsets,"
      " int dim, bool need_argmax) -> (Tensor scores, Tensor argmax)");
  library.def(
      "maxsim_backward(Tensor grad, Tensor queries, Tensor query_offsets, Tensor documents,"
      " Tensor document_offsets, Tensor argmax) -> (Tensor grad_queries, Tensor grad_documents)");
}
STABLE_TORCH_LIBRARY_IMPL(emblas, CPU, library) {
  library.impl("dense_topk", TORCH_BOX(&emblas::dense_topk));
  library.impl("gather_scores", TORCH_BOX(&emblas::gather_scores_op));
  library.impl("maxsim", TORCH_BOX(&emblas::maxsim_op));
  library.impl("maxsim_backward", TORCH_BOX(&emblas::maxsim_backward));
}
