#include "scratch.h"

#include <cstdlib>

namespace mtlkernels::cpu {
namespace {

constexpr size_t kLine = 64;
constexpr size_t kKept = 256 << 10;  // bytes, of a thread that has called a kernel

struct Kept {
  char* data = nullptr;
  size_t used = 0;

  ~Kept() { std::free(data); }
};

thread_local Kept kept;

char* allocate(size_t bytes) {
  void* data = std::aligned_alloc(kLine, bytes);
  if (!data) std::abort();  // of blocks, not of tensors: nothing sensible is left to do
  return static_cast<char*>(data);
}

}  // namespace

Borrowed borrow(size_t bytes) {
  bytes = (bytes + 2 * kLine - 1) / kLine * kLine;
  Kept& own = kept;
  if (bytes > kKept - own.used) return {allocate(bytes), 0};
  if (!own.data) own.data = allocate(kKept);
  own.used += bytes;
  return {own.data + own.used - bytes, bytes};
}

void give_back(Borrowed memory) {
  if (memory.kept) {
    kept.used -= memory.kept;
  } else {
    std::free(memory.data);
  }
}

}  // namespace mtlkernels::cpu
