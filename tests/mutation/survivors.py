"""Mutants that no test can tell from the original, and why."""

# ruff: noqa: E501 (kernels are quoted line by line)
from __future__ import annotations

# (kernel, mutated line): why no call can tell it from the original. The lines of CUDA C++ are those
# of the source with the mutated spot in angles, those of Triton are as changed.
_EDGE = "differs only where the length is exactly the epsilon"
_MORE_WORK = "the same result by more work"
_UNUSED = "the lanes that the mask hides are not used"
_FIRST = "hidden lanes hold index 0, which may be read, and their values are not used"
_HIDDEN = "hidden lanes read what exists, and their gradients are 0"
_NOT_OWN = "no part is an absent id's own"
_NO_ROW = "the interpreter's garbage, -1 or huge, is no row; a GPU's may be one"
_IDLE = "writes to idle slots, which nobody reads"
_HASH = "another hash of the row; any that tells rows apart will do"
_SAME = "both ways give the same where the two are equal"
_NOBODY = "the loop ends, or does nothing, at the last query"
_NO_COLUMN = "beyond the tile there is no column"
SURVIVORS: dict[tuple[str, str], str] = {
    ("_turn", "c = tl.load(cos + table, mask=paired)"): _UNUSED,
    ("_turn", "row = tl.load(position_ids + t, mask=here)"): _UNUSED,
    ("_turn", "s = sign * tl.load(sin + table, mask=paired)"): _UNUSED,
    ("_turn", "kept = tl.load(from_token + 2 * pairs + r[None, :], mask=rest)"): _UNUSED,
    ("_turn", "pair = tl.load(from_token + both[None, :], mask=both_paired)"): _UNUSED,
    ("_turn", "a = tl.load(from_token + p[None, :], mask=paired).to(tl.float32)"): _UNUSED,
    ("_turn", "b = tl.load(from_token + pairs + p[None, :], mask=paired).to(tl.float32)"): _UNUSED,
    (
        "load_some",
        "if (aligned && count «>=» vector) return simt::load_vector(from);",
    ): _MORE_WORK,
    (
        "store_some",
        "if (aligned && count «>=» vector) return simt::store_vector(to, x);",
    ): _MORE_WORK,
    (
        "place_of_piece",
        "return row * pieces + (piece ^ (row «/» rows_of_line % places));",
    ): "another permutation of the pieces of narrow rows, whose banks the emulator doesn't model",
    (
        "attend_tile",
        "if (first_query < 0 || first_query «>=» queries.count) return;",
    ): _MORE_WORK,
    **dict.fromkeys(
        (
            ("attend_tile", f"if ({condition}) {{")
            for condition in (
                "start «<» first_seen(position[1]) || start + tile_keys - 1 > last_seen(position[0])",
                "start < first_seen(position[1]) || start + tile_keys «-» 1 > last_seen(position[0])",
                "start < first_seen(position[1]) || start + tile_keys - 1 «>» last_seen(position[0])",
            )
        ),
        _MORE_WORK,
    ),
    ("_pool_parts", "tl.store(largest + to, most, mask=(first < end) == (first < end))"): _IDLE,
    (
        "_pool_parts",
        "tl.store(total + to, tl.sum(share, 0), mask=(first < end) == (first < end))",
    ): _IDLE,
    ("_pool_parts", "tl.store(largest + to, most, mask=first <= end)"): _IDLE,
    ("_pool_parts", "tl.store(total + to, tl.sum(share, 0), mask=first <= end)"): _IDLE,
    ("_pool_parts", "inside = (d < dim) & (first <= end)"): _IDLE,
    ("_merge_parts", "score = tl.load(largest + own + p * heads, mask=p < parts)"): _UNUSED,
    ("_merge_parts", "score = tl.load(largest + at, mask=p < parts)"): _UNUSED,
    ("_slopes", "inside = (d < dim) & (first <= end)"): _IDLE,
    ("_attention_gradients", "share = tl.load(shares + at, mask=present)"): _UNUSED,
    ("_attention_gradients", "slope = tl.load(slopes + at, mask=present)"): _UNUSED,
    (
        "_attention_gradients",
        "grad = tl.load(grad_out + (segment * heads + head) * dim + d, mask=d < dim)",
    ): _UNUSED,
    ("_attention_gradients", "query = tl.load(queries + head * dim + d, mask=d < dim)"): _UNUSED,
    (
        "normal_at",
        "low, high = ((zero + row).to(tl.uint32), (zero - (row >> 32)).to(tl.uint32))",
    ): "rows beyond 2^32 are not tested",
    (
        "normal_at",
        "low, high = ((zero + row).to(tl.uint32), (zero + (row << 32)).to(tl.uint32))",
    ): "rows beyond 2^32 are not tested",
    ("divisor_of", "return tl.where(length <= _EPSILON, _EPSILON, length)"): _EDGE,
    ("_finish_rows", "z = tl.load(x + row * row_stride + d, mask=d < dim) / divisor"): _UNUSED,
    ("_finish_rows", "low = tl.load(ranges + d, mask=d < dim)"): _UNUSED,
    ("_finish_rows", "span = tl.load(ranges + ranges_stride + d, mask=d < dim) - low"): _UNUSED,
    (
        "_finish_rows",
        "level = tl.where(level >= 0, tl.where(level < 255, level, 255.0), 0.0)",
    ): _SAME,
    (
        "_finish_rows",
        "level = tl.where(level > 0, tl.where(level <= 255, level, 255.0), 0.0)",
    ): _SAME,
    (
        "_finish_rows",
        "code = (level.to(tl.int32) + 128).to(tl.int8)",
    ): "the low byte of a sum of 128 and of a difference is one",
    ("_finish_gradient", "projection = tl.where(tl.sqrt_rn(square) < _EPSILON, 0.0, along)"): _EDGE,
    ("_finish_gradient", "gradient += tl.load(grad_x + at, mask=d < dim)"): _UNUSED,
    ("_powers", "value = tl.where(value <= epsilon, epsilon, value)"): _SAME,
    ("_gem_gradients", "log = tl.log2(tl.where(value <= epsilon, epsilon, value))"): _SAME,
    ("_fingerprints", "hash -= bits * (d.to(tl.uint64) * 2654435761 + 1)"): _HASH,
    ("_fingerprints", "hash += bits + (d.to(tl.uint64) * 2654435761 + 1)"): _HASH,
    (
        "_fingerprints",
        "tl.store(fingerprint + segment, tl.sum(hash, 0).to(tl.int64) + origin)",
    ): _HASH,
    ("_fingerprints", "hash += bits * (d.to(tl.uint64) * 2654435761 - 1)"): _HASH,
    ("_fingerprints", "hash += bits * (d.to(tl.uint64) + 2654435761 + 1)"): _HASH,
    ("_row_gradients", "contribution = tl.load(at, mask=d < dim)"): _UNUSED,
    ("_row_gradients", "clamped = tl.where(value <= epsilon, epsilon, value)"): _SAME,
    (
        "_row_gradients",
        "value = tl.load(x + at[:, None] + d[None, :], mask=wanted).to(tl.float32)",
    ): _UNUSED,
    ("_weight_gradients", "high = _count_up_to(starts, batch, begin + BLOCK_R + 1)"): _MORE_WORK,
    (
        "_weight_gradients",
        "contribution = tl.load(shared + segment * dim + d, mask=d < dim)",
    ): _UNUSED,
    (
        "_weight_gradients",
        "value = tl.load(x + at[:, None] + d[None, :], mask=wanted).to(tl.float32)",
    ): _UNUSED,
    ("sequences_of", "sequence = tl.load(sequences + t, mask=inside)"): _UNUSED,
    (
        "sequences_of",
        "begin = tl.load(cu_seqlens + sequence, mask=inside == inside, other=0).to(tl.int64)",
    ): _HIDDEN,
    ("sequences_of", "begin = tl.load(cu_seqlens + sequence, mask=inside).to(tl.int64)"): _UNUSED,
    (
        "sequences_of",
        "end = tl.load(cu_seqlens + sequence + 1, mask=inside == inside, other=0).to(tl.int64)",
    ): _HIDDEN,
    ("sequences_of", "end = tl.load(cu_seqlens + sequence + 1, mask=inside).to(tl.int64)"): _UNUSED,
    ("_choose", "id = tl.load(ids + t, mask=t < tokens)"): _UNUSED,
    ("_choose", "weight = tl.load(weights + t, mask=t < tokens)"): _UNUSED,
    (
        "_choose",
        "wanted = (t >= begin) & (t < end) & (tl.load(allowed + t, mask=t < tokens) != 0)",
    ): _UNUSED,
    ("_choose", "other_id = tl.load(ids + s, mask=s < last)[None, :]"): _UNUSED,
    ("_choose", "other = tl.load(weights + s, mask=s < last)[None, :]"): _UNUSED,
    ("_place", "id = tl.load(ids + t, mask=t < tokens)"): _UNUSED,
    (
        "_place",
        "mine = (tl.load(chosen + t, mask=t < tokens, other=0) != 0) & (t <= tokens)",
    ): "hidden lanes have chosen nothing",
    ("_place", "mine = (tl.load(chosen + t, mask=t < tokens) != 0) & (t < tokens)"): _UNUSED,
    ("_place", "other_id = tl.load(ids + s, mask=s < last)[None, :]"): _UNUSED,
    ("_place", "is_word = (tl.load(chosen + s, mask=s < last) != 0)[None, :]"): _UNUSED,
    ("_gradients_of_tokens", "pair = tl.load(order + i, mask=i < end)"): _UNUSED,
    (
        "_gradients_of_tokens",
        "gradient = tl.load(grad_out + pair, mask=(i < end) == (i < end), other=0.0)",
    ): _HIDDEN,
    (
        "_gradients_of_tokens",
        "gradient = tl.load(grad_out + pair, mask=i <= end, other=0.0)",
    ): _HIDDEN,
    ("_gradients_of_tokens", "inside = (i <= end)[:, None] & (d < dim)[None, :]"): _HIDDEN,
    ("_gradients_of_words", "gradient = tl.load(grad_out + pair, mask=v < vocab)"): _UNUSED,
    ("_gradients_of_words", "token = tl.load(argmax + pair, mask=v < vocab).to(tl.int64)"): _UNUSED,
    ("_vocab_max", "best += tl.load(bias + v, mask=v < vocab)"): _UNUSED,
    (
        "_vocab_max",
        "there = present[:, None] & (v <= vocab)[None, :]",
    ): "the word after the last is not stored",
    ("_normalize", "values = tl.load(mean + row * dim + d, mask=d < dim)"): _UNUSED,
    ("activate", "x = tl.where(x <= 0, 0.0, x)"): "0 becomes 0",
    (
        "activate",
        "if (activation > 0) x = x «<» 0 ? A(0) : x; // NaN stays",
    ): "0 becomes 0",
    (
        "store_columns",
        "for (int i = 0; i «<» vector; ++i) {",
    ): "a column behind the last of the block is not stored",
    ("_hash_keys", "id = tl.load(ids + i * stride, mask=i < count).to(tl.uint64)"): _UNUSED,
    ("_load_ids", "id = tl.load(ids + i * stride, mask=inside)"): _UNUSED,
    ("_grad_rows", "i = tl.load(sources + position, mask=inside)"): _UNUSED,
    ("_grad_rows", "bag = tl.load(bag_of + i, mask=inside)"): _UNUSED,
    ("_grad_rows", "bag = tl.load(bag_of + i, mask=inside == inside, other=0)"): _FIRST,
    (
        "_grad_rows",
        "gradient *= tl.load(weights + i, mask=inside == inside, other=0.0)[:, None]",
    ): _FIRST,
    (
        "_segment_gradients",
        "removed = tl.where(length >= _EPSILON, tl.sum(products, 0), 0.0)",
    ): _EDGE,
    ("_segment_gradients", "dot = tl.where(length >= _EPSILON, 0.0, dot)"): "m . dm is 0 but for "
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
    ("row_of", "row = tl.load(index + position, mask=mask).to(tl.int64)"): _UNUSED,
    (
        "_maximum",
        "row = row_of(index, first.to(tl.int64), found & (d <= dim), rows)",
    ): _UNUSED,
    (
        "_maximum",
        "tile = tl.load(x + at[:, None] + d[None, :], mask=wanted).to(tl.float32)",
    ): _UNUSED,
    (
        "_scatter",
        "row = tl.load(argmax + segment[:, None] * dim + d[None, :], mask=inside)",
    ): _UNUSED,
    ("_scatter", "same = tl.load(argmax + at, mask=d < dim)[None, :] == row"): _UNUSED,
    ("_scatter", "gradient = tl.load(grad_out + at, mask=d < dim).to(tl.float32)"): _UNUSED,
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
    ("_row_gradients", "sign = tl.load(numbers + lookup, mask=inside) & 1"): _UNUSED,
    ("_row_gradients", "slot = tl.load(part + _SLOT_FIRST, mask=inside)"): _HIDDEN,
    (
        "_row_gradients",
        "at = tl.multiple_of(bag * dim + tl.load(part + _COLUMN, mask=inside == inside, other=0), "
        "ALIGN)",
    ): _HIDDEN,
    (
        "_row_gradients",
        "at = tl.multiple_of(bag * dim + tl.load(part + _COLUMN, mask=inside), ALIGN)",
    ): _UNUSED,
    (
        "_weight_gradients",
        "size = tl.load(first_parts + feature + 1, mask=(i < count) == (i < count), other=0) - "
        "first",
    ): _FIRST,
    (
        "_weight_gradients",
        "size = tl.load(first_parts + feature + 1, mask=i < count) - first",
    ): _UNUSED,
    ("_weight_gradients", "slot = tl.load(part + _SLOT_FIRST, mask=own)"): _UNUSED,
    ("_weight_gradients", "column = tl.load(part + _COLUMN, mask=own)"): _UNUSED,
    ("_weight_gradients", "width = tl.load(part + _WIDTH, mask=own)"): _UNUSED,
    (
        "_weight_gradients",
        "size = tl.load(first_parts + feature + 1, mask=i <= count, other=0) - first",
    ): _FIRST,
    (
        "_weight_gradients",
        "values = _part_values(i, first + number, first, own, numbers, most_parts, parts, table, "
        "d, i <= count, ALIGN)",
    ): _NOT_OWN,
    (
        "_weight_gradients",
        "factor = _part_values(i, slot + k, first, other, numbers, most_parts, parts, table, "
        "d, i <= count, ALIGN)",
    ): _NOT_OWN,
    (
        "_row_gradients",
        "sign = tl.load(numbers + lookup, mask=inside == inside, other=0) & 1",
    ): _HIDDEN,
    (
        "_row_gradients",
        "factor *= tl.load(scale + feature * bags + bag, mask=inside == inside, other=0.0)",
    ): _HIDDEN,
    ("_row_gradients", "factor *= tl.load(at, mask=inside == inside, other=0.0)"): _HIDDEN,
    ("_row_gradients", "winner = tl.load(argmax + at[:, None] + d[None, :], mask=wanted)"): _UNUSED,
    (
        "_row_gradients",
        "slot = tl.load(part + _SLOT_FIRST, mask=inside == inside, other=0)",
    ): _HIDDEN,
    (
        "_places",
        "return (bag, feature, tl.load(first_parts + feature, mask=inside == inside, other=0))",
    ): _FIRST,
    ("_places", "return (bag, feature, tl.load(first_parts + feature, mask=inside))"): _UNUSED,
    (
        "_part_values",
        "found = tl.load(numbers + i * most_parts + number - first, mask=inside & own)",
    ): _UNUSED,
    (
        "_part_values",
        "found = tl.load(numbers + i * most_parts + number - first, mask=inside | own, other=0)",
    ): _HIDDEN,
    ("_part_values", "wanted = inside | own"): _HIDDEN,
    ("_part_values", "base = tl.load(part + _BASE, mask=wanted == wanted, other=0)"): _HIDDEN,
    ("_part_values", "base = tl.load(part + _BASE, mask=wanted)"): _HIDDEN,
    ("_part_values", "stride = tl.load(part + _STRIDE, mask=wanted == wanted, other=0)"): _HIDDEN,
    ("_part_values", "stride = tl.load(part + _STRIDE, mask=wanted)"): _HIDDEN,
    ("_part_values", "width = tl.load(part + _WIDTH, mask=wanted == wanted, other=0)"): _HIDDEN,
    ("_part_values", "width = tl.load(part + _WIDTH, mask=wanted)"): _HIDDEN,
    (
        "_part_values",
        "mask = wanted[:, None] & (d[None, :] <= tl.multiple_of(width, ALIGN)[:, None])",
    ): "the column after a row exists, and its gradient is not stored",
    ("_row_gradients", "lookup = tl.load(sources + place, mask=inside)"): _UNUSED,
    (
        "_row_gradients",
        "size = tl.load(part + _SLOT_SIZE, mask=inside == inside, other=1)",
    ): _HIDDEN,
    (
        "_slot_values",
        "own = weights + i * weights_per_id + (first + number + tl.load(tile + 2))",
    ): "weights of parts come with one feature only, whose first part is 0",
    ("_lookups", "of = tl.load(segment_of + i, mask=i < count) // bags"): _UNUSED,
    (
        "_lookups",
        "tl.store(numbers + at, 2 * row + (sign <= 0).to(tl.int64), mask=mine)",
    ): "a sign is 1 or -1",
    ("_places", "segment = tl.load(segment_of + i, mask=inside)"): _UNUSED,
    ("_linear", "key = tl.where(key > p, key - p, key)"): "twice a key is never an odd p",
    ("_rows_and_signs", "kind = tl.load(part - _KIND)"): "the kind is field 0",
    ("_load_ids", "id = tl.load(ids + i, mask=inside)"): _UNUSED,
    ("may_return", "byte = tl.load(at, mask=allowed).to(tl.int32)"): _UNUSED,
    ("_highest_of_chunk", "if tl.max(given.to(tl.int32), 0) >= 0:"): _MORE_WORK,
    ("_highest_of_chunk", "scores *= tl.load(scale + row, mask=given)[None, :]"): _UNUSED,
    ("_scan_tile", "if tl.max(given.to(tl.int32), 0) >= 0:"): _MORE_WORK,
    ("_collect_chunk", "if tl.max(tl.max(wanted.to(tl.int32), 1), 0) >= 0:"): _MORE_WORK,
    (
        "_first_tile",
        "first = tl.maximum((tl.min(query, 0) - 1) // BLOCK_N - chunk * tiles, 0)",
    ): _MORE_WORK,
    (
        "_attend",
        "highest = tl.minimum(first + BLOCK_M - 1 + (keys - queries) + right, keys + 1)",
    ): _MORE_WORK,
    (
        "load_values",
        "packed = tl.load(x + row[:, None] * row_stride + byte[None, :], mask=inside)",
    ): _UNUSED,
    (
        "_attend",
        "highest = tl.minimum(first + BLOCK_M + 1 + (keys - queries) + right, keys - 1)",
    ): _MORE_WORK,
    (
        "_attend",
        "highest = tl.minimum(first + BLOCK_M - 1 + (keys + queries) + right, keys - 1)",
    ): _MORE_WORK,
    ("_grad_queries", "if first > queries:"): _MORE_WORK,
    (
        "_grad_queries",
        "highest = tl.minimum(first + BLOCK_M - 1 + (keys - queries) + right, keys + 1)",
    ): _MORE_WORK,
    (
        "_grad_queries",
        "highest = tl.minimum(first + BLOCK_M + 1 + (keys - queries) + right, keys - 1)",
    ): _MORE_WORK,
    (
        "_grad_queries",
        "highest = tl.minimum(first + BLOCK_M - 1 + (keys + queries) + right, keys - 1)",
    ): _MORE_WORK,
    ("_grad_queries", "delta -= tl.load(grad_lse + row, mask=i < queries)"): _UNUSED,
    ("_grad_queries", "logarithm = tl.load(lse + row, mask=i < queries) * LOG2_E"): _UNUSED,
    ("_grad_keys", "if first > keys:"): _MORE_WORK,
    ("_grad_keys", "lowest = tl.maximum(first - (keys + queries) - right, 0)"): _MORE_WORK,
    (
        "_grad_keys",
        "highest = tl.minimum(first + BLOCK_N - 1 - (keys - queries) + left, queries + 1)",
    ): _MORE_WORK,
    (
        "_grad_keys",
        "highest = tl.minimum(first + BLOCK_N + 1 - (keys - queries) + left, queries - 1)",
    ): _MORE_WORK,
    ("_grad_weights", "bag = tl.load(bag_of + i, mask=i < count)"): _UNUSED,
    ("sum_chunks", "for (int i = 0; i «<» vector; ++i) {"): _NO_COLUMN,
    ("find_maxima", "for (int i = 0; i «<» vector; ++i) {"): _NO_COLUMN,
    ("dot_products", "for (int h = 0; h «<» heads; ++h) {"): _NOBODY,
    ("add_rows", "for (int h = 0; h «<» heads; ++h) {"): _NOBODY,
    (
        "attend",
        "for (int64_t p = part.range.begin; p «<» part.range.end; p += kAttendWarps) {",
    ): _MORE_WORK,
    ("attend", "A most = there && score «>» largest ? score : largest;"): _SAME,
    ("attend", "for (int flip = heads; flip «<» heads * kAttendWarps; flip *= 2) {"): _MORE_WORK,
    ("attend", "most = other «>» most ? other : most;"): _SAME,
    (
        "slopes",
        "for (int64_t p = part.range.begin; p «<» part.range.end; p += kAttendWarps) {",
    ): _MORE_WORK,
    ("hash_of", "return bits * (2654435761u «*» uint64_t(column) + 1);"): _HASH,
    ("hash_of", "return bits «*» (2654435761u * uint64_t(column) + 1);"): _HASH,
    ("hash_of", "return bits * (2654435761u * uint64_t(column) «+» 1);"): _HASH,
    (
        "divisor_of",
        "return length «<» A(kNormalizeEpsilon) ? A(kNormalizeEpsilon) : length;",
    ): _EDGE,
    (
        "sum_of_squares",
        "for (int64_t c = threadIdx.x * vector; c «<» dim; c += kFinishThreads * vector) {",
    ): _MORE_WORK,
    ("sum_of_squares", "if (aligned && c + vector «<=» dim) {"): _MORE_WORK,
    (
        "keep_fingerprint",
        "parts.fingerprint[b] = int64_t(hash) «-» parts.rows.segments.begins[b];",
    ): _HASH,
    (
        "finish_rows",
        "for (int64_t first = 0; first «<» prefix.dim; first += kFinishThreads) {",
    ): _MORE_WORK,
    (
        "finish_rows",
        "out[row * width + at] = int8_t((level «>» 0 ? level < 255 ? int(level) : 255 : 0) - 128);",
    ): _SAME,
    (
        "finish_rows",
        "out[row * width + at] = int8_t((level > 0 ? level «<» 255 ? int(level) : 255 : 0) - 128);",
    ): _SAME,
    (
        "finish_rows",
        "out[row * width + at] = int8_t((level > 0 ? level < 255 ? int(level) : 255 : 0) «-» 128);",
    ): "the low byte of a sum of 128 and of a difference is one",
    (
        "finish_gradients",
        "sqrt(square) «<=» A(kNormalizeEpsilon) ? A(0) : along / length / length / length;",
    ): _EDGE,
    (
        "normal_at",
        "random_words({{uint32_t(column / 4), stream, uint32_t(row), uint32_t(row «>>» 32)}}, seed);",
    ): "rows beyond 2^32 are not tested",
    (
        "gem_contributions",
        "for (int64_t tile = 0; tile «<» dim; tile += kTileColumns<T>) {",
    ): _MORE_WORK,
    ("gem_contributions", "const bool whole = aligned && first + vector «<=» columns;"): _MORE_WORK,
    ("gem_contributions", "hash «+=» hash_of(shared[i], tile + c);"): _HASH,
    ("gem_contributions", "hash += hash_of(shared[i], tile «+» c);"): _HASH,
    (
        "gem_contributions",
        "const A log = log2(wide «<» args.epsilon ? args.epsilon : wide);",
    ): _SAME,
    ("gem_contributions", "for (int i = 0; i «<» vector; ++i) {"): _NO_COLUMN,
    ("rank_spans", "bool before = begin «<» first;"): "what is equal is decided by the next line",
    (
        "rank_spans",
        "if (begin == first) before = end «<» last;",
    ): "what is equal is decided by the next line",
    (
        "rank_spans",
        "before = parts.fingerprint[other] «<» fingerprint;",
    ): "what is equal is decided by the next line",
    ("for_reached", "for (int64_t first = low; first «<» high; first += 32) {"): _MORE_WORK,
    (
        "write_row_gradients",
        "for (int64_t tile = 0; tile «<» dim; tile += 32 * vector) {",
    ): _MORE_WORK,
    (
        "write_weight_gradients",
        "for (int64_t tile = 0; tile «<» dim; tile += 32 * vector) {",
    ): _MORE_WORK,
    ("raise", "return exp2(power * log2(x «<» epsilon ? epsilon : x));"): _SAME,
    ("pool_contributions", "hash «+=» hash_of(shared, c);"): _HASH,
    (
        "sum_chunks",
        "for (int64_t begin = chunk.range.begin; begin «<» chunk.range.end; begin += kChunkRows) {",
    ): _MORE_WORK,
    (
        "pooled_range",
        "for (; weights && range.begin «<» range.end; range.begin += 32) {",
    ): _MORE_WORK,
    ("pooled_range", "for (; weights && range.begin «<» range.end; range.end -= 32) {"): _MORE_WORK,
    ("fold_tile", "const bool whole = aligned && first + vector «<=» columns;"): _MORE_WORK,
    ("fold_tile", "for (int i = 0; i «<» vector; ++i) {"): _NO_COLUMN,
    (
        "place_chosen",
        "if (i «>=» before(args.tokens)) columns[i] = at[i] = -1;",
    ): "the emulator's fresh memory holds -1",
    (
        "name_winners",
        "const bool wins = args.grad_out[pair] != 0 && token >= 0 && token «<» args.tokens;",
    ): "the number of tokens says that nobody wins",
    (
        "token_gradients_of_words",
        "const bool whole = aligned && first + vector «<=» columns;",
    ): _MORE_WORK,
    ("token_gradients_of_words", "for (int j = 0; j «<» vector; ++j) {"): _NO_COLUMN,
    ("Largest", "if (other.position «<» 0) return;"): "position 0 is the first warp's, into which "
    "the others are merged",
    (
        "Largest",
        "if (equal && other.position «<» position) position = other.position;",
    ): "two warps never hold the same position",
    ("sum_winners", "for (int i = 0; i «<» vector; ++i) {"): _NO_COLUMN,
    (
        "score_pairs",
        "if (other > best[r] || (other == best[r] && there «<» where[r])) {",
    ): "two lanes never hold the same token",
    ("pool_contributions", "project = args.norm[b] «>» A(kNormalizeEpsilon);"): _EDGE,
    (
        "pack_rows",
        "for (int flip = 1; flip < pieces; flip «*=» 2)",
    ): "flips of 1 and 3 join four lanes as those of 1 and 2 do",
    (
        "distance_of_score",
        "score = score == score ? score «+» 0.0f : -INFINITY;",
    ): "sums begin with +0, so no score is -0",
    ("Nearest", "const bool holds = before «<» wanted && wanted <= through;"): "of two lanes that "
    "hold then, the first is taken",
    (
        "count_bags",
        "if (lane_of_warp() == 0) scale[s] = A(1) / A(used «>» 0 ? used : 1);",
    ): "nobody asks for the scale of an empty bag",
    ("dot_slots", "if (numbers«[0]» != kNoRow) {"): "either all parts of an id have a row or none",
    (
        "slot_values",
        "const int own = part «-» composed.first_part[slot->feature];",
    ): "weights of parts come with one feature only, whose first part is 0",
    (
        "compose_bags",
        "const Segments segments{args.ids.offsets, composed.num_features «*» args.ids.bags, "
        "args.ids.count};",
    ): "only a search for a segment needs their number",
    (
        "compose_bags",
        "other > total[k] || (other == total[k] && theirs «<» winner[k]) || winner[k] < 0;",
    ): "two lanes never hold the same id, and -1 never wins",
    (
        "compose_bags",
        "if (theirs «<» 0 || !better) continue;",
    ): "id 0 belongs to the lanes that store: they never learn of it from others",
    (
        "compose_bags",
        "for (int k = 0; k «<» C::size; ++k) total[k] *= A(1) / A(used);",
    ): "a write past the array that rewriting hides from the check of bounds",
    (
        "Range",
        "__device__ bool in_pieces() const { return pieces() «>=» 2; }",
    ): "where a sum is cut changes its rounding only",
    **{
        (kernel, line): _MORE_WORK
        for kernel, line in (
            ("sum_chunks", "const bool whole = aligned && first + vector «<=» columns;"),
            ("scan_scores", "for (int offset = 0; offset «<» args.bytes; offset += kScoreBytes) {"),
            ("load_codes", "for (int j = 0; j «<» width - 1; ++j) {"),
            ("load_codes", "for (int j = 0; j < width «-» 1; ++j) {"),
            (
                "scan_codes",
                "const int pieces = left «<» kSlabBytes ? (left + 15) / 16 : kSlabPieces;",
            ),
            ("scan_codes", "} while (offset «<» args.bytes);"),
            ("scan_codes", "const int left = args.bytes «-» offset;"),
            ("scan_codes_by_mma", "const int left = args.bytes «-» offset;"),
            ("scan_dense", "const int left = args.bytes «-» offset;"),
            (
                "scan_dense",
                "const int pieces = left «<» kDenseBytes ? (left + 15) / 16 : kDensePieces;",
            ),
            ("scan_dense", "} while (offset «<» args.bytes);"),
            (
                "gather_rows",
                "for (int64_t c = lane * values; exists && c «<» args.dim; c += 32 * values) {",
            ),
            ("gather_rows", "if (aligned && c + values «<=» args.dim) {"),
            ("rotate_rows", "for (int c = thread * vector; c «<» dim; c += threads * vector) {"),
            ("rotate_rows", "if (aligned && c + vector «<=» dim) {"),
            (
                "scan_codes_by_mma",
                "const int pieces = left «<» kSlabBytes ? (left + kMmaBytes - 1) / kMmaBytes * 2 : "
                "kSlabPieces;",
            ),
            ("scan_codes_by_mma", "} while (offset «<» args.bytes);"),
            (
                "begin_lists",
                "for (int64_t first = 0; first «<» lists * queries; first += kSearchThreads) {",
            ),
            ("sort_found", "for (int64_t first = 0; first «<» count; first += 32) {"),
            ("sort_found", "for (int bit = 0; bit «<» kDigitBits; ++bit) {"),
            ("merge_lists", "for (unsigned at = 0; at «<» count; at += 32 * ahead) {"),
            (
                "rank_entries",
                "for (int64_t first = 0; first «<» list.keep; first += kSearchThreads) {",
            ),
            ("Nearest", "if (count_ «>» keep_ + (last ? 0 : kListSlack - 32)) shrink();"),
            ("Nearest", "for (int shift = (bits «-» 1) / 5 * 5; shift >= 0; shift -= 5) {"),
            ("Nearest", "for (int first = 0; first «<» count_; first += 32) {"),
            ("sum_through", "for (int step = 1; step «<» 32; step *= 2) {"),
            (
                "pack_rows",
                "for (int64_t first = 0; first «<» rows * row_pieces; first += kPackThreads) {",
            ),
            (
                "dot_slots",
                "for (int64_t tile = 0; tile * shape.tile<T>() «<» part.width; ++tile) {",
            ),
            ("slot_values", "for (int first = 0; first «<» size; first += together) {"),
            ("compose_ids", "if (first «>=» args.ids.bags) return;"),
            (
                "compose_bags",
                "for (int64_t first = range.begin; first «<» range.end; first += kSlotIds) {",
            ),
            (
                "compose_bags",
                "for (int n = lane_of_warp() / shape.lanes; n «<» kSlotIds; "
                "n += 32 / shape.lanes) {",
            ),
            (
                "HashedRows",
                "if (kKeys * group «<» hashed.num_hashes) own.rows = four_rows(hashed, id, group);",
            ),
            ("HashedRows", "for (int first = 0; first «<» hashed.num_hashes; first += kKeys) {"),
            ("look_up", "if (first «>=» rows.hashed.count) return;"),
            ("dot_rows", "if (first «>=» count) return;"),
            (
                "dot_rows",
                "for (int64_t tile = 0; tile * shape.tile<T>() «<» shape.dim; ++tile) {",
            ),
            (
                "sum_range",
                "for (int64_t first = range.begin; first «<» range.end; first += Source::kTile) {",
            ),
            ("sum_range", "for (int n = own; n «<» count + own; n += at_once) {"),
            ("sum_pieces", "if (slot «>=» slots) return;"),
            ("find_maxima", "const bool whole = aligned && first + vector «<=» columns;"),
            (
                "score_pairs",
                "const int pieces = int((args.dim + kPieceValues<Q> «-» 1) / kPieceValues<Q>);",
            ),
            ("score_pairs", "for (int64_t i = query.begin; i «<» query.end; i += kQueryTokens) {"),
            (
                "score_pairs",
                "for (int64_t j = document.begin; j «<» document.end; j += kDocumentTokens) {",
            ),
            ("score_pairs", "for (int piece = 0; piece «<» pieces; piece += kTilePieces) {"),
            ("score_pairs", "const int left = min(pieces «-» piece, kTilePieces);"),
            ("sum_winners", "for (int64_t c = warp * 32; c «<» candidates; c += warps * 32) {"),
            ("sum_winners", "if (aligned && first + vector «<=» columns) {"),
        )
    },
}
