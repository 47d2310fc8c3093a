#pragma once
// How a list of tensors is laid out for a GPU launch: a table of pointers that travels in the kernel's arguments, and the chunk
// of one tensor that each block works on. Plain C++ for host and device; no torch, no CUDA headers.
//
// More tensors take more launches, however many, and never a table in device memory. That would need a copy, which each call
// must compare or repeat and which a CUDA graph cannot capture; a launch is cheap beside what it costs the host to take the
// 4,000 tensors of its table over from torch.

#include <cstdint>
#include <vector>

#include "numeric.h"

namespace mtlkernels {

constexpr int kArgumentBytes = 32764;  // of one kernel, from sm_70 and CUDA 12.1 on
constexpr int kOtherArguments = 60;    // what a kernel may take besides the table
constexpr int kTableHeader = 16;
constexpr int kTableBytes = (kArgumentBytes - kOtherArguments - kTableHeader) / 8 * 8;

/// Elements of a chunk, the work of one block: four kilobytes a row and warp of a block of 256 threads, and a multiple of every
/// vector.
constexpr int32_t kDeviceChunk = 8192;

/// The tensors of one launch. For each: its pointers (what they are, the kernel says; null where there is none), its number of
/// elements, and the first block that works on it.
struct TensorTable {
  int32_t num_tensors;
  int32_t num_pointers;  // of each tensor
  int32_t first_tensor;  // the launch's first tensor in the whole list
  int32_t first_block;   // the launch's first block in the whole list
  alignas(8) unsigned char bytes[kTableBytes];

  static constexpr int capacity(int num_pointers) { return (kTableBytes - 4) / (8 * num_pointers + 12); }

  MTL_HOST_DEVICE void* const* pointers(int tensor) const {
    return reinterpret_cast<void* const*>(bytes) + int64_t(tensor) * num_pointers;
  }
  MTL_HOST_DEVICE const int64_t* numel() const {
    return reinterpret_cast<const int64_t*>(bytes + int64_t(num_tensors) * num_pointers * 8);
  }
  /// [num_tensors + 1], from 0.
  MTL_HOST_DEVICE const int32_t* block_offsets() const { return reinterpret_cast<const int32_t*>(numel() + num_tensors); }
};

static_assert(sizeof(TensorTable) + kOtherArguments <= kArgumentBytes, "the table must fit in a kernel's arguments");

/// The part of one tensor that a block works on.
struct Chunk {
  int tensor;  // within the launch
  int64_t begin, end;
};

/// The chunk of block `block` of a launch: a binary search for its tensor.
MTL_HOST_DEVICE inline Chunk find_chunk(const TensorTable& table, int block, int32_t chunk_size = kDeviceChunk) {
  const int32_t* offsets = table.block_offsets();
  int low = 0, high = table.num_tensors - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (offsets[middle] <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int64_t begin = int64_t(block - offsets[low]) * chunk_size, numel = table.numel()[low];
  return {low, begin, begin + chunk_size < numel ? begin + chunk_size : numel};
}

/// The same with a launch's blocks counted from its end. For what is read a second time: where that pass begins, the L2 cache
/// still holds what the first one read last. The launches then go in reverse order, too.
MTL_HOST_DEVICE inline Chunk find_chunk_from_end(const TensorTable& table, int block, int32_t chunk_size = kDeviceChunk) {
  return find_chunk(table, table.block_offsets()[table.num_tensors] - 1 - block, chunk_size);
}

/// A tensor as the plan sees it: pointers [num_pointers] and its elements. Tensors without elements are left out by the caller.
struct PlannedTensor {
  void* const* pointers;
  int64_t numel;
};

struct Launch {
  TensorTable table;
  int num_blocks;
};

/// The launches that cover all tensors, ceil(N (8 num_pointers + 12) / kTableBytes) of them.
/// Blocks are numbered from `first_block` on.
std::vector<Launch> plan_launches(const std::vector<PlannedTensor>& tensors, int num_pointers,
                                  int32_t chunk_size = kDeviceChunk, int32_t first_block = 0);

}  // namespace mtlkernels
