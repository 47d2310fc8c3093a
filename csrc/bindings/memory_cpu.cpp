// memory_combine_ on the CPU: chunks of every column in parallel.

#include "memory.h"

namespace mtlkernels {
namespace {

void run(const TensorList& rows, int64_t num_tasks, const Tensor& factors, bool squares, std::vector<Tensor>& out) {
  const Columns columns(rows, 2 * num_tasks, false, &out, 1, false, num_tasks);
  const std::vector<double> values = read_matrix(factors, "factors is not float32 or float64 on the CPU");
  int64_t bytes = 0;
  for (int64_t n = 0; n < columns.size(); ++n) bytes += columns[n].layout.numel * element_size(columns[n].dtype);
  std::vector<cpu::Output> outputs;
  for (int64_t n = 0; n < columns.size(); ++n) {
    outputs.push_back(columns.output(n));
    bool in_place = false;
    for (int64_t k = 0; k < num_tasks; ++k) in_place |= outputs[n].rows[0] == columns[n].rows[k];
    outputs[n].stream = bytes >= kStreamBytes && !in_place;
  }
  const std::vector<Piece> pieces = cut(columns);
  const auto memory_combine = cpu::kernels().memory_combine;
  for_each(int64_t(pieces.size()), columns.total_elements(), [&](int64_t p) {
    const auto [n, begin, end] = pieces[p];
    memory_combine(columns[n], values.data(), squares, begin, end, outputs[n]);
  });
}

void memory_combine_cpu(std::vector<Tensor> out, std::vector<Tensor> memory, TensorList grads, Tensor factors, bool squares) {
  memory_combine_into(out, memory, grads, factors, squares, run);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) { m.impl("memory_combine_", TORCH_BOX(&memory_combine_cpu)); }

}  // namespace mtlkernels
