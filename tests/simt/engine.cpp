// Fibers, the scheduler, barriers and warp collectives.
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>

#include "internal.h"

// switch_stack(save, load): stores the stack pointer in *save and goes on where `load` was saved.
// Only the registers that a callee must keep are saved, and no signal mask: a switch costs about
// 20 instructions and no system call.
asm(R"(
.text
.local simt_switch_stack
.type simt_switch_stack,@function
simt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stack,.-simt_switch_stack
)");
extern "C" void simt_switch_stack(void** save, void* load);

namespace emblas::simt::engine {

Indices self;
Options options;
Fiber* current;
bool in_engine;
uint32_t stamp, block_stamp, launch_stamp;
const Kernel* running;

namespace {

constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 64 << 10;

Fiber fibers[kMaxThreads];
int threads;          // of the running block
void* scheduler;      // its stack pointer while a fiber runs
std::string failure;  // of the running block
const void* failure_pc;
const Site* failure_site;
Site failure_site_copy;
std::mt19937_64 generator;

char* stacks() {
  static char* memory =
      static_cast<char*>(mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  return memory;
}

void to_scheduler() { simt_switch_stack(&current->stack_pointer, scheduler); }

void fiber_main() {
  in_engine = false;
  running->enter(running->call);
  in_engine = true;
  current->state = State::finished;
  to_scheduler();
  __builtin_unreachable();
}

void prepare(Fiber& fiber, int index, dim3 block) {
  fiber.state = State::ready;
  fiber.index = uint16_t(index);
  fiber.thread = {index % block.x, index / block.x % block.y, index / (block.x * block.y)};
  std::fill_n(fiber.clock, 32, uint16_t(0));
  fiber.clock[index % 32] = 1;
  fiber.copies.clear();
  fiber.groups_committed = 0;
  // Six registers and the address to return to; the ABI wants rsp = 8 (mod 16) at a function entry.
  void** top = reinterpret_cast<void**>(stacks() + (index + 1) * kStackBytes) - 2;
  *top = reinterpret_cast<void*>(&fiber_main);
  fiber.stack_pointer = top - 6;
  std::memset(fiber.stack_pointer, 0, 6 * sizeof(void*));
}

void resume(Fiber& fiber) {
  current = &fiber;
  self.thread = fiber.thread;
  simt_switch_stack(&scheduler, fiber.stack_pointer);
  current = nullptr;
}

// 0 .. count-1 in the order that the options ask for.
template <class T>
void arrange(std::vector<T>& order, size_t count) {
  order.resize(count);
  std::iota(order.begin(), order.end(), T(0));
  if (options.order == 1) std::reverse(order.begin(), order.end());
  if (options.order == 2) std::shuffle(order.begin(), order.end(), generator);
}

std::string text(const Site& site) {
  return std::string(site.file_name()) + ":" + std::to_string(site.line());
}

// All threads wait: for a common barrier (let them go) or in vain (say for what).
void release_barrier() {
  const Fiber* at_barrier = nullptr;
  const Fiber* in_collective = nullptr;
  int arrived = 0, finished = 0, same_site = 0;
  for (int i = 0; i < threads; ++i) {
    const Fiber& fiber = fibers[i];
    finished += fiber.state == State::finished;
    if (fiber.state == State::in_collective && !in_collective) in_collective = &fiber;
    if (fiber.state != State::at_barrier) continue;
    if (!at_barrier) at_barrier = &fiber;
    ++arrived;
    same_site += fiber.site.line() == at_barrier->site.line() &&
                 !std::strcmp(fiber.site.file_name(), at_barrier->site.file_name());
  }
  if (same_site == threads) {
    ++stamp;
    for (int i = 0; i < threads; ++i) fibers[i].state = State::ready;
    return;
  }
  const Fiber& stuck = in_collective ? *in_collective : *at_barrier;
  self.thread = stuck.thread;
  failure = in_collective ? "deadlock: " : "divergent barrier: ";
  failure += std::string(stuck.what) + " at " + text(stuck.site) + " waits in vain";
  if (in_collective) {
    char mask[32];
    std::snprintf(mask, sizeof mask, " (mask 0x%08x)", stuck.mask);
    failure += mask;
  }
  failure += "; of " + std::to_string(threads) + " threads " + std::to_string(arrived) +
             " wait at a barrier" + (at_barrier ? " (" + text(at_barrier->site) + ")" : "") +
             (arrived != same_site ? ", not all at the same one" : "") + ", " +
             std::to_string(finished) + " have exited";
}

void run_block(dim3 block, size_t dynamic_bytes) {
  block_stamp = ++stamp;
  begin_block_memory(dynamic_bytes);
  for (int i = 0; i < threads; ++i) prepare(fibers[i], i, block);
  std::vector<int> order;
  arrange(order, threads);
  for (;;) {
    bool progress = false, all_finished = true;
    for (int i : order) {
      if (fibers[i].state == State::ready) {
        progress = true;
        resume(fibers[i]);
        if (!failure.empty()) return;
      }
      all_finished &= fibers[i].state == State::finished;
    }
    if (all_finished) return;
    if (!progress) release_barrier();
    if (!failure.empty()) return;
    if (options.order == 2) arrange(order, threads);
  }
}

std::string index_text(uint3 index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," +
         std::to_string(index.z) + ")";
}

void check_limits(const Kernel& kernel, dim3 grid, dim3 block, size_t dynamic_bytes) {
  const uint64_t count = uint64_t(block.x) * block.y * block.z;
  const char* problem = nullptr;
  if (count == 0 || count > kMaxThreads || block.x > 1024 || block.y > 1024 || block.z > 64) {
    problem = "a block has 1 to 1024 threads, at most 64 along z";
  } else if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    problem = "a grid has at most 2^31 - 1 blocks along x and 65535 along y and z";
  } else if (dynamic_bytes > kSharedLimit) {
    problem = "a block has at most 99 KiB of shared memory";
  }
  if (problem) {
    throw std::runtime_error("simt: " + function_of(kernel.address) + ": launch limit exceeded: " +
                             problem + "; block " + index_text({block.x, block.y, block.z}) +
                             ", grid " + index_text({grid.x, grid.y, grid.z}) + ", " +
                             std::to_string(dynamic_bytes) + " bytes of dynamic shared memory");
  }
}

}  // namespace

uint64_t random_bits() { return generator(); }

unsigned lane() { return current->index % 32; }

bool on_fiber_stack(uintptr_t address) {
  return address - reinterpret_cast<uintptr_t>(stacks()) < kMaxThreads * kStackBytes;
}

void enter_engine() { in_engine = true; }
void leave_engine() { in_engine = false; }

void run(const Kernel& kernel, dim3 grid, dim3 block, size_t dynamic_bytes) {
  check_limits(kernel, grid, block, dynamic_bytes);
  running = &kernel;
  generator.seed(options.seed);
  threads = int(block.x * block.y * block.z);
  self.block_dim = block;
  self.grid_dim = grid;
  launch_stamp = ++stamp;
  begin_launch_memory(kernel);
  failure.clear();
  in_engine = true;
  std::vector<uint64_t> blocks;
  arrange(blocks, size_t(grid.x) * grid.y * grid.z);
  for (uint64_t b : blocks) {
    self.block = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y),
                  unsigned(b / grid.x / grid.y)};
    run_block(block, dynamic_bytes);
    if (failure.empty()) continue;
    std::string where;
    if (failure_pc) where = " in " + source_of(failure_pc);
    if (failure_site) where = " at " + text(*failure_site);
    failure_pc = failure_site = nullptr;
    throw std::runtime_error("simt: " + function_of(kernel.address) + ": block " +
                             index_text(self.block) + " thread " + index_text(self.thread) + ": " +
                             std::exchange(failure, "") + where);
  }
  running = nullptr;
}

void stop(std::string message, const void* pc, const Site* site) {
  failure = std::move(message);
  failure_pc = pc;
  if (site) {
    failure_site_copy = *site;
    failure_site = &failure_site_copy;
  }
  to_scheduler();  // and never comes back: the block ends here
  __builtin_unreachable();
}

void fail(const char* kind, const char* detail, const Site& site) {
  stop(std::string(kind) + ": " + detail, nullptr, &site);
}

void yield() {
  in_engine = true;
  to_scheduler();
  in_engine = false;
}

void block_barrier(const Site& site) {
  in_engine = true;
  current->state = State::at_barrier;
  current->what = "__syncthreads";
  current->site = site;
  to_scheduler();
  in_engine = false;
}

void collective(const char* name, uint32_t mask, Finish finish, const void* in, void* out,
                const Site& site) {
  in_engine = true;
  const int warp = current->index / 32 * 32;
  char detail[160];
  if (!(mask >> lane() & 1)) {
    std::snprintf(detail, sizeof detail, "%s by a lane outside its own mask 0x%08x", name, mask);
    fail("divergent collective", detail, site);
  }
  current->what = name;
  current->site = site;
  current->mask = mask;
  current->exchange = {in, out};
  current->state = State::in_collective;
  Lane lanes[32] = {};
  bool complete = true;
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    Fiber* other = warp + l < threads ? &fibers[warp + l] : nullptr;
    if (!other || other->state == State::finished) {
      std::snprintf(detail, sizeof detail, "%s with mask 0x%08x names lane %d, which %s", name,
                    mask, l, other ? "has exited" : "does not exist");
      fail("divergent collective", detail, site);
    }
    if (other->state != State::in_collective) {
      complete = false;
      continue;
    }
    if (other->mask != mask || std::strcmp(other->what, name) ||
        other->site.line() != site.line()) {
      std::snprintf(detail, sizeof detail,
                    "%s with mask 0x%08x meets lane %d in %s at line %u with mask 0x%08x", name,
                    mask, l, other->what, unsigned(other->site.line()), other->mask);
      fail("divergent collective", detail, site);
    }
    lanes[l] = other->exchange;
  }
  if (!complete) {
    to_scheduler();
  } else {
    finish(lanes, mask);
    for (int l = 0; l < 32; ++l) {
      if (mask >> l & 1) fibers[warp + l].state = State::ready;
    }
  }
  in_engine = false;
}

void warp_barrier(uint32_t mask, const Site& site) {
  const auto join = [](const Lane(&lanes)[32], uint32_t mask) {
    uint16_t latest[32] = {};
    for (int l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      const auto* clock = static_cast<const uint16_t*>(lanes[l].in);
      for (int i = 0; i < 32; ++i) latest[i] = std::max(latest[i], clock[i]);
    }
    for (int l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      auto* clock = static_cast<uint16_t*>(lanes[l].out);
      std::copy_n(latest, 32, clock);
      ++clock[l];
    }
  };
  collective("__syncwarp", mask, join, current->clock, current->clock, site);
}

// --- source lines ----------------------------------------------------------------------------

static std::string addr2line(const void* pc, bool with_line) {
  Dl_info module;
  if (!dladdr(pc, &module)) return "?";
  const auto offset = static_cast<const char*>(pc) - static_cast<const char*>(module.dli_fbase);
  char command[4300];
  std::snprintf(command, sizeof command, "addr2line -Cf -e '%s' 0x%tx 2>/dev/null",
                module.dli_fname, offset);
  std::string function, line;
  if (FILE* pipe = popen(command, "r")) {
    char buffer[2000];
    if (std::fgets(buffer, sizeof buffer, pipe)) function = buffer;
    if (std::fgets(buffer, sizeof buffer, pipe)) line = buffer;
    pclose(pipe);
  }
  for (std::string* s : {&function, &line}) s->resize(s->find_last_not_of("\n") + 1);
  if (const size_t arguments = function.rfind('('); arguments != std::string::npos) {
    function.resize(arguments);
  }
  if (function.empty()) function = "?";
  if (function.starts_with("void ")) function.erase(0, 5);  // a template's return type
  return with_line ? line : function;
}

std::string function_of(const void* pc) { return addr2line(pc, false); }
std::string source_of(const void* pc) {
  std::string line = addr2line(static_cast<const char*>(pc) - 1, true);  // the call itself
  for (const char* root : {"csrc/", "tests/simt/"}) {  // what stands before is the build folder
    if (const size_t at = line.rfind(root); at != std::string::npos) line.erase(0, at);
  }
  line.resize(std::min(line.size(), line.find(" (discriminator")));
  return line;
}

}  // namespace emblas::simt::engine
