// Shadow memory: what may be touched, what has been written, and who touched it last.
//
// GCC's -fsanitize=thread puts a call before every load and store of the kernels. Those calls end
// here and not in its own run-time library.
#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <unordered_map>
#include <utility>

#include "internal.h"

extern "C" const char __ehdr_start, _end;  // this library in memory, by the linker

namespace emblas::simt::engine {
namespace {

struct Access {
  uint32_t stamp;  // 0: never
  uint16_t thread, clock;
};
enum : uint8_t { kAddressable = 1, kInitialized = 2, kAtomic = 4 };
// Of one byte: its last writer and the last two threads that read it since.
struct Cell {
  Access write, read[2];
  uint8_t flags;
};
constexpr uintptr_t kPage = 4096;
struct Page {
  Cell cells[kPage];
};

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t last_number = ~uintptr_t(0);
Page* last_page;

Page* find_page(uintptr_t number) {
  if (number == last_number) return last_page;
  const auto found = pages.find(number);
  if (found == pages.end()) return nullptr;
  last_number = number;
  return last_page = found->second.get();
}
Cell* find_cell(uintptr_t address) {
  Page* page = find_page(address / kPage);
  return page ? &page->cells[address % kPage] : nullptr;
}
void set_cells(uintptr_t begin, size_t bytes, uint8_t flags) {
  for (uintptr_t a = begin; a < begin + bytes; ++a) {
    if (!find_page(a / kPage)) pages[a / kPage] = std::make_unique<Page>();
    Cell& cell = *find_cell(a);
    // Registered twice (one tensor as two arguments): what was initialized stays so.
    const uint8_t before = cell.flags & kAddressable ? cell.flags : 0;
    cell = {};
    cell.flags = uint8_t(flags | before);
  }
}

struct Range {
  uintptr_t begin;
  size_t bytes;
  const void* tag;
  std::string name;
  uintptr_t end() const { return begin + bytes; }
};
void clear_cells(const Range& range) {
  for (uintptr_t a = range.begin; a < range.end(); ++a) {
    if (Cell* cell = find_cell(a)) *cell = {};
  }
}
std::vector<Range> buffers;  // global memory
std::vector<Range> arrays;   // shared memory of the running block, the dynamic part first

// Shared memory, with a gap after each array.
constexpr size_t kGap = 128;
constexpr size_t kArenaBytes = kSharedLimit + 64 * kGap;
alignas(128) char arena[kArenaBytes];
size_t arena_used, shared_bytes;

bool in_arena(uintptr_t address) {
  return address - reinterpret_cast<uintptr_t>(arena) < kArenaBytes;
}

void* allocate(const void* tag, size_t bytes, const std::string& name) {
  shared_bytes += bytes;
  char* begin = arena + arena_used;
  arena_used += (bytes + kGap - 1) / kGap * kGap + kGap;
  std::memset(begin, 0xff, bytes);  // NaN, for what the checks can't see
  set_cells(reinterpret_cast<uintptr_t>(begin), bytes, kAddressable);
  arrays.push_back({reinterpret_cast<uintptr_t>(begin), bytes, tag, name});
  return begin;
}

// "4 bytes past the end of input 2 (400 bytes)"
std::string describe(uintptr_t address) {
  const std::vector<Range>& ranges = in_arena(address) ? arrays : buffers;
  const Range* nearest = nullptr;
  uint64_t distance = ~uint64_t(0);
  for (const Range& range : ranges) {
    const uint64_t d = address < range.begin   ? range.begin - address
                       : address < range.end() ? 0
                                               : address - range.end();
    if (d < distance) nearest = &range, distance = d;
  }
  if (!nearest || distance > 1 << 30) return "far from all memory that the kernel was given";
  std::string text;
  if (address < nearest->begin) {
    text = std::to_string(distance) + " bytes before ";
  } else if (address < nearest->end()) {
    text = "byte " + std::to_string(address - nearest->begin) + " of ";
  } else {
    text = std::to_string(distance) + " bytes past the end of ";
  }
  return text + nearest->name + " (" + std::to_string(nearest->bytes) + " bytes)";
}

const char* verb(Kind kind) {
  return kind == Kind::read ? "read" : kind == Kind::write ? "write" : "atomic";
}

[[noreturn]] void report(const char* problem, uintptr_t address, size_t bytes, Kind kind,
                         const std::string& more, const void* pc, const Site* site) {
  char head[160];
  std::snprintf(head, sizeof head, "%s: %zu-byte %s of %s memory at 0x%" PRIxPTR ", ", problem,
                bytes, verb(kind), in_arena(address) ? "shared" : "global", address);
  stop(head + describe(address) + more, pc, site);
}

// Did `before` happen before what the running thread does now, whatever the schedule?
bool ordered(const Access& before) {
  if (!options.check_races) return true;
  if (before.stamp < launch_stamp) return true;  // never, or an earlier launch
  if (before.stamp < block_stamp) return false;  // another block
  if (before.stamp < stamp) return true;         // a block barrier lies between
  if (before.thread == current->index) return true;
  return before.thread / 32 == current->index / 32 &&
         before.clock <= current->clock[before.thread % 32];
}

std::string other(const char* what, const Access& access) {
  std::string text = std::string("; unordered with a ") + what + " by ";
  if (access.stamp < block_stamp) text += "another block, ";
  return text + "thread " + std::to_string(access.thread) + " (linear)";
}

// Bytes of one launch. Asked for: global read, global written, shared read, shared written.
// Distinct: global read, global written: what has to come from or go to memory at least.
struct Traffic {
  const void* kernel;
  uint64_t bytes[6];
  uint64_t operations[2];  // by Operation
};
std::deque<Traffic> launches;  // not yet taken
uint64_t* traffic;             // of the launch in progress

void count(uintptr_t address, size_t bytes, Kind kind) {
  const int base = in_arena(address) ? 2 : 0;
  if (kind != Kind::write) traffic[base] += bytes;
  if (kind != Kind::read) traffic[base + 1] += bytes;
}
void count_distinct(uintptr_t address, const Cell& before, Kind kind) {
  if (in_arena(address) || before.write.stamp >= launch_stamp) return;
  if (kind != Kind::read) ++traffic[5];
  if (kind != Kind::write && before.read[0].stamp < launch_stamp) ++traffic[4];
}

void check(uintptr_t address, size_t bytes, Kind kind, const void* pc, const Site* site) {
  const Access now{stamp, current->index, current->clock[current->index % 32]};
  for (uintptr_t a = address; a < address + bytes; ++a) {
    Cell* cell = find_cell(a);
    if (!cell || !(cell->flags & kAddressable)) {
      report("out of bounds", a, bytes, kind, "", pc, site);
    }
    if (kind != Kind::write && !(cell->flags & kInitialized) && options.check_uninitialized) {
      report("uninitialized", a, bytes, kind, "", pc, site);
    }
    const bool both_atomic = kind == Kind::atomic && cell->flags & kAtomic;
    if (!both_atomic && !ordered(cell->write)) {
      report("data race", a, bytes, kind, other("write", cell->write), pc, site);
    }
    count_distinct(a, *cell, kind);
    if (kind == Kind::read) {
      if (cell->read[0].thread != now.thread || cell->read[0].stamp < block_stamp) {
        cell->read[1] = cell->read[0];
      }
      cell->read[0] = now;
      continue;
    }
    for (const Access& read : cell->read) {
      if (!ordered(read)) report("data race", a, bytes, kind, other("read", read), pc, site);
    }
    cell->write = now;
    cell->read[0] = cell->read[1] = {};
    cell->flags |= kInitialized;
    cell->flags = kind == Kind::atomic ? cell->flags | kAtomic : cell->flags & ~kAtomic;
  }
}

bool is_argument(uintptr_t address) {
  return address - reinterpret_cast<uintptr_t>(running->call) < running->call_bytes;
}
bool is_constant(uintptr_t address) {  // constants, and the indices in `self`
  return address >= reinterpret_cast<uintptr_t>(&__ehdr_start) &&
         address < reinterpret_cast<uintptr_t>(&_end) && !in_arena(address);
}

void checked(uintptr_t address, size_t bytes, size_t align, Kind kind, const void* pc,
             const Site* site) {
  if (on_fiber_stack(address) ||
      (kind == Kind::read && (is_argument(address) || is_constant(address)))) {
    return;
  }
  if (address % align) report("misaligned", address, bytes, kind, "", pc, site);
  check(address, bytes, kind, pc, site);
  count(address, bytes, kind);
  if (options.preemption > 0 && double(random_bits() >> 11) * 0x1p-53 < options.preemption) yield();
}

void mark(const void* data, const int64_t* sizes, const int64_t* strides, int64_t dims,
          size_t element_bytes, uint8_t flags) {
  if (dims == 0) {
    set_cells(reinterpret_cast<uintptr_t>(data), element_bytes, flags);
  } else {
    for (int64_t i = 0; i < sizes[0]; ++i) {
      mark(static_cast<const char*>(data) + i * strides[0] * int64_t(element_bytes), sizes + 1,
           strides + 1, dims - 1, element_bytes, flags);
    }
  }
}

}  // namespace

void begin_launch_memory(const Kernel& kernel) {
  constexpr size_t most = 1000;  // nobody may be asking
  if (launches.size() == most) launches.pop_front();
  launches.push_back({kernel.address, {}, {}});
  traffic = launches.back().bytes;
}

void count_operations(Operation operation, uint64_t count) {
  launches.back().operations[int(operation)] += count;
}

void begin_block_memory(size_t dynamic_bytes) {
  for (const Range& array : arrays) clear_cells(array);
  arrays.clear();
  arena_used = shared_bytes = 0;
  allocate(nullptr, dynamic_bytes, "the dynamic shared memory");
}

void* dynamic_shared() { return arena; }

void* shared_array(const void* tag, size_t bytes, const char* name) {
  in_engine = true;
  void* found = nullptr;
  for (const Range& array : arrays) {
    if (array.tag == tag) found = reinterpret_cast<void*>(array.begin);
  }
  if (!found) {
    const size_t fixed = shared_bytes - arrays[0].bytes + bytes;
    if (fixed > kStaticSharedLimit || shared_bytes + bytes > kSharedLimit) {
      stop("shared memory limit exceeded: " + std::to_string(fixed) + " bytes static (at most " +
               std::to_string(kStaticSharedLimit) + "), " + std::to_string(shared_bytes + bytes) +
               " in all (at most " + std::to_string(kSharedLimit) + "), with array " + name,
           nullptr, nullptr);
    }
    found = allocate(tag, bytes, name);
  }
  in_engine = false;
  return found;
}

void access(const void* address, size_t bytes, size_t align, Kind kind, const Site& site) {
  in_engine = true;
  checked(reinterpret_cast<uintptr_t>(address), bytes, align, kind, nullptr, &site);
  in_engine = false;
}

// The copy happens at the wait. Until then the target holds NaN and counts as never written, so a
// missing wait is seen; the write is the waiting thread's, so a missing barrier is seen too.
void copy_async(void* to, const void* from, size_t bytes, size_t valid_bytes, const Site& site) {
  if (valid_bytes) access(from, valid_bytes, bytes, Kind::read, site);
  access(to, bytes, bytes, Kind::write, site);
  in_engine = true;
  std::memset(to, 0xff, bytes);
  for (size_t i = 0; i < bytes; ++i) {
    find_cell(reinterpret_cast<uintptr_t>(to) + i)->flags &= ~kInitialized;
  }
  current->copies.push_back({to, from, bytes, valid_bytes, current->groups_committed});
  in_engine = false;
}

void commit_async() { ++current->groups_committed; }

void wait_async(unsigned pending_groups, const Site& site) {
  in_engine = true;
  auto& copies = current->copies;
  const auto done = [&](const Copy& copy) {
    return copy.group + pending_groups < current->groups_committed;
  };
  for (const Copy& copy : copies) {
    if (!done(copy)) continue;
    const auto to = reinterpret_cast<uintptr_t>(copy.to);
    check(to, copy.bytes, Kind::write, nullptr, &site);
    std::memset(copy.to, 0, copy.bytes);
    std::memcpy(copy.to, copy.from, copy.valid_bytes);
  }
  copies.erase(std::remove_if(copies.begin(), copies.end(), done), copies.end());
  in_engine = false;
}

void register_memory(const void* data, const int64_t* sizes, const int64_t* strides, int64_t dims,
                     size_t element_bytes, bool initialized) {
  int64_t first = 0, last = 0;  // elements
  bool empty = false;
  for (int64_t d = 0; d < dims; ++d) {
    empty |= sizes[d] == 0;
    (strides[d] < 0 ? first : last) += (sizes[d] - 1) * strides[d];
  }
  if (empty) return;
  const std::string name = "buffer " + std::to_string(buffers.size() + 1) +
                           (initialized ? " (an input)" : " (an output or workspace)");
  buffers.push_back({reinterpret_cast<uintptr_t>(data) + first * int64_t(element_bytes),
                     size_t(last - first + 1) * element_bytes, nullptr, name});
  mark(data, sizes, strides, dims, element_bytes,
       uint8_t(kAddressable | (initialized ? kInitialized : 0)));
}

void forget_memory() {
  for (const Range& buffer : buffers) clear_cells(buffer);
  buffers.clear();
}

// A plain load or store of a kernel. `natural`: the type promises alignment to the whole size.
static void hook(void* address, size_t bytes, bool natural, Kind kind, const void* pc) {
  if (!current || in_engine) return;
  in_engine = true;
  checked(reinterpret_cast<uintptr_t>(address), bytes, natural ? bytes : 1, kind, pc, nullptr);
  in_engine = false;
}

}  // namespace emblas::simt::engine

// --- what the compiler calls -----------------------------------------------------------------

#define EXPORT extern "C" __attribute__((visibility("hidden")))
#define HOOK(name, bytes, natural, kind)                                                  \
  EXPORT void __tsan_##name(void* address) {                                              \
    emblas::simt::engine::hook(address, bytes, natural, emblas::simt::engine::Kind::kind, \
                               __builtin_return_address(0));                              \
  }
HOOK(read1, 1, true, read)
HOOK(read2, 2, true, read)
HOOK(read4, 4, true, read)
HOOK(read8, 8, true, read)
HOOK(read16, 16, true, read)
HOOK(write1, 1, true, write)
HOOK(write2, 2, true, write)
HOOK(write4, 4, true, write)
HOOK(write8, 8, true, write)
HOOK(write16, 16, true, write)
HOOK(unaligned_read2, 2, false, read)
HOOK(unaligned_read4, 4, false, read)
HOOK(unaligned_read8, 8, false, read)
HOOK(unaligned_read16, 16, false, read)
HOOK(unaligned_write2, 2, false, write)
HOOK(unaligned_write4, 4, false, write)
HOOK(unaligned_write8, 8, false, write)
HOOK(unaligned_write16, 16, false, write)
EXPORT void __tsan_read_range(void* address, size_t bytes) {
  emblas::simt::engine::hook(address, bytes, false, emblas::simt::engine::Kind::read,
                             __builtin_return_address(0));
}
EXPORT void __tsan_write_range(void* address, size_t bytes) {
  emblas::simt::engine::hook(address, bytes, false, emblas::simt::engine::Kind::write,
                             __builtin_return_address(0));
}
EXPORT void __tsan_init() {}
EXPORT void __tsan_func_entry(void*) {}
EXPORT void __tsan_func_exit() {}
EXPORT void __tsan_vptr_update(void**, void*) {}
EXPORT void __tsan_vptr_read(void**) {}

// Checks of -fsanitize=bounds: arrays of known size, where the address alone says nothing.
EXPORT void __ubsan_handle_out_of_bounds_abort(void*, void* index) {
  const std::string text = "out of bounds: index " +
                           std::to_string(reinterpret_cast<intptr_t>(index)) +
                           " of an array of fixed size";
  emblas::simt::engine::stop(text, __builtin_return_address(0), nullptr);
}

// --- what the tests call ---------------------------------------------------------------------

extern "C" __attribute__((visibility("default"))) void simt_configure(int order, uint64_t seed,
                                                                      double preemption,
                                                                      bool check_uninitialized,
                                                                      bool check_races) {
  emblas::simt::engine::options = {order, seed, preemption, check_uninitialized, check_races};
}
// Name of the kernel, the six byte counts and the two of operations (see `Traffic`) of the first
// launch that was not yet taken; false if there is none.
extern "C" __attribute__((visibility("default"))) bool simt_take_launch(char* name, size_t bytes,
                                                                        uint64_t* counts) {
  auto& launches = emblas::simt::engine::launches;
  if (launches.empty()) return false;
  static std::unordered_map<const void*, std::string> names;  // asking takes a process
  std::string& kernel = names[launches.front().kernel];
  if (kernel.empty()) kernel = emblas::simt::engine::function_of(launches.front().kernel);
  std::snprintf(name, bytes, "%s", kernel.c_str());
  counts = std::copy_n(launches.front().bytes, 6, counts);
  std::copy_n(launches.front().operations, 2, counts);
  launches.pop_front();
  return true;
}
