#include "error.h"
#include "gram.cuh"
#include "gram_channels.cuh"
#include "gram_tiles.cuh"
#include "launchers.h"

namespace mtlkernels::cuda {
namespace {

using ChunkKernel = void (*)(TensorTable, double*);

template <typename T>
ChunkKernel pick_chunks(int rows_class) {
  switch (rows_class) {
    case 1: return mtlkernels::gram_chunks<T, 1>;
    case 2: return mtlkernels::gram_chunks<T, 2>;
    case 3: return mtlkernels::gram_chunks<T, 3>;
    case 4: return mtlkernels::gram_chunks<T, 4>;
    case 8: return mtlkernels::gram_chunks<T, 8>;
    case 16: return gram_tiles<T, 16>;
    default: return gram_tiles<T, 64>;
  }
}

ChunkKernel pick_chunks(DType dtype, int rows_class) {
  switch (dtype) {
    case DType::float32: return pick_chunks<float>(rows_class);
    case DType::bfloat16: return pick_chunks<BFloat16>(rows_class);
    case DType::float16: return pick_chunks<__half>(rows_class);
    default: return pick_chunks<double>(rows_class);
  }
}

template <typename T>
void (*pick_channels(int num_rows))(TensorTable) {
  return num_rows <= 2 ? mtlkernels::gram_channels<T, 2> : mtlkernels::gram_channels<T, 4>;
}

}  // namespace

const char* gram_chunks(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, int32_t first_block,
                        double* partials, Stream stream) {
  const GramLaunch shape = gram_launch(dtype, num_rows);
  const ChunkKernel kernel = pick_chunks(dtype, shape.rows_class);
  if (shape.shared_bytes > 48 * 1024) {  // the most a kernel gets unasked
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const cudaError_t error = cudaFuncSetAttribute(kernel, attribute, shape.shared_bytes);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  for (const Launch& launch : plan_launches(tensors, num_rows, kDeviceChunk, first_block)) {
    kernel<<<launch.num_blocks, shape.threads, shape.shared_bytes, static_cast<cudaStream_t>(stream)>>>(launch.table, partials);
    if (const char* error = last_error()) return error;
  }
  return nullptr;
}

const char* gram_finish(const std::vector<Slot>& slots, int num_rows, const double* partials, double* gram, Stream stream) {
  for (size_t first = 0; first < slots.size(); first += SlotTable::capacity) {
    SlotTable table;
    const size_t count = slots.size() - first < SlotTable::capacity ? slots.size() - first : SlotTable::capacity;
    for (size_t s = 0; s < count; ++s) {
      table.slot[s] = slots[first + s].slot;
      table.begin[s] = slots[first + s].begin;
      table.end[s] = slots[first + s].end;
    }
    const dim3 grid(num_pairs(num_rows), unsigned(count));
    mtlkernels::gram_finish<<<grid, kGramThreads, 0, static_cast<cudaStream_t>(stream)>>>(table, partials, gram_class(num_rows),
                                                                                          num_rows, gram);
    if (const char* error = last_error()) return error;
  }
  return nullptr;
}

const char* gram_channels(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, Stream stream) {
  void (*const kernels[])(TensorTable) = {pick_channels<float>(num_rows), pick_channels<BFloat16>(num_rows),
                                          pick_channels<__half>(num_rows), pick_channels<double>(num_rows)};
  for (const Launch& launch : plan_launches(tensors, num_rows + 2, kChannelsOfBlock)) {
    kernels[int(dtype)]<<<launch.num_blocks, kChannelWarps * kWarpSize, 0, static_cast<cudaStream_t>(stream)>>>(launch.table);
    if (const char* error = last_error()) return error;
  }
  return nullptr;
}

}  // namespace mtlkernels::cuda
