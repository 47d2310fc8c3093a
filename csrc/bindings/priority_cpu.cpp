// connection_strength, priority_combine and priority_combine_ on the CPU.
//
// A batch of layers whose gradients fit in a second-level cache is read from memory once: first for all inner products, then,
// from the cache, for the results. A layer that does not fit is a batch of its own. Its chunks are combined last chunk first:
// as much of it as the caches hold is not read again.

#include <algorithm>
#include <limits>

#include "../common/priority.h"
#include "priority.h"

namespace mtlkernels {
namespace {

constexpr int64_t kBatchBytes = 768 << 10;  // of gradients that stay in a second-level cache
constexpr int64_t kStreamBytes = 8 << 20;   // results of at least this many are stored past the caches

/// One call: its layers, where their results go, and how their chunks are worked on.
class Combination {
 public:
  Combination(const Layers& layers, const Columns& columns)
      : layers_(layers), columns_(columns), num_tasks_(layers.num_tasks), kernels_(cpu::kernels()) {
    int64_t result_bytes = 0;
    for (int64_t n = 0; n < columns.size(); ++n) {
      const int64_t numel = columns[n].layout.numel;
      channels_.push_back({tops_of(layers, columns, n), numel > 0 ? numel / columns.channels(n) : 1});
      outputs_.push_back(columns.output(n));
      result_bytes += numel * element_size(columns[n].dtype);
    }
    for (int64_t n = 0; n < columns.size(); ++n) {
      const bool in_place =
          std::find(columns[n].rows, columns[n].rows + num_tasks_, outputs_[n].rows[0]) != columns[n].rows + num_tasks_;
      outputs_[n].stream = result_bytes >= kStreamBytes && !in_place;
    }
    ones_.assign(num_tasks_, 1.0);
  }

  void run() {
    const std::vector<Piece> pieces = cut(columns_);
    for (size_t first = 0; first < pieces.size();) {
      size_t last = first;
      int64_t bytes = 0;
      while (last < pieces.size() && (last == first || bytes + bytes_of_layer(pieces[last].column) <= kBatchBytes)) {
        const int64_t layer = pieces[last].column;
        bytes += bytes_of_layer(layer);
        while (last < pieces.size() && pieces[last].column == layer) ++last;
      }
      run_batch({pieces.begin() + first, pieces.begin() + last});
      first = last;
    }
  }

 private:
  int64_t bytes_of_layer(int64_t n) const { return num_tasks_ * columns_[n].layout.numel * element_size(columns_[n].dtype); }

  void run_batch(const std::vector<Piece>& pieces) {
    const int64_t count = int64_t(pieces.size()), matrix = num_tasks_ * num_tasks_;
    int64_t elements = 0;
    for (const Piece& piece : pieces) elements += num_tasks_ * (piece.end - piece.begin);
    std::vector<double> inner(count * matrix, 0.0), alpha(count * num_tasks_, 0.0);
    for_each(count, elements, [&](int64_t p) {
      const auto [n, begin, end] = pieces[p];
      if (channels_[n].top) kernels_.priority_inner(columns_[n], channels_[n], begin, end, inner.data() + p * matrix);
    });
    for (int64_t p = 0, first = 0; p < count; ++p) {  // a layer's sums and coefficients end up with its first piece
      const int64_t n = pieces[p].column;
      if (n != pieces[first].column) first = p;
      for (int64_t i = 0; p > first && i < matrix; ++i) inner[first * matrix + i] += inner[p * matrix + i];
      if (p + 1 < count && pieces[p + 1].column == n) continue;
      if (!channels_[n].top || (layers_.skip_degenerate && is_degenerate(n))) continue;
      for (int64_t i = 0; i < num_tasks_; ++i) {
        const double own = priority_alpha(inner.data() + first * matrix + i * num_tasks_, int(i), int(num_tasks_));
        for (int64_t q = first; q <= p; ++q) alpha[q * num_tasks_ + i] = own;
      }
    }
    for_each(count, elements, [&](int64_t i) {
      const int64_t p = count - 1 - i;
      const auto [n, begin, end] = pieces[p];
      if (channels_[n].top) {
        kernels_.priority_combine(columns_[n], channels_[n], alpha.data() + p * num_tasks_, begin, end, outputs_[n]);
      } else {
        kernels_.combine(columns_[n], ones_.data(), begin, end, outputs_[n]);
      }
    });
  }

  bool is_degenerate(int64_t n) const {
    const int64_t* top = channels_[n].top;
    return std::all_of(top, top + columns_.channels(n), [&](int64_t task) { return task == top[0]; });
  }

  const Layers& layers_;
  const Columns& columns_;
  const int64_t num_tasks_;
  const cpu::Kernels& kernels_;
  std::vector<cpu::Channels> channels_;
  std::vector<cpu::Output> outputs_;
  std::vector<double> ones_;
};

void run(const Layers& layers, std::vector<Tensor>& out) {
  const Columns columns(layers.grads, layers.num_tasks, true, &out, 1);
  Combination(layers, columns).run();
}

std::vector<Tensor> priority_combine_cpu(TensorList grads, TensorList top, int64_t num_tasks, bool skip_degenerate) {
  return priority_combine(layers_of(grads, top, num_tasks, skip_degenerate), run);
}

void priority_combine_inplace_cpu(std::vector<Tensor> out, TensorList grads, TensorList top, int64_t num_tasks,
                                  bool skip_degenerate) {
  priority_combine_into(out, layers_of(grads, top, num_tasks, skip_degenerate), run);
}

/// S [K][C] and the top tasks of one layer, from its channels' squares.
void strength_of_layer(const double* squares, const std::vector<double>& scale, const std::vector<double>& variance,
                       int64_t num_tasks, int64_t channels, double eps, double* strength, int64_t* top) {
  for (int64_t i = 0; i < num_tasks; ++i) {
    double total = 0, *row = strength + i * channels;
    for (int64_t p = 0; p < channels; ++p) {
      const double own = scale[i * channels + p];
      total += row[p] = squares[p] * (own * own) / (variance[i * channels + p] + eps);
    }
    for (int64_t p = 0; p < channels; ++p) row[p] = total == 0 ? 0.0 : row[p] / total;
  }
  for (int64_t p = 0; p < channels; ++p) {
    double best = -std::numeric_limits<double>::infinity();
    top[p] = 0;
    for (int64_t i = 0; i < num_tasks; ++i) {
      if (!(strength[i * channels + p] > best)) continue;
      best = strength[i * channels + p];
      top[p] = i;
    }
  }
}

std::tuple<Tensor, Tensor> connection_strength_cpu(Tensor squares, std::vector<Tensor> scales, std::vector<Tensor> running_vars,
                                                   double eps) {
  check_strengths(squares, scales, running_vars);
  int64_t total = 0;
  for (const Tensor& scale : scales) total += scale.numel();
  const std::vector<double> square = read_matrix(squares, "squares is not on the CPU");
  Tensor strengths = zeros({total});
  Tensor top = torch::stable::new_empty(squares, {squares.numel()}, torch::headeronly::ScalarType::Long);
  double* strength = static_cast<double*>(strengths.mutable_data_ptr());
  int64_t first = 0, *tasks = static_cast<int64_t*>(top.mutable_data_ptr());
  for (size_t n = 0; n < scales.size(); ++n) {
    const int64_t num_tasks = scales[n].size(0), own = scales[n].size(1);
    strength_of_layer(square.data() + first, read_matrix(scales[n], "scale is not on the CPU"),
                      read_matrix(running_vars[n], "running_var is not on the CPU"), num_tasks, own, eps, strength,
                      tasks + first);
    strength += num_tasks * own;
    first += own;
  }
  return {strengths, top};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("connection_strength", TORCH_BOX(&connection_strength_cpu));
  m.impl("priority_combine", TORCH_BOX(&priority_combine_cpu));
  m.impl("priority_combine_", TORCH_BOX(&priority_combine_inplace_cpu));
}

}  // namespace mtlkernels
