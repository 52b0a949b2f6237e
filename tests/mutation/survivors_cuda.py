"""Mutants of the CUDA C++ kernels that no call can tell from the original, by the reason why.

Lines are those of the source, the mutated spot in angles.
"""

# ruff: noqa: E501 (kernels are quoted line by line)
from __future__ import annotations

# fmt: off
REASONS: dict[str, list[tuple[str, str]]] = {
    "the same result by more work": [
        ("HashedRows", "for (int first = 0; first «<» hashed.num_hashes; first += kKeys) {"),
        ("Nearest", "for (int first = 0; first «<» count_; first += 32) {"),
        ("Nearest", "for (int shift = (bits «-» 1) / 5 * 5; shift >= 0; shift -= 5) {"),
        ("Nearest", "if (count_ «>» keep_ + (last ? 0 : kListSlack - 32)) shrink();"),
        ("attend", "for (int flip = heads; flip «<» heads * kAttendWarps; flip *= 2) {"),
        ("attend", "for (int64_t p = part.range.begin; p «<» part.range.end; p += kAttendWarps) {"),
        ("attend_tile", "if (start «<» window.first_seen(position[1]) ||"),
        ("attend_tile", "start + tile_keys - 1 «>» window.last_seen(position[0])) {"),
        ("attend_tile", "start + tile_keys «-» 1 > window.last_seen(position[0])) {"),
        ("grad_keys_tile", "key < last_position - window.left || key + 8 > first_position «+» window.right;"),
        ("grad_keys_tile", "key < last_position - window.left || key + 8 «>» first_position + window.right;"),
        ("grad_keys_tile", "key < last_position «-» window.left || key + 8 > first_position + window.right;"),
        ("grad_keys_tile", "key «<» last_position - window.left || key + 8 > first_position + window.right;"),
        ("grad_keys_tile", "const int first_position = start + ahead, last_position = first_position + tile_queries «-» 1;"),
        ("grad_queries_tile", "const bool masked = start «<» window.first_seen(position[1]) ||"),
        ("grad_queries_tile", "start + tile_keys - 1 «>» window.last_seen(position[0]);"),
        ("grad_queries_tile", "start + tile_keys «-» 1 > window.last_seen(position[0]);"),
        ("sequence_of_slot", "int64_t low = 0, high = batch «-» 1;"),
        ("tile_of_slot", "if (first < 0 || first «>=» own.count) return {b, own, 0, 0};"),
        ("begin_lists", "for (int64_t first = 0; first «<» lists * queries; first += kSearchThreads) {"),
        ("compose_bags", "for (int n = lane_of_warp() / shape.lanes; n «<» kSlotIds; n += 32 / shape.lanes) {"),
        ("compose_bags", "for (int64_t first = range.begin; first «<» range.end; first += kSlotIds) {"),
        ("compose_ids", "if (first «>=» args.ids.bags) return;"),
        ("dot_rows", "for (int64_t tile = 0; tile * shape.tile<T>() «<» shape.dim; ++tile) {"),
        ("dot_rows", "if (first «>=» count) return;"),
        ("dot_slots", "for (int64_t tile = 0; tile * shape.tile<T>() «<» part.width; ++tile) {"),
        ("find_maxima", "const bool whole = aligned && first + vector «<=» columns;"),
        ("finish_rows", "for (int64_t first = 0; first «<» prefix.dim; first += kFinishThreads) {"),
        ("fold_tile", "const bool whole = aligned && first + vector «<=» columns;"),
        ("for_reached", "for (int64_t first = low; first «<» high; first += 32) {"),
        ("gather_rows", "for (int64_t c = lane * values; exists && c «<» args.dim; c += 32 * values) {"),
        ("gather_rows", "if (aligned && c + values «<=» args.dim) {"),
        ("gem_contributions", "const bool whole = aligned && first + vector «<=» columns;"),
        ("gem_contributions", "for (int64_t tile = 0; tile «<» dim; tile += kTileColumns<T>) {"),
        ("load_codes", "for (int j = 0; j < width «-» 1; ++j) {"),
        ("load_codes", "for (int j = 0; j «<» width - 1; ++j) {"),
        ("load_some", "if (aligned && count «>=» vector) return simt::load_vector(from);"),
        ("look_up", "if (first «>=» rows.hashed.count) return;"),
        ("merge_lists", "for (unsigned at = 0; at «<» count; at += 32 * ahead) {"),
        ("pack_rows", "for (int64_t first = 0; first «<» rows * row_pieces; first += kPackThreads) {"),
        ("pooled_range", "for (; weights && range.begin «<» range.end; range.begin += 32) {"),
        ("pooled_range", "for (; weights && range.begin «<» range.end; range.end -= 32) {"),
        ("rank_entries", "for (int64_t first = 0; first «<» list.keep; first += kSearchThreads) {"),
        ("rotate_rows", "for (int c = thread * vector; c «<» dim; c += threads * vector) {"),
        ("rotate_rows", "if (aligned && c + vector «<=» dim) {"),
        ("scan_codes", "const int left = args.bytes «-» offset;"),
        ("scan_codes", "const int pieces = left «<» kSlabBytes ? (left + 15) / 16 : kSlabPieces;"),
        ("scan_codes", "} while (offset «<» args.bytes);"),
        ("scan_codes_by_mma", "const int left = args.bytes «-» offset;"),
        ("scan_codes_by_mma", "const int pieces = left «<» kSlabBytes ? (left + kMmaBytes - 1) / kMmaBytes * 2 : kSlabPieces;"),
        ("scan_codes_by_mma", "} while (offset «<» args.bytes);"),
        ("scan_dense", "const int left = args.bytes «-» offset;"),
        ("scan_dense", "const int pieces = left «<» kDenseBytes ? (left + 15) / 16 : kDensePieces;"),
        ("scan_dense", "} while (offset «<» args.bytes);"),
        ("scan_scores", "for (int offset = 0; offset «<» args.bytes; offset += kScoreBytes) {"),
        ("score_pairs", "const int left = min(pieces «-» piece, kTilePieces);"),
        ("score_pairs", "const int pieces = int((args.dim + values «-» 1) / values) * together;"),
        ("score_pairs", "for (int piece = 0; piece «<» pieces; piece += kTilePieces) {"),
        ("score_pairs", "for (int64_t i = query.begin; i «<» query.end; i += kQueryTokens) {"),
        ("score_pairs", "for (int64_t j = document.begin; j «<» document.end; j += kDocumentTokens) {"),
        ("slopes", "for (int64_t p = part.range.begin; p «<» part.range.end; p += kAttendWarps) {"),
        ("slot_values", "for (int first = 0; first «<» size; first += together) {"),
        ("sort_found", "for (int bit = 0; bit «<» kDigitBits; ++bit) {"),
        ("sort_found", "for (int64_t first = 0; first «<» count; first += 32) {"),
        ("store_some", "if (aligned && count «>=» vector) return simt::store_vector(to, x);"),
        ("sum_chunks", "const bool whole = aligned && first + vector «<=» columns;"),
        ("sum_chunks", "for (int64_t begin = chunk.range.begin; begin «<» chunk.range.end; begin += kChunkRows) {"),
        ("sum_of_squares", "for (int64_t c = threadIdx.x * vector; c «<» dim; c += kFinishThreads * vector) {"),
        ("sum_of_squares", "if (aligned && c + vector «<=» dim) {"),
        ("sum_range", "for (int n = own; n «<» count + own; n += at_once) {"),
        ("sum_range", "for (int64_t first = range.begin; first «<» range.end; first += Source::kTile) {"),
        ("sum_through", "for (int step = 1; step «<» 32; step *= 2) {"),
        ("sum_winners", "for (int64_t c = warp * 32; c «<» candidates; c += warps * 32) {"),
        ("sum_winners", "if (aligned && first + vector «<=» columns) {"),
        ("token_gradients_of_words", "const bool whole = aligned && first + vector «<=» columns;"),
        ("write_row_gradients", "for (int64_t tile = 0; tile «<» dim; tile += 32 * vector) {"),
        ("write_weight_gradients", "for (int64_t tile = 0; tile «<» dim; tile += 32 * vector) {"),
    ],
    "another hash of the row; any that tells rows apart will do": [
        ("gem_contributions", "hash += hash_of(shared[i], tile «+» c);"),
        ("gem_contributions", "hash «+=» hash_of(shared[i], tile + c);"),
        ("hash_of", "return bits * (2654435761u * uint64_t(column) «+» 1);"),
        ("hash_of", "return bits * (2654435761u «*» uint64_t(column) + 1);"),
        ("hash_of", "return bits «*» (2654435761u * uint64_t(column) + 1);"),
        ("keep_fingerprint", "parts.fingerprint[b] = int64_t(hash) «-» parts.rows.segments.begins[b];"),
        ("pool_contributions", "hash «+=» hash_of(shared, m * dim + c);"),
    ],
    "beyond the tile there is no column": [
        ("find_maxima", "for (int i = 0; i «<» vector; ++i) {"),
        ("fold_tile", "for (int i = 0; i «<» vector; ++i) {"),
        ("gem_contributions", "for (int i = 0; i «<» vector; ++i) {"),
        ("sum_chunks", "for (int i = 0; i «<» vector; ++i) {"),
        ("sum_products", "for (int i = 0; i «<» 8; ++i) {"),
        ("sum_winners", "for (int i = 0; i «<» vector; ++i) {"),
        ("token_gradients_of_words", "for (int j = 0; j «<» vector; ++j) {"),
    ],
    "both ways give the same where the two are equal": [
        ("attend", "A most = there && score «>» largest ? score : largest;"),
        ("attend", "most = other «>» most ? other : most;"),
        ("finish_rows", "out[row * width + at] = int8_t((level > 0 ? level «<» 255 ? int(level) : 255 : 0) - 128);"),
        ("finish_rows", "out[row * width + at] = int8_t((level «>» 0 ? level < 255 ? int(level) : 255 : 0) - 128);"),
        ("gem_contributions", "const A log = log2(wide «<» args.epsilon ? args.epsilon : wide);"),
        ("raise", "return exp2(power * log2(x «<» epsilon ? epsilon : x));"),
    ],
    "differs only where the length is exactly the epsilon": [
        ("divisor_of", "return length «<» A(kNormalizeEpsilon) ? A(kNormalizeEpsilon) : length;"),
        ("finish_gradients", "sqrt(square) «<=» A(kNormalizeEpsilon) ? A(0) : along / length / length / length;"),
        ("pool_contributions", "project = args.norm[b] «>» A(kNormalizeEpsilon);"),
    ],
    "what is equal is decided by the next line": [
        ("rank_spans", "before = parts.fingerprint[other] «<» fingerprint;"),
        ("rank_spans", "bool before = begin «<» first;"),
        ("rank_spans", "if (begin == first) before = end «<» last;"),
    ],
    "the loop ends, or does nothing, at the last query": [
        ("add_rows", "for (int h = 0; h «<» heads; ++h) {"),
        ("dot_products", "for (int h = 0; h «<» heads; ++h) {"),
    ],
    "0 becomes 0": [
        ("activate", "if (activation > 0) x = x «<» 0 ? A(0) : x; // NaN stays"),
    ],
    "a column behind the last of the block is not stored": [
        ("store_columns", "for (int i = 0; i «<» vector; ++i) {"),
    ],
    "a write past the array that rewriting hides from the check of bounds": [
        ("compose_bags", "for (int k = 0; k «<» C::size; ++k) total[k] *= A(1) / A(used);"),
    ],
    "another permutation of the pieces of narrow rows, whose banks the emulator doesn't model": [
        ("place_of_piece", "return row * pieces + (piece ^ (row «/» rows_of_line % places));"),
    ],
    "either all parts of an id have a row or none": [
        ("dot_slots", "if (numbers«[0]» != kNoRow) {"),
    ],
    "flips of 1 and 3 join four lanes as those of 1 and 2 do": [
        ("pack_rows", "for (int flip = 1; flip < pieces; flip «*=» 2)"),
    ],
    "id 0 belongs to the lanes that store: they never learn of it from others": [
        ("compose_bags", "if (theirs «<» 0 || !better) continue;"),
    ],
    "of two lanes that hold then, the first is taken": [
        ("Nearest", "const bool holds = before «<» wanted && wanted <= through;"),
    ],
    "only a search for a segment needs their number": [
        ("compose_bags", "const Segments segments{args.ids.offsets, composed.num_features «*» args.ids.bags, args.ids.count};"),
    ],
    "position 0 is the first warp's, into which the others are merged": [
        ("Largest", "if (other.position «<» 0) return;"),
    ],
    "rows beyond 2^32 are not tested": [
        ("normal_at", "random_words({{uint32_t(column / 4), stream, uint32_t(row), uint32_t(row «>>» 32)}}, seed);"),
    ],
    "sums begin with +0, so no score is -0": [
        ("distance_of_score", "score = score == score ? score «+» 0.0f : -INFINITY;"),
    ],
    "the emulator's fresh memory holds -1": [
        ("place_chosen", "if (i «>=» before(args.tokens)) columns[i] = at[i] = -1;"),
    ],
    "the low byte of a sum of 128 and of a difference is one": [
        ("finish_rows", "out[row * width + at] = int8_t((level > 0 ? level < 255 ? int(level) : 255 : 0) «-» 128);"),
    ],
    "the number of tokens says that nobody wins": [
        ("name_winners", "const bool wins = args.grad_out[pair] != 0 && token >= 0 && token «<» args.tokens;"),
    ],
    "two lanes never hold the same id, and -1 never wins": [
        ("compose_bags", "other > total[k] || (other == total[k] && theirs «<» winner[k]) || winner[k] < 0;"),
    ],
    "two lanes never hold the same token": [
        ("score_pairs", "if (other > best[r] || (other == best[r] && there «<» where[r])) {"),
    ],
    "two warps never hold the same position": [
        ("Largest", "if (equal && other.position «<» position) position = other.position;"),
    ],
    "weights of parts come with one feature only, whose first part is 0": [
        ("slot_values", "const int own = part «-» composed.first_part[slot->feature];"),
    ],
    "where a sum is cut changes its rounding only": [
        ("Range", "__device__ bool in_pieces() const { return pieces() «>=» 2; }"),
    ],
}
