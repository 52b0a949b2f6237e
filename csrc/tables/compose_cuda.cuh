// Composed lookups on a GPU; the formulas stand in compose.h.
//
// A warp owns a tile of columns of one slot, of a bag or (without offsets) of eight ids. It makes
// the row numbers of eight ids at once, one lane for each id and part, keeps them in shared memory,
// and combines the rows as it reads them, spread over lanes as in segment_sum_cuda.cuh. All slots
// of all features, of whatever width, are tiles of one grid; what the parts are stands in the
// kernel's arguments, so nothing is copied to the device.
//
// Bytes: ids once for each tile of columns, rows as often as caches miss, out once. A bag is added
// up by one warp, so the order of additions depends on its own length only.
#pragma once

#include "tables/compose_cuda.h"
#include "tables/segment_sum_cuda.cuh"

namespace emblas::cuda::tables {

inline constexpr int kSlotIds = 8;  // whose row numbers a warp makes at once

// (a id + b) mod p for p < 2^63 without overflow: Horner's rule over the bits of the id.
__device__ inline uint64_t linear_key(uint64_t id, uint64_t a, uint64_t b, uint64_t p) {
  const auto add = [p](uint64_t x, uint64_t y) { return x + y >= p ? x + y - p : x + y; };
  const uint64_t step = a % p;
  uint64_t key = 0;
  for (int bit = 63; bit >= 0; --bit) key = add(add(key, key), id >> bit & 1 ? step : 0);
  return add(key, b % p);
}

// The row of an id, with the sign bit.
__device__ inline uint32_t row_number(const ComposePart& part, int64_t signed_id) {
  const uint64_t id = uint64_t(signed_id);
  const auto kind = KeyKind(part.kind);
  if (kind == KeyKind::radix) return uint32_t(id / part.a % uint32_t(part.rows));
  if (kind == KeyKind::linear) {
    return uint32_t(linear_key(id, part.a, part.b, part.p) % uint32_t(part.rows));
  }
  const auto family = kind == KeyKind::murmur3 ? HashFamily::murmur3 : HashFamily::splitmix64;
  const auto words = four_keys(family, uint32_t(part.a), id, int(part.b / 4));
  const uint64_t word = part.b / 2 % 2 ? words.high : words.low;
  const uint32_t key = uint32_t(part.b % 2 ? word >> 32 : word);
  const Modulo modulo(uint32_t(part.rows), part.reciprocal);
  return uint32_t(modulo(uint64_t(key))) | (part.is_signed ? key & kSignBit : 0);
}

__device__ inline bool is_padding(const ComposedIds& ids, int64_t id) {
  return ids.has_padding && id == ids.padding_id;
}

template <class T>
__device__ const T* row_of(const T* table, const ComposePart& part, uint32_t number) {
  return table + part.base + int64_t(number & ~kSignBit) * part.stride;
}
template <class A>
__device__ A sign_of(uint32_t number) {
  return number & kSignBit ? A(-1) : A(1);
}

// The slot, by its first part, of a tile of columns, and the tile's number in it.
template <class T>
struct SlotTile {
  int part;
  int64_t tile;

  __device__ SlotTile(const Composed& composed, int64_t number) : part(0), tile(number) {
    for (;; part += composed.parts[part].slot_size) {
      const int64_t width = composed.parts[part].width;
      const int64_t columns = RowShape::of<T>(width).template tile<T>();
      const int64_t tiles = (width + columns - 1) / columns;
      if (tile < tiles) return;
      tile -= tiles;
    }
  }
};

// The row numbers of eight ids for the parts of one slot: of id n for part p at [p * kSlotIds + n].
using SlotNumbers = uint32_t[kMostParts * kSlotIds];

// Fills them, for ids `first` + n `step` below `end`; returns a bit for each id that counts. The
// warp's lanes must have read the ones of before.
__device__ inline unsigned slot_numbers(const ComposedIds& ids, const ComposePart* slot,
                                        int64_t first, int64_t step, int64_t end,
                                        SlotNumbers& numbers) {
  const int lane = lane_of_warp();
  const int64_t i = first + lane % kSlotIds * step;
  bool present = false;
  if (i < end) {
    const int64_t id = ids.ids[i];
    present = !is_padding(ids, id);
    for (int p = lane / kSlotIds; p < slot->slot_size; p += 32 / kSlotIds) {
      numbers[p * kSlotIds + lane % kSlotIds] = row_number(slot[p], id);
    }
  }
  __syncwarp();
  return __ballot_sync(simt::kAllLanes, present) & ((1u << kSlotIds) - 1);
}

// The slot of id i, number n of the eight, times its weight.
template <class T, class C>
__device__ void slot_values(const ComposeBagArgs<T>& args, const Composed& composed, int part,
                            const SlotNumbers& numbers, int n, int64_t i, const C& columns,
                            Accumulator<T> (&total)[C::size]) {
  using A = Accumulator<T>;
  constexpr int together = C::size > 4 ? 2 : 4;  // loads before the first of them is needed
  const ComposePart* slot = composed.parts + part;
  const int size = slot->slot_size;
  const bool product = args.combine == Combine::product;
  const int own = part - composed.first_part[slot->feature];
  for (int k = 0; k < C::size; ++k) total[k] = product ? A(1) : A(0);
  for (int first = 0; first < size; first += together) {
    A x[together][C::size] = {}, factor[together];
#pragma unroll
    for (int j = 0; j < together; ++j) {
      const int p = first + j;
      if (p >= size) break;
      const uint32_t number = numbers[p * kSlotIds + n];
      factor[j] = sign_of<A>(number);
      if (args.weights_per_id > 1) factor[j] *= args.weights[i * args.weights_per_id + own + p];
      columns.load(row_of(args.table, slot[p], number), x[j]);
    }
#pragma unroll
    for (int j = 0; j < together; ++j) {
      if (first + j >= size) break;
      for (int k = 0; k < C::size; ++k) {
        const A value = factor[j] * x[j][k];
        total[k] = product ? total[k] * value : total[k] + value;
      }
    }
  }
  A weight = args.weights_per_id == 1 ? args.weights[i] : A(1);
  if (args.combine == Combine::mean) weight /= A(size);
  for (int k = 0; k < C::size; ++k) total[k] *= weight;
}

// Grid (bags / (kWarps * kSlotIds), tiles of columns): one id of each feature for each bag.
template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads, 2)
    compose_ids(ComposeBagArgs<T> args, const __grid_constant__ Composed composed, T* out) {
  using C = Columns<T, aligned>;
  SIMT_SHARED(SlotNumbers, numbers, [kWarps]);
  const int warp = threadIdx.x / 32;
  const int64_t first = (int64_t(blockIdx.x) * kWarps + warp) * kSlotIds;
  if (first >= args.ids.bags) return;
  const SlotTile<T> tile(composed, blockIdx.y);
  const ComposePart* slot = composed.parts + tile.part;
  const RowShape shape = RowShape::of<T>(slot->width);
  const C columns(shape, tile.tile);
  const int64_t step = composed.num_features, start = first * step + slot->feature;
  const unsigned present = slot_numbers(args.ids, slot, start, step, args.ids.count, numbers[warp]);
  for (int n = lane_of_warp() / shape.lanes; n < kSlotIds; n += 32 / shape.lanes) {
    Accumulator<T> values[C::size] = {};
    if (present >> n & 1) {
      slot_values(args, composed, tile.part, numbers[warp], n, start + n * step, columns, values);
    }
    if (first + n < args.ids.bags) {
      columns.store(out + (first + n) * composed.dim + slot->column, values);
    }
  }
}

// Grid (bags / kWarps, tiles of columns).
template <class T, bool aligned, bool maximum>
__global__ void __launch_bounds__(kThreads, 2)
    compose_bags(ComposeBagArgs<T> args, const __grid_constant__ Composed composed, T* out,
                 int32_t* argmax) {
  using A = Accumulator<T>;
  using C = Columns<T, aligned>;
  SIMT_SHARED(SlotNumbers, numbers, [kWarps]);
  const int warp = threadIdx.x / 32;
  const int64_t bag = int64_t(blockIdx.x) * kWarps + warp;
  if (bag >= args.ids.bags) return;
  const SlotTile<T> tile(composed, blockIdx.y);
  const ComposePart* slot = composed.parts + tile.part;
  const RowShape shape = RowShape::of<T>(slot->width);
  const C columns(shape, tile.tile);
  const Segments segments{args.ids.offsets, composed.num_features * args.ids.bags, args.ids.count};
  const Range range = segments.range(slot->feature * args.ids.bags + bag);
  A total[C::size] = {};
  int32_t winner[C::size];
  for (int k = 0; k < C::size; ++k) winner[k] = -1;
  int64_t used = 0;
  for (int64_t first = range.begin; first < range.end; first += kSlotIds) {
    __syncwarp();  // the numbers of before have been read
    const unsigned present = slot_numbers(args.ids, slot, first, 1, range.end, numbers[warp]);
    used += __popc(present);
    for (int n = lane_of_warp() / shape.lanes; n < kSlotIds; n += 32 / shape.lanes) {
      if (!(present >> n & 1)) continue;
      A values[C::size];
      slot_values(args, composed, tile.part, numbers[warp], n, first + n, columns, values);
      for (int k = 0; k < C::size; ++k) {
        if constexpr (maximum) {
          if (winner[k] >= 0 && !(values[k] > total[k])) continue;
          total[k] = values[k];
          winner[k] = int32_t(first + n);
        } else {
          total[k] += values[k];
        }
      }
    }
  }
  for (int flip = shape.lanes; flip < 32; flip *= 2) {
    for (int k = 0; k < C::size; ++k) {
      const A other = __shfl_xor_sync(simt::kAllLanes, total[k], flip);
      if constexpr (maximum) {  // of equal ones the first
        const int32_t theirs = __shfl_xor_sync(simt::kAllLanes, winner[k], flip);
        const bool better =
            other > total[k] || (other == total[k] && theirs < winner[k]) || winner[k] < 0;
        if (theirs < 0 || !better) continue;
        total[k] = other;
        winner[k] = theirs;
      } else {
        total[k] += other;
      }
    }
  }
  if (lane_of_warp() >= shape.lanes) return;
  if (args.mode == BagMode::mean && used > 0) {
    for (int k = 0; k < C::size; ++k) total[k] *= A(1) / A(used);
  }
  const int64_t at = bag * composed.dim + slot->column;
  columns.store(out + at, total);
  if constexpr (maximum) {
    for (int k = 0; k < C::size; ++k) {
      const int64_t column = columns.first + k * columns.step;
      if (column < columns.dim) argmax[at + column] = winner[k];
    }
  }
}

}  // namespace emblas::cuda::tables
