// gram_combine_ on the CPU: the chunks of gram, each written to the results as it is read.

#include "elementwise.h"
#include "gram.h"

namespace mtlkernels {
namespace {

Tensor gram_combine_cpu(std::vector<Tensor> out, TensorList grads, Tensor weights) {
  require(weights.dim() == 1, "weights is not [K]");
  const std::vector<double> values = read_matrix(weights, "weights is not float32 or float64 on the CPU");
  const int64_t num_tasks = int64_t(values.size());
  Tensor result = zeros({num_tasks, num_tasks});
  double* sums = static_cast<double*>(result.mutable_data_ptr());
  into_buffers(out, grads, num_tasks, [&](std::vector<Tensor>& targets) {
    const Columns columns(grads, num_tasks, false, &targets, 1);
    const std::vector<cpu::Output> outputs = outputs_of(columns);
    sum_chunks(columns, false, num_tasks * num_tasks, sums, [&](const Piece& piece, double* partial) {
      const cpu::Column& column = columns[piece.column];
      cpu::kernels().gram_combine(column, values.data(), piece.begin, piece.end, outputs[piece.column], partial);
    });
  });
  mirror(sums, 1, num_tasks);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) { m.impl("gram_combine_", TORCH_BOX(&gram_combine_cpu)); }

}  // namespace mtlkernels
