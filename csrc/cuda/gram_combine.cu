#include "../common/gram_combine_plan.h"
#include "error.h"
#include "gram_combine.cuh"
#include "launchers.h"

namespace mtlkernels::cuda {
namespace {

using Kernel = void (*)(TensorTable, double*);

struct Choice {
  Kernel kernel;
  int shared_bytes;
};

template <typename T>
Choice pick(int rows_class) {
  const auto choice = [](Kernel kernel) { return Choice{kernel, kWaitingBytes<T>}; };
  switch (rows_class) {
    case 1: return choice(mtlkernels::gram_combine_chunks<T, 1>);
    case 2: return choice(mtlkernels::gram_combine_chunks<T, 2>);
    case 3: return choice(mtlkernels::gram_combine_chunks<T, 3>);
    case 4: return choice(mtlkernels::gram_combine_chunks<T, 4>);
    default: return choice(mtlkernels::gram_combine_chunks<T, 8>);
  }
}

Choice pick(DType dtype, int rows_class) {
  switch (dtype) {
    case DType::float32: return pick<float>(rows_class);
    case DType::bfloat16: return pick<BFloat16>(rows_class);
    case DType::float16: return pick<__half>(rows_class);
    default: return pick<double>(rows_class);
  }
}

}  // namespace

const char* gram_combine_chunks(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, int32_t first_block,
                                double* partials, Stream stream) {
  static_assert(gram_class(kGramCombineTasks) == 8, "the classes above");
  const Choice choice = pick(dtype, gram_class(num_rows));
  if (const char* error = allow_shared(choice.kernel, choice.shared_bytes)) return error;
  for (const Launch& launch : plan_launches(tensors, num_rows + 2, kDeviceChunk, first_block)) {
    choice.kernel<<<launch.num_blocks, kGramThreads, choice.shared_bytes, static_cast<cudaStream_t>(stream)>>>(launch.table,
                                                                                                               partials);
    if (const char* error = last_error()) return error;
  }
  return nullptr;
}

}  // namespace mtlkernels::cuda
