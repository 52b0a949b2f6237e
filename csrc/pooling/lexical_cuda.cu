// Launches lexical weights.
#include <algorithm>

#include "pooling/lexical_cuda.cuh"

namespace emblas::cuda {
namespace {

unsigned blocks(int64_t items) { return unsigned((items + kLexicalThreads - 1) / kLexicalThreads); }

}  // namespace

void choose_words(const LexicalArgs& args, int64_t* chosen, void* stream) {
  simt::launch(choose_best, blocks(args.tokens), kLexicalThreads, 0, stream, args, chosen);
}

void place_words(const LexicalArgs& args, const int64_t* chosen, const int64_t* up_to,
                 int64_t* crow, int64_t* columns, int64_t* at, void* stream) {
  simt::launch(place_chosen, blocks(std::max(args.tokens, args.batch + 1)), kLexicalThreads, 0,
               stream, args, chosen, up_to, crow, columns, at);
}

}  // namespace emblas::cuda
