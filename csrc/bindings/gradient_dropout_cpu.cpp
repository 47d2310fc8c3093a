// gradient_dropout and gradient_dropout_ on the CPU: chunks of every tensor in parallel.

#include "gradient_dropout.h"

namespace mtlkernels {
namespace {

void run(const TensorList& grads, const Dropout& dropout, std::vector<Tensor>& out) {
  const Columns columns(grads, 1, true, &out, 1, true);
  dropout.check(columns);
  const double p = *static_cast<const double*>(dropout.p.const_data_ptr());
  require(p >= 0 && p < 1, "p is not from 0 to below 1");
  const uint64_t seed = uint64_t(*static_cast<const int64_t*>(dropout.seed.const_data_ptr()));
  const NoiseLevel<float> narrow(p, dropout.gaussian);
  const NoiseLevel<double> wide(p, dropout.gaussian);
  const std::vector<cpu::Output> outputs = outputs_of(columns);
  const std::vector<Piece> pieces = cut(columns);
  const auto gradient_dropout = cpu::kernels().gradient_dropout;
  for_each(int64_t(pieces.size()), columns.total_elements(), [&](int64_t i) {
    const auto [n, begin, end] = pieces[i];
    gradient_dropout(columns[n], {dropout.gaussian, narrow, wide, seed, uint32_t(dropout.places[n])}, begin, end, outputs[n]);
  });
}

std::vector<Tensor> gradient_dropout_cpu(std::vector<Tensor> grads, Tensor p, std::string mode, Tensor seed,
                                         std::vector<int64_t> places) {
  const TensorList rows(grads.begin(), grads.end());
  const Dropout dropout(p, mode, seed, places);
  return into_new(rows, 1, [&](std::vector<Tensor>& out) { run(rows, dropout, out); });
}

void gradient_dropout_inplace_cpu(std::vector<Tensor> out, std::vector<Tensor> grads, Tensor p, std::string mode, Tensor seed,
                                  std::vector<int64_t> places) {
  const TensorList rows(grads.begin(), grads.end());
  const Dropout dropout(p, mode, seed, places);
  into_buffers(out, rows, 1, [&](std::vector<Tensor>& targets) { run(rows, dropout, targets); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("gradient_dropout", TORCH_BOX(&gradient_dropout_cpu));
  m.impl("gradient_dropout_", TORCH_BOX(&gradient_dropout_inplace_cpu));
}

}  // namespace mtlkernels
