#pragma once
// combine, combine_channels, both in place, and mix, as far as they are the same on every device.

#include "columns.h"

namespace mtlkernels {

/// num_out * N new tensors, result-major, each like the first gradient of its column.
std::vector<Tensor> new_results(const TensorList& grads, int64_t num_tasks, int64_t num_out);

/// Buffers, num_out of each column and result-major, that share memory with another buffer or with a gradient that is not
/// exactly their own: their results must be kept aside until every gradient has been read.
std::vector<int64_t> entangled(const std::vector<Tensor>& out, const TensorList& grads, int64_t num_tasks, int64_t num_out = 1);

/// What a row of weights is for.
enum class Per { result, tensor, channel };

/// A device's part: out[m][n] = sum_k weights[m][k] * grads[k][n], `weights` [num_out, num_tasks]. Or num_out is 1 and there is
/// a row of weights for each tensor, or for each channel of all tensors (rows of a tensor viewed as [channels, rest]). An
/// output may be one of its own column's gradients when num_out is 1.
using RunCombine = void (*)(const TensorList& grads, int64_t num_tasks, const Tensor& weights, Per per,
                            std::vector<Tensor>& out, int64_t num_out);

/// With weights [num_tasks] or [N, num_tasks], or `per_channel` [sum of channels, num_tasks].
std::vector<Tensor> combine(const TensorList& grads, const Tensor& weights, bool per_channel, RunCombine run);
void combine_into(const std::vector<Tensor>& out, const TensorList& grads, const Tensor& weights, bool per_channel,
                  RunCombine run);
std::vector<Tensor> mix(const TensorList& grads, const Tensor& coefficients, RunCombine run);

/// The op combine_ on CUDA, which others end with.
void combine_inplace_cuda(std::vector<Tensor> out, TensorList grads, Tensor weights);

}  // namespace mtlkernels
