"""Mutants that no test can tell from the original, and why."""

from __future__ import annotations

# (kernel, mutated line): why no call can tell it from the original. The lines of CUDA C++ are those
# of the source with the mutated spot in angles, those of Triton are as changed.
_EDGE = "differs only where the length is exactly the epsilon"
_MORE_WORK = "the same result by more work"
_UNUSED = "the lanes that the mask hides are not used"
_FIRST = "hidden lanes hold index 0, which may be read, and their values are not used"
_NO_ROW = "the interpreter's garbage, -1 or huge, is no row; a GPU's may be one"
SURVIVORS: dict[tuple[str, str], str] = {
    ("_normalize", "values = tl.load(mean + row * dim + d, mask=d < dim)"): _UNUSED,
    ("_hash_keys", "id = tl.load(ids + i * stride, mask=i < count).to(tl.uint64)"): _UNUSED,
    ("_load_ids", "id = tl.load(ids + i * stride, mask=inside)"): _UNUSED,
    ("_grad_rows", "i = tl.load(sources + position, mask=inside)"): _UNUSED,
    ("_grad_rows", "bag = tl.load(bag_of + i, mask=inside)"): _UNUSED,
    ("_grad_rows", "bag = tl.load(bag_of + i, mask=inside == inside, other=0)"): _FIRST,
    (
        "_grad_rows",
        "gradient *= tl.load(weights + i, mask=inside == inside, other=0.0)[:, None]",
    ): _FIRST,
    ("_mean_gradient", "removed = tl.where(length >= _EPSILON, tl.sum(products, 0), 0.0)"): _EDGE,
    ("_mean_gradient", "dot = tl.where(length >= _EPSILON, 0.0, dot)"): "m . dm is 0 but for "
    "rounding, unless the length is at most the epsilon, to which it was raised",
    ("_pack_sign", "limit = tl.load(threshold + d, mask=d < dim)"): "hidden lanes are 0, which is "
    "not above the interpreter's garbage, NaN or huge; a GPU's may be negative",
    ("rows_of", "row = tl.load(ids + position, mask=there)"): _NO_ROW,
    ("_collect_chunk", "limit = tl.load(limits + query, mask=exists)"): _UNUSED,
    ("_collect_chunk", "ties_left = tl.load(ties + at, mask=exists)"): _UNUSED,
    ("_collect_chunk", "free = tl.load(starts + at, mask=exists)"): _UNUSED,
    (
        "_gather_scores",
        "row = tl.load(ids + query * candidates + place, mask=place < candidates)",
    ): _NO_ROW,
    (
        "_rotate",
        "values = tl.load(x + row * row_stride + d, mask=d < dim).to(ACCUMULATOR)",
    ): _UNUSED,
    ("_rotate", "sign = tl.load(signs + round * dim + d, mask=d < dim).to(ACCUMULATOR)"): _UNUSED,
    (
        "_rotate",
        "turned = tl.gather(values, tl.where(d <= dim, (d + first) % dim, d), 0)",
    ): _UNUSED,
    (
        "_rotate",
        "values = tl.gather(turned, tl.where(d <= dim, (d + dim - first) % dim, d), 0)",
    ): _UNUSED,
    (
        "_grad_queries",
        "j = tl.load(argmax + i * num_documents + n, mask=n < num_documents).to(tl.int64)",
    ): _NO_ROW,
    ("_grad_documents", "n = tl.load(document_of + j, mask=j < document_tokens)"): _UNUSED,
    ("_grad_documents", "owner = tl.load(owners + i, mask=there)"): _UNUSED,
    ("_grad_documents", "won = tl.load(at, mask=inside) == j[:, None]"): _NO_ROW,
    ("_grad_documents", "inside = (j <= document_tokens)[:, None] & there[None, :]"): "reads of "
    "the first document's column, whose sums are not stored",
    (
        "keep_best",
        "if tl.max(tl.max((number > limit[:, None]).to(tl.int32), 1), 0) >= 0:",
    ): _MORE_WORK,
    (
        "keep_best",
        "if tl.max(tl.max((number >= limit[:, None]).to(tl.int32), 1), 0) > 0:",
    ): _MORE_WORK,
    ("_attend", "if first > queries:"): _MORE_WORK,
    (
        "_attend",
        "highest = tl.minimum(first + BLOCK_M + 1 + (keys - queries) + right, keys - 1)",
    ): _MORE_WORK,
    (
        "_attend",
        "highest = tl.minimum(first + BLOCK_M - 1 + (keys + queries) + right, keys - 1)",
    ): _MORE_WORK,
    ("_token_gradients", "weight = tl.load(weights + t, mask=t < end)"): _UNUSED,
    ("_token_gradients", "weight = (t <= end).to(tl.float32)"): _UNUSED,
    ("_grad_weights", "bag = tl.load(bag_of + i, mask=i < count)"): _UNUSED,
    (
        "sum_chunks",
        "const bool whole = aligned && first + vector «<=» columns;",
    ): "the last columns are read one by one, " + _MORE_WORK,
    ("sum_chunks", "for (int i = 0; i «<» vector; ++i) {"): "beyond the tile there is no column",
    ("mean_gradients", "project = args.norm[b] «>» A(kNormalizeEpsilon);"): _EDGE,
}
