#pragma once
// combine, combine_ and mix, as far as they are the same on every device.

#include "columns.h"

namespace mtlkernels {

/// Columns whose buffer shares memory with another buffer or with a gradient that is not exactly its own: their results must
/// be kept aside until every gradient has been read.
std::vector<int64_t> entangled(const std::vector<Tensor>& out, const TensorList& grads, int64_t num_tasks);

/// A device's part: out[m][n] = sum_k weights[n][m][k] * grads[k][n]. `weights` is [num_out, num_tasks], or with `per_tensor`
/// [N, num_tasks] and num_out is 1. An output may be one of its own column's gradients when num_out is 1.
using RunCombine = void (*)(const TensorList& grads, int64_t num_tasks, const Tensor& weights, bool per_tensor,
                            std::vector<Tensor>& out, int64_t num_out);

std::vector<Tensor> combine(const TensorList& grads, const Tensor& weights, RunCombine run);
void combine_into(const std::vector<Tensor>& out, const TensorList& grads, const Tensor& weights, RunCombine run);
std::vector<Tensor> mix(const TensorList& grads, const Tensor& coefficients, RunCombine run);

}  // namespace mtlkernels
