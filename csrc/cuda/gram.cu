#include "error.h"
#include "gram.cuh"
#include "gram_channels.cuh"
#include "gram_tensor_core.cuh"
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
    case 8:
      if constexpr (sizeof(T) == 2)
        return gram_tensor_core<T, 8>;
      else
        return mtlkernels::gram_chunks<T, 8>;
    case 16: return gram_tensor_core<T, 16>;
    default: return gram_tensor_core<T, 64>;
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

using ChannelKernel = void (*)(TensorTable, int32_t);

template <typename T>
ChannelKernel pick_channels(int num_rows) {
  return num_rows <= 2   ? mtlkernels::gram_channels<T, 2>
         : num_rows <= 4 ? mtlkernels::gram_channels<T, 4>
         : num_rows <= 8 ? mtlkernels::gram_channels<T, 8>
                         : mtlkernels::gram_channels<T, 64>;
}

}  // namespace

const char* gram_chunks(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, int32_t first_block,
                        double* partials, Stream stream) {
  const GramLaunch shape = gram_launch(dtype, num_rows);
  const ChunkKernel kernel = pick_chunks(dtype, shape.rows_class);
  if (const char* error = allow_shared(kernel, shape.shared_bytes)) return error;
  for (const Launch& launch : plan_launches(tensors, num_rows, kDeviceChunk, first_block)) {
    kernel<<<launch.num_blocks, shape.threads, shape.shared_bytes, static_cast<cudaStream_t>(stream)>>>(launch.table, partials);
    if (const char* error = last_error()) return error;
  }
  return nullptr;
}

const char* gram_finish(const std::vector<Slot>& slots, int num_rows, int num_other, const double* partials, double* gram,
                        Stream stream) {
  const unsigned entries = num_other ? num_rows * num_other : num_pairs(num_rows);
  const int rows_class = gram_class(num_rows + num_other);
  for (size_t first = 0; first < slots.size(); first += SlotTable::capacity) {
    SlotTable table;
    const size_t count = slots.size() - first < SlotTable::capacity ? slots.size() - first : SlotTable::capacity;
    for (size_t s = 0; s < count; ++s) {
      table.slot[s] = slots[first + s].slot;
      table.begin[s] = slots[first + s].begin;
      table.end[s] = slots[first + s].end;
    }
    const dim3 grid(entries, unsigned(count));
    mtlkernels::gram_finish<<<grid, kGramThreads, 0, static_cast<cudaStream_t>(stream)>>>(table, partials, rows_class, num_rows,
                                                                                          num_other, gram);
    if (const char* error = last_error()) return error;
  }
  return nullptr;
}

const char* gram_channels(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, int num_other, Stream stream) {
  const int all = num_rows + num_other;
  const ChannelKernel kernels[] = {pick_channels<float>(all), pick_channels<BFloat16>(all), pick_channels<__half>(all),
                                   pick_channels<double>(all)};
  const int threads = kChannelWarps * kWarpSize;
  for (const Launch& launch : plan_launches(tensors, all + 2, kChannelsOfBlock)) {
    kernels[int(dtype)]<<<launch.num_blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(launch.table, num_other);
    if (const char* error = last_error()) return error;
  }
  return nullptr;
}

}  // namespace mtlkernels::cuda
