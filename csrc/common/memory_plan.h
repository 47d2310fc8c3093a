#pragma once
// What the launcher and the binding of memory_combine_ share.

namespace mtlkernels {

constexpr int kMemoryTasks = 64;  // at most, of one call on CUDA

}  // namespace mtlkernels
