// Runs every registered test once per instruction set that this CPU (or emulator) can run.
#include "common/isa.h"
#include "native.h"

namespace native {

static int failures = 0;

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

void fail(const char* file, int line, const std::string& message) {
  if (++failures <= 20) std::fprintf(stderr, "%s:%d: %s\n", file, line, message.c_str());
}

}  // namespace native

int main() {
  int passed = 0, failed = 0;
  for (emblas::Isa isa : emblas::supported_isas()) {
    emblas::set_isa(emblas::isa_name(isa));
    for (const native::Test& test : native::tests()) {
      const int before = native::failures;
      test.run();
      const bool good = native::failures == before;
      (good ? passed : failed)++;
      if (!good) std::fprintf(stderr, "FAILED %s [%s]\n", test.name.c_str(), isa_name(isa));
    }
    std::printf("%s: ran\n", emblas::isa_name(isa));
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0 || passed == 0;
}
