// gram, cross_gram and paired_gram on the CPU: cut the columns into chunks, sum each on one thread, add the chunks in order.

#include <algorithm>
#include <string>

#include "gram.h"

namespace mtlkernels {
namespace {

/// Inner products of the first `num_left` rows with the others, or of all rows with each other when there are no others.
/// `form`: what pairs of rows make; with one, all rows are multiplied with each other.
Tensor products(const TensorList& grads, int64_t num_rows, int64_t num_left, int64_t num_right, const std::string& per,
                PairForm form = PairForm::none) {
  const bool per_channel = per == "channel", per_tensor = per == "tensor";
  require(per_channel || per_tensor || per == "model", "per is none of model, tensor, channel");
  require(!per_channel || form == PairForm::none, "per is none of model, tensor");
  const Columns columns(grads, num_rows, per_channel);
  const int64_t block = num_left * num_right;
  const auto gram = [kernel = cpu::kernels().gram, form](const cpu::Column& column, int left, int64_t begin, int64_t end,
                                                         int64_t segment, double* sums) {
    kernel(column, left, form, begin, end, segment, sums);
  };

  if (per_channel) {
    std::vector<int64_t> first_slot(columns.size() + 1, 0);
    std::vector<Piece> ranges;  // of channels
    for (int64_t n = 0; n < columns.size(); ++n) {
      const int64_t channels = columns.channels(n);
      first_slot[n + 1] = first_slot[n] + channels;
      if (columns[n].layout.numel == 0) continue;
      const int64_t step = std::max<int64_t>(1, kChunk / (columns[n].layout.numel / channels));
      for (int64_t c = 0; c < channels; c += step) ranges.push_back({n, c, std::min(c + step, channels)});
    }
    Tensor result = zeros({first_slot.back(), num_left, num_right});
    double* sums = static_cast<double*>(result.mutable_data_ptr());
    if (block == 0) return result;
    for_each(int64_t(ranges.size()), columns.total_elements(), [&](int64_t i) {
      const auto [n, begin, end] = ranges[i];
      const int64_t rest = columns[n].layout.numel / columns.channels(n);
      gram(columns[n], int(num_left), begin * rest, end * rest, rest, sums + (first_slot[n] + begin) * block);
    });
    if (num_left == num_rows) mirror(sums, first_slot.back(), num_left);
    return result;
  }

  const int64_t slots = per_tensor ? columns.size() : 1;
  Tensor result = per_tensor ? zeros({slots, num_left, num_right}) : zeros({num_left, num_right});
  if (block == 0) return result;
  double* sums = static_cast<double*>(result.mutable_data_ptr());
  sum_chunks(columns, per_tensor, block, sums, [&](const Piece& piece, double* partial) {
    gram(columns[piece.column], int(num_left), piece.begin, piece.end, kChunk, partial);
  });
  if (num_left == num_rows) mirror(sums, slots, num_left);
  return result;
}

Tensor gram_cpu(TensorList grads, int64_t num_tasks, std::string per) {
  return products(grads, num_tasks, num_tasks, num_tasks, per);
}

Tensor cross_gram_cpu(TensorList grads, TensorList other, int64_t num_tasks, int64_t num_other, std::string per) {
  grads.insert(grads.end(), other.begin(), other.end());
  return products(grads, num_tasks + num_other, num_tasks, num_other, per);
}

Tensor paired_gram_cpu(TensorList grads, TensorList other, int64_t num_tasks, std::string per, std::string form) {
  return products(in_pairs(grads, other, num_tasks), 2 * num_tasks, 2 * num_tasks, 2 * num_tasks, per, pair_form(form));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("gram", TORCH_BOX(&gram_cpu));
  m.impl("cross_gram", TORCH_BOX(&cross_gram_cpu));
  m.impl("paired_gram", TORCH_BOX(&paired_gram_cpu));
}

}  // namespace mtlkernels
