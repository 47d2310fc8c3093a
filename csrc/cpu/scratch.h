#pragma once
// Memory of the kernels' blocks. A thread keeps some, since an allocator takes longer than a kernel for a small tensor.

#include <cstddef>

namespace mtlkernels::cpu {

struct Borrowed {
  void* data;   // aligned to a cache line
  size_t kept;  // bytes of it that are the thread's own, all or none
};

/// At least `bytes` bytes, to be given back on the same thread, the last ones first.
Borrowed borrow(size_t bytes);
void give_back(Borrowed memory);

}  // namespace mtlkernels::cpu
