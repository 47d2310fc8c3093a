// combine, combine_channels, both in place, and mix on the CPU: chunks of every column in parallel, results where the caller
// wants them.

#include <algorithm>

#include "combine.h"

namespace mtlkernels {
namespace {

void run(const TensorList& grads, int64_t num_tasks, const Tensor& weights, Per per, std::vector<Tensor>& out,
         int64_t num_out) {
  const Columns columns(grads, num_tasks, per == Per::channel, &out, num_out);
  if (columns.size() == 0 || num_out == 0) return;
  std::vector<int64_t> first(columns.size() + 1, 0);  // row of weights of each column
  for (int64_t n = 0; n < columns.size(); ++n)
    first[n + 1] = first[n] + (per == Per::result ? 0 : per == Per::tensor ? 1 : columns.channels(n));
  const std::vector<double> values = read_matrix(weights, "weights is not float32 or float64 on the CPU");
  const int64_t rows = per == Per::result ? num_out : first[columns.size()];
  require(int64_t(values.size()) == rows * num_tasks, "weights has the wrong shape");
  int64_t result_bytes = 0;
  for (int64_t n = 0; n < columns.size(); ++n)
    result_bytes += columns[n].layout.numel * element_size(columns[n].dtype) * num_out;

  std::vector<cpu::Output> outputs(columns.size());
  for (int64_t n = 0; n < columns.size(); ++n) {
    outputs[n] = columns.output(n);
    bool in_place = false;
    for (int64_t m = 0; m < num_out; ++m)
      for (int64_t k = 0; k < num_tasks; ++k) in_place |= outputs[n].rows[m] == columns[n].rows[k];
    outputs[n].stream = result_bytes >= kStreamBytes && !in_place;
  }
  const std::vector<Piece> pieces = cut(columns);
  const auto combine = cpu::kernels().combine;
  for_each(int64_t(pieces.size()), columns.total_elements(), [&](int64_t p) {
    const auto [n, begin, end] = pieces[p];
    const double* own = values.data() + first[n] * num_tasks;
    const int64_t rest = per == Per::channel ? columns[n].layout.numel / columns.channels(n) : columns[n].layout.numel;
    for (int64_t at = begin; at < end;) {
      const int64_t channel = at / rest, until = std::min(end, (channel + 1) * rest);
      combine(columns[n], own + channel * num_tasks, at, until, outputs[n]);
      at = until;
    }
  });
}

std::vector<Tensor> combine_cpu(TensorList grads, Tensor weights) { return combine(grads, weights, false, run); }

void combine_inplace_cpu(std::vector<Tensor> out, TensorList grads, Tensor weights) {
  combine_into(out, grads, weights, false, run);
}

std::vector<Tensor> combine_channels_cpu(TensorList grads, Tensor weights) { return combine(grads, weights, true, run); }

void combine_channels_inplace_cpu(std::vector<Tensor> out, TensorList grads, Tensor weights) {
  combine_into(out, grads, weights, true, run);
}

std::vector<Tensor> mix_cpu(TensorList grads, Tensor coefficients) { return mix(grads, coefficients, run); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("combine", TORCH_BOX(&combine_cpu));
  m.impl("combine_", TORCH_BOX(&combine_inplace_cpu));
  m.impl("combine_channels", TORCH_BOX(&combine_channels_cpu));
  m.impl("combine_channels_", TORCH_BOX(&combine_channels_inplace_cpu));
  m.impl("mix", TORCH_BOX(&mix_cpu));
}

}  // namespace mtlkernels
