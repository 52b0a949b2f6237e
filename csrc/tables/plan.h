// What the composed operators share: the parts checked and grouped into features and tables, ids
// checked against their vocabularies, lookups sorted by row.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "tables/compose.h"

namespace emblas {

// Rows of one table inside the flat array; several parts may use it.
struct Region {
  int64_t base, stride, width, rows;
  std::vector<int64_t> parts;  // their numbers, rising
  int64_t first_row = 0;       // among the rows of all regions: where row-wise state lies

  int64_t size() const { return (rows - 1) * stride + width; }
};

struct Plan {
  std::vector<Part> parts;
  std::vector<Feature> features;  // parts only; ids are set for each call
  std::vector<Region> regions;    // by base
  int64_t dim = 0, rows = 0, most_parts = 0, most_values = 0;  // of one feature

  // The parts from their integers; refuse(message) must not return.
  template <class Refuse>
  static Plan of(const std::vector<int64_t>& fields, int64_t table_size, const Refuse& refuse);

  // A gradient or an update treats tables one after the other: they must not share elements.
  bool has_disjoint_regions() const {
    for (size_t r = 1; r < regions.size(); ++r) {
      if (regions[r - 1].base + regions[r - 1].size() > regions[r].base) return false;
    }
    return true;
  }
};

template <class Refuse>
Plan Plan::of(const std::vector<int64_t>& fields, int64_t table_size, const Refuse& refuse) {
  const auto require = [&](bool condition, const char* message) {
    if (!condition) refuse(message);
  };
  Plan plan;
  const int64_t count = int64_t(fields.size()) / kPartFields;
  require(count > 0 && int64_t(fields.size()) == count * kPartFields,
          "parts must hold 12 integers for each part, at least one");
  plan.parts.resize(count);
  std::memcpy(plan.parts.data(), fields.data(), fields.size() * sizeof(int64_t));
  for (int64_t p = 0; p < count; ++p) {
    const Part& part = plan.parts[p];
    const Part* before = p > 0 ? &part - 1 : nullptr;
    const bool same_feature = before && part.feature == before->feature;
    require(same_feature || part.feature == (before ? before->feature + 1 : 0),
            "the features of parts must count up from 0");
    require(0 <= part.kind && part.kind < kKeyKinds, "unknown kind of key");
    const bool hashed = part.kind < 2;
    require(!hashed || (0 <= part.a && part.a <= UINT32_MAX && 0 <= part.b && part.b < 64),
            "a hashed part needs a seed of 0 to 2^32 - 1 and a key number of 0 to 63");
    require(hashed || (part.a >= 1 && part.b >= 0 && part.p >= 1),
            "a part needs a >= 1, b >= 0 and p >= 1");
    require(hashed || !part.is_signed, "only a hashed part can be signed");
    require(1 <= part.rows && part.rows < int64_t(1) << 31, "a part needs 1 to 2^31 - 1 rows");
    require(part.limit >= 0, "the limit of a part must not be negative");
    require(1 <= part.width && 1 <= part.stride && part.stride <= part.width && part.base >= 0 &&
                part.width <= table_size && part.base <= table_size - part.width &&
                part.rows - 1 <= (table_size - part.width - part.base) / part.stride,
            "the rows of a part must lie inside the table, at most their width apart");
    const bool same_slot = same_feature && part.column == before->column;
    require(same_slot ? part.width == before->width : part.column == plan.dim,
            "the slots of parts must stand side by side");
    if (!same_slot) plan.dim += part.width;
    if (!same_feature) plan.features.push_back({&part, 0, nullptr, 0, 0, 0, nullptr, nullptr});
    ++plan.features.back().num_parts;

    const auto region = std::find_if(plan.regions.begin(), plan.regions.end(), [&](auto& r) {
      return r.base == part.base && r.stride == part.stride && r.width == part.width;
    });
    if (region == plan.regions.end()) {
      plan.regions.push_back({part.base, part.stride, part.width, part.rows, {p}});
    } else {
      region->rows = std::max(region->rows, part.rows);
      region->parts.push_back(p);
    }
  }
  std::sort(plan.regions.begin(), plan.regions.end(),
            [](const Region& a, const Region& b) { return a.base < b.base; });
  for (Region& region : plan.regions) {
    region.first_row = plan.rows;
    plan.rows += region.rows;
  }
  for (const Feature& feature : plan.features) {
    require(feature.num_parts <= kMaxParts, "a feature can have at most 256 parts");
    int64_t values = 0;
    for (int64_t p = 0; p < feature.num_parts; ++p) values += feature.parts[p].width;
    plan.most_parts = std::max(plan.most_parts, feature.num_parts);
    plan.most_values = std::max(plan.most_values, values);
  }
  return plan;
}

// An id that some part of its feature can't tell apart from others, or null.
inline const int64_t* find_id_past_limit(const Feature& feature, const int64_t* padding_id,
                                         int64_t* limit) {
  *limit = 0;
  for (int64_t p = 0; p < feature.num_parts; ++p) {
    const int64_t own = feature.parts[p].limit;
    if (own > 0 && (*limit == 0 || own < *limit)) *limit = own;
  }
  if (*limit == 0) return nullptr;
  uint64_t bits = 0;  // the highest is set if one is outside: vectors can tell this
  for (int64_t i = 0; i < feature.count; ++i) {
    const uint64_t id = uint64_t(feature.ids[i * feature.step]);
    bits |= id | (uint64_t(*limit) - 1 - id);
  }
  for (int64_t i = 0; bits >> 63 && i < feature.count; ++i) {
    const int64_t* id = feature.ids + i * feature.step;
    if (uint64_t(*id) >= uint64_t(*limit) && !(padding_id && *id == *padding_id)) return id;
  }
  return nullptr;
}

// The lookups of one table, sorted by row; those of one row stay in the order of features, ids and
// parts. starts[u] is the first lookup of the u-th row in use, starts.back() the number of lookups.
struct SortedLookups {
  std::unique_ptr<Lookup[]> lookups;
  std::vector<int32_t> starts;

  int64_t rows() const { return int64_t(starts.size()) - 1; }
  int64_t row(int64_t u) const { return lookups[starts[u]].row; }
};

// Radix sort, least significant digit first. With a digit of 16 bits, most tables take one pass.
inline SortedLookups sort_by_row(const Plan& plan, const Region& region) {
  const auto for_lookups = [&](const auto& visit) {
    size_t from = 0;
    for (const Feature& feature : plan.features) {
      const int64_t first_part = feature.parts - plan.parts.data();
      size_t to = from;
      while (to < region.parts.size() && region.parts[to] < first_part + feature.num_parts) ++to;
      for (int64_t id = 0; from < to && id < feature.count; ++id) {
        const uint32_t* numbers = feature.numbers + id * feature.num_parts;
        if (numbers[0] == kNoRow) continue;
        for (size_t p = from; p < to; ++p) {
          const int64_t part = region.parts[p];
          visit(Lookup{numbers[part - first_part] & ~kSignBit, uint32_t(id), uint32_t(part)});
        }
      }
      from = to;
    }
  };
  constexpr int digit_bits = 16;
  int row_bits = 1;
  while (row_bits < 31 && region.rows > int64_t(1) << row_bits) ++row_bits;
  const int passes = (row_bits + digit_bits - 1) / digit_bits;
  const int bits = (row_bits + passes - 1) / passes;
  const uint32_t mask = (uint32_t(1) << bits) - 1;
  std::vector<uint32_t> next[2];  // position of each digit's next lookup
  for (int pass = 0; pass < passes; ++pass) next[pass].assign(size_t(mask) + 2, 0);
  int64_t count = 0;
  for_lookups([&](const Lookup& lookup) {
    for (int pass = 0; pass < passes; ++pass) ++next[pass][(lookup.row >> pass * bits & mask) + 1];
    ++count;
  });
  for (int pass = 0; pass < passes; ++pass) {
    for (size_t d = 1; d < next[pass].size(); ++d) next[pass][d] += next[pass][d - 1];
  }
  SortedLookups sorted{std::unique_ptr<Lookup[]>(new Lookup[count]), {}};
  for_lookups([&](const Lookup& lookup) { sorted.lookups[next[0][lookup.row & mask]++] = lookup; });
  if (passes == 2) {
    std::unique_ptr<Lookup[]> again(new Lookup[count]);
    for (int64_t l = 0; l < count; ++l) {
      const Lookup& lookup = sorted.lookups[l];
      again[next[1][lookup.row >> bits]++] = lookup;
    }
    sorted.lookups = std::move(again);
  }
  for (int64_t l = 0; l < count; ++l) {
    if (l == 0 || sorted.lookups[l].row != sorted.lookups[l - 1].row) {
      sorted.starts.push_back(int32_t(l));
    }
  }
  sorted.starts.push_back(int32_t(count));
  return sorted;
}

}  // namespace emblas
