// Chosen rows of attention as torch operators on CPU tensors.
#include <algorithm>
#include <memory>
#include <vector>

#include "attention/attention_rows.h"
#include "attention/inputs.h"
#include "common/aligned.h"
#include "common/isa.h"
#include "common/packed.h"
#include "common/tensor.h"

namespace emblas {
namespace {

constexpr char kDtypes[] = "vectors must be float32, float64, bfloat16 or float16";

// Where the rows of chosen tokens lie: each meets the tokens of its own sequence.
struct Ranges {
  std::vector<int64_t> starts, lengths;

  Ranges(const Tensor& rows, const Tensor& cu_seqlens, int64_t tokens, int64_t max_length)
      : starts(rows.dim() == 1 ? rows.size(0) : 0), lengths(starts.size()) {
    check_vector<int64_t>(rows, -1, "rows must be a contiguous int64 CPU vector");
    check_vector<int32_t>(cu_seqlens, -1, "cu_seqlens must be a contiguous int32 CPU vector");
    const int64_t batch = cu_seqlens.size(0) - 1;
    const int32_t* offsets = read<int32_t>(cu_seqlens);
    check(batch >= 0 && valid_cu_seqlens(offsets, batch, tokens),
          "cu_seqlens must start at 0, never decrease and end at the number of tokens");
    bool inside = true, fits = true;
    for (size_t r = 0; r < starts.size(); ++r) {
      const int64_t token = read<int64_t>(rows)[r];
      inside &= token < tokens;
      if (token < 0 || token >= tokens) continue;  // nobody's
      const int32_t* end = std::upper_bound(offsets + 1, offsets + batch + 1, token);
      starts[r] = end[-1];
      lengths[r] = end[0] - end[-1];
      fits &= lengths[r] <= max_length;
    }
    check(inside, "rows must be less than the number of tokens");
    check(fits, "max_seqlen must be at least the longest sequence of a row");
  }
};

RowsShape shape_of(const Ranges& ranges, int64_t heads, int64_t key_heads, int64_t dim,
                   int64_t max_length) {
  check(key_heads > 0 ? heads % key_heads == 0 : heads == 0,
        "the heads of x must be a multiple of the heads of y");
  return {.heads = heads,
          .heads_per_group = key_heads > 0 ? heads / key_heads : 1,
          .dim = dim,
          .max_length = max_length,
          .starts = ranges.starts.data(),
          .lengths = ranges.lengths.data()};
}

template <class A>
void check_scores(const Tensor& s, int64_t rows, int64_t heads) {
  check(s.is_cpu() && has_dtype<A>(s) && s.dim() == 3 && s.is_contiguous() && s.size(0) == rows &&
            s.size(1) == heads,
        "s must be contiguous (rows, heads, max_length), of the accumulator's dtype");
}

int64_t row_bytes(const RowsShape& shape, int64_t rows, int64_t element) {
  int64_t total = 0;
  for (int64_t row = 0; row < rows; ++row) total += shape.lengths[row];
  return rows ? 1 + total / rows * shape.heads * shape.dim * element : 1;
}

Tensor row_dots(const Tensor& x, const Tensor& y, const Tensor& rows, const Tensor& cu_seqlens,
                int64_t max_length) {
  check_head_vectors(x, "x must be a CPU tensor (rows, heads, dim) of contiguous vectors");
  check_head_vectors(y, "y must be a CPU tensor (tokens, heads, dim) of contiguous vectors");
  const int64_t count = x.size(0), heads = x.size(1);
  check(x.scalar_type() == y.scalar_type() && x.size(2) == y.size(2) && rows.dim() == 1 &&
            rows.size(0) == count && max_length >= 0,
        "x and y must have one dtype and one dim, and x a vector for each row");
  const Ranges ranges(rows, cu_seqlens, y.size(0), max_length);
  const RowsShape shape = shape_of(ranges, heads, y.size(1), x.size(2), max_length);
  return visit_float(x.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    Tensor s = empty_cpu<3>(kScalarType<A>, {count, heads, max_length});
    A* const scores = write<A>(s);
    parallel_for(count, row_bytes(shape, count, sizeof(T)), [&](int64_t first, int64_t last) {
      kernels<AttentionRowsKernels>().of(element).dots(shape, head_vectors<T>(x),
                                                       head_vectors<T>(y), scores, first, last);
    });
    return s;
  });
}

Tensor row_sums(const Tensor& s, const Tensor& y, const Tensor& rows, const Tensor& cu_seqlens) {
  check_head_vectors(y, "y must be a CPU tensor (tokens, heads, dim) of contiguous vectors");
  check(s.dim() == 3 && rows.dim() == 1 && rows.size(0) == s.size(0),
        "s must be (rows, heads, max_length)");
  const int64_t count = s.size(0), heads = s.size(1), dim = y.size(2);
  const Ranges ranges(rows, cu_seqlens, y.size(0), s.size(2));
  const RowsShape shape = shape_of(ranges, heads, y.size(1), dim, s.size(2));
  return visit_float(y.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    check_scores<A>(s, count, heads);
    Tensor x = empty_cpu<3>(y.scalar_type(), {count, heads, dim});
    const auto vectors = new_head_vectors<T>(x);
    parallel_for(count, row_bytes(shape, count, sizeof(T)), [&](int64_t first, int64_t last) {
      const AlignedArray<A> scratch = aligned_array<A>(heads * dim);
      kernels<AttentionRowsKernels>().of(element).sums(shape, read<A>(s), head_vectors<T>(y),
                                                       vectors, first, last, scratch.get());
    });
    return x;
  });
}

Tensor row_outer(const Tensor& s, const Tensor& x, const Tensor& rows, const Tensor& cu_seqlens,
                 int64_t tokens, int64_t key_heads) {
  check_head_vectors(x, "x must be a CPU tensor (rows, heads, dim) of contiguous vectors");
  const int64_t count = x.size(0), heads = x.size(1), dim = x.size(2);
  check(s.dim() == 3 && tokens >= 0 && key_heads >= 0 && rows.dim() == 1 && rows.size(0) == count,
        "s must be (rows, heads, max_length), and x a vector for each row");
  const Ranges ranges(rows, cu_seqlens, tokens, s.size(2));
  const RowsShape shape = shape_of(ranges, heads, key_heads, dim, s.size(2));
  return visit_float(x.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    check_scores<A>(s, count, heads);
    Tensor y = empty_cpu<3>(kScalarType<A>, {tokens, key_heads, dim});
    const auto vectors = new_head_vectors<A>(y);
    std::fill(vectors.data, vectors.data + y.numel(), A(0));
    // Rows may meet the same tokens: a task owns heads, and takes all rows in their order.
    parallel_for(key_heads,
                 count * row_bytes(shape, count, sizeof(A)) / std::max<int64_t>(1, key_heads),
                 [&](int64_t first, int64_t last) {
                   kernels<AttentionRowsKernels>().of(element).outer(
                       shape, read<A>(s), head_vectors<T>(x), count, vectors, first, last);
                 });
    return y;
  });
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(emblas, library) {
  library.def(
      "row_dots(Tensor x, Tensor y, Tensor rows, Tensor cu_seqlens, SymInt max_length) -> Tensor");
  library.def("row_sums(Tensor s, Tensor y, Tensor rows, Tensor cu_seqlens) -> Tensor");
  library.def(
      "row_outer(Tensor s, Tensor x, Tensor rows, Tensor cu_seqlens, SymInt tokens,"
      " SymInt key_heads) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(emblas, CPU, library) {
  library.impl("row_dots", TORCH_BOX(&emblas::row_dots));
  library.impl("row_sums", TORCH_BOX(&emblas::row_sums));
  library.impl("row_outer", TORCH_BOX(&emblas::row_outer));
}
