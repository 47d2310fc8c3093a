#pragma once
// priority_combine and priority_combine_, as far as they are the same on every device.

#include "columns.h"

namespace mtlkernels {

/// The tensors of a call with the top tasks of their channels.
struct Layers {
  const TensorList& grads;
  TensorList top;  // contiguous int64 [channels], or none: a plain sum
  int64_t num_tasks;
  bool skip_degenerate;
};

/// Brings the top tasks into one stretch of memory each.
Layers layers_of(const TensorList& grads, const TensorList& top, int64_t num_tasks, bool skip_degenerate);

/// A device's part: out[n] for every tensor. An output may be one of its own column's gradients.
using RunPriority = void (*)(const Layers& layers, std::vector<Tensor>& out);

std::vector<Tensor> priority_combine(const Layers& layers, RunPriority run);
void priority_combine_into(const std::vector<Tensor>& out, const Layers& layers, RunPriority run);

/// Checks the top tasks of tensor `n` against its channels. Returns their memory, null where there are none.
const int64_t* tops_of(const Layers& layers, const Columns& columns, int64_t n);

/// Checks the operands of connection_strength: float64 squares of all channels, and for each layer scale and variance [K, C],
/// both float32 or both float64, on one device.
void check_strengths(const Tensor& squares, const std::vector<Tensor>& scales, const std::vector<Tensor>& running_vars);

}  // namespace mtlkernels
