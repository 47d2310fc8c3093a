#include "launch_plan.h"

#include <algorithm>
#include <cstring>

namespace mtlkernels {

std::vector<Launch> plan_launches(const std::vector<PlannedTensor>& tensors, int num_pointers, int32_t chunk_size,
                                  int32_t first_block) {
  const int64_t capacity = TensorTable::capacity(num_pointers), count = int64_t(tensors.size());
  std::vector<Launch> launches;
  for (int64_t first = 0; first < count; first += capacity) {
    Launch& launch = launches.emplace_back();
    TensorTable& table = launch.table;
    const int64_t here = std::min(capacity, count - first);
    table.num_tensors = int32_t(here);
    table.num_pointers = num_pointers;
    table.first_tensor = int32_t(first);
    table.first_block = first_block;
    int32_t blocks = 0;
    for (int64_t t = 0; t < here; ++t) {
      const PlannedTensor& tensor = tensors[first + t];
      std::memcpy(table.bytes + t * num_pointers * 8, tensor.pointers, size_t(num_pointers) * 8);
      const_cast<int64_t*>(table.numel())[t] = tensor.numel;
      const_cast<int32_t*>(table.block_offsets())[t] = blocks;
      blocks += int32_t((tensor.numel + chunk_size - 1) / chunk_size);
    }
    const_cast<int32_t*>(table.block_offsets())[here] = blocks;
    launch.num_blocks = blocks;
    first_block += blocks;
  }
  return launches;
}

}  // namespace mtlkernels
