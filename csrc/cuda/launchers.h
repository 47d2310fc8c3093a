#pragma once
// What the bindings call: pointers, sizes and a stream in, launches out. No torch, no CUDA headers.

#include <vector>

#include "../common/finish.h"
#include "../common/gram_plan.h"
#include "../common/kxk_plan.h"
#include "../common/memory_plan.h"
#include "../common/mix_plan.h"
#include "../common/paired_plan.h"
#include "../common/priority.h"
#include "../common/trim_plan.h"

namespace mtlkernels::cuda {

/// A CUDA stream, as torch hands it over.
using Stream = void*;

/// out = sum_k w_k g_k for every tensor; the tensors share a dtype. A tensor's pointers are its `num_rows` gradients (null
/// where absent), its result, and its `num_rows` float64 weights on the device. Asynchronous on `stream`; the current device is
/// the tensors'. Returns null, or what CUDA says went wrong.
const char* combine(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, Stream stream);

/// The same with weights for each channel. A tensor's weights are [channels, num_rows], its last pointer is the elements of a
/// channel as an integer, and its size its number of channels.
const char* combine_channels(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, Stream stream);

/// A step of SGD or Adam along sum_k w_k g_k for every tensor; the tensors share a dtype. A tensor's pointers are its
/// `num_rows` gradients (null where absent), its parameter, its `num_rows` float64 weights on the device, its states (one of
/// SGD, three of Adam; null where there is none), and its float32 step on the device (null for SGD). `lr` and `skip` (or null)
/// lie on the device. Otherwise as combine.
const char* combine_sgd(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, const double* lr,
                        const bool* skip, const SgdOptions& options, Stream stream);
const char* combine_adam(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, const double* lr,
                         const bool* skip, const AdamOptions& options, Stream stream);

/// out[m] = sum_k C[m][k] g_k for every tensor; the tensors share a dtype. A tensor's pointers are its `num_rows` gradients
/// (kMixRows at most; null where absent) and its `num_results` results (kMixResults at most). `coefficients` [num_results,
/// num_rows] on the device. Otherwise as combine.
const char* mix(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, int num_results,
                const double* coefficients, Stream stream);

/// priority_combine for every tensor; the tensors share a dtype. A tensor's pointers are its `num_tasks` gradients
/// (kPriorityTasks at most; null where absent), its result, its top tasks (null for a plain sum), float64 scratch [blocks *
/// num_tasks^2 + num_tasks], and the words of its PriorityShape; its size is the shape's blocks, twice that with top tasks.
/// `state` [2 * tensors] int32, zeroed. Otherwise as combine.
const char* priority_combine(DType dtype, const std::vector<PlannedTensor>& tensors, int num_tasks, bool skip_degenerate,
                             int32_t* state, Stream stream);

/// connection_strength of every layer. A layer's pointers are its channels' squares, its scale and variance (all of them
/// float32 or all float64), its strengths, its top tasks, and the numbers of tasks and channels as integers; its size is 1.
/// Otherwise as combine.
const char* connection_strength(DType dtype, const std::vector<PlannedTensor>& layers, double eps, Stream stream);

/// out = a + r b, adaptive: a + r a^2 b, for every tensor; the tensors share a dtype. A tensor's pointers are a, b, its result
/// and the float64 r on the device. Otherwise as combine.
const char* perturb(DType dtype, const std::vector<PlannedTensor>& tensors, bool adaptive, Stream stream);

/// graddrop for every tensor; the tensors share a dtype. A tensor's pointers are its `num_rows` gradients (null where absent),
/// its result, and its index in the list as an integer. `leak` [num_rows], `active` [num_rows] or null for all, and one seed on
/// the device. Otherwise as combine.
const char* graddrop(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, const double* leak,
                     const bool* active, const int64_t* seed, Stream stream);

/// gradient_dropout for every tensor; the tensors share a dtype. A tensor's pointers are its gradient, its result, and its
/// index in the list as an integer. One rate `p` and one seed on the device. Otherwise as combine.
const char* gradient_dropout(DType dtype, const std::vector<PlannedTensor>& tensors, bool gaussian, const double* p,
                             const int64_t* seed, Stream stream);

/// trimmed_mean for every tensor; the tensors share a dtype. A tensor's pointers are its `num_rows` gradients (1024 at most;
/// null where absent, which counts as zeros) and its result. `trim` is kMostTrimmed at most; `active` [num_rows] or null for
/// all, on the device. Otherwise as combine.
const char* trimmed_mean(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, int trim, const bool* active,
                         Stream stream);

/// memory <- keep memory + scale g and out = sum_k weight_k memory_k for every tensor, with `squares` of g^2 and of g; the
/// tensors share a dtype. A tensor's pointers are its `num_tasks` gradients (kMemoryTasks at most; null where absent), as many
/// memories, float32 or beside float64 gradients float64, and its result; `factors` [3, num_tasks] on the device are keep,
/// scale and weight. Otherwise as combine.
const char* memory_combine(DType dtype, const std::vector<PlannedTensor>& tensors, int num_tasks, const double* factors,
                           bool squares, Stream stream);

/// Stage one of excess_risk: sums[chunk] = sum_e h^2 / sqrt(S + h^2 + epsilon), h = factor g, for the chunks of every tensor;
/// the tensors share a dtype. A tensor's pointers are a gradient g, its memory S, float32 or beside float64 gradients float64,
/// its float64 factor and its float64 sums, on the device. Otherwise as combine.
const char* excess_risk_chunks(DType dtype, const std::vector<PlannedTensor>& tensors, double epsilon, Stream stream);

/// Stage one of gram: partials[block][pair of the row class] for the blocks of all tensors, in their order; the tensors share a
/// dtype and their pointers are `num_rows` gradients. `first_block` blocks of `partials` are taken already. Otherwise as
/// combine.
const char* gram_chunks(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, int32_t first_block,
                        double* partials, Stream stream);

/// As gram_chunks, of rows in pairs: `num_rows` is even, and the odd rows of a tensor's pointers are formed.
const char* paired_gram_chunks(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, PairForm form,
                               int32_t first_block, double* partials, Stream stream);

/// As gram_chunks, of kGramCombineTasks rows at most, with the weighted sum of each tensor's rows. A tensor's pointers are
/// those of combine.
const char* gram_combine_chunks(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, int32_t first_block,
                                double* partials, Stream stream);

/// Blocks [begin, end) of stage one make up matrix `slot`.
struct Slot {
  int32_t slot, begin, end;
};

/// Stage two: gram[slot][num_rows][num_rows] from the partials. With `num_other`, stage one had that many rows more, and
/// gram[slot][num_rows][num_other] are the products of the first rows with those.
const char* gram_finish(const std::vector<Slot>& slots, int num_rows, int num_other, const double* partials, double* gram,
                        Stream stream);

/// Gram matrices of channels. A tensor's pointers are `num_rows` + `num_other` gradients, its results, a matrix as gram_finish
/// makes them for each channel, and the elements of a channel as an integer; its size is its number of channels.
const char* gram_channels(DType dtype, const std::vector<PlannedTensor>& tensors, int num_rows, int num_other, Stream stream);

// The K x K stage on Grams [problems, size, size], of at most kKxkMaxTasks tasks and 1 to 2^31 - 1 problems. Asynchronous, as
// all of these. Functions, orders and results: common/kxk.h and common/kxk_weights.h.

/// result [problems, size, size] or [problems]; Grams and result are both float32 or both float64.
const char* gram_function(GramFunction function, DType dtype, const void* gram, int64_t problems, int size, void* result,
                          Stream stream);

/// weights [problems, size] over the tasks where `active` [problems, size] is true; the others get 0. Null: all are.
const char* solve(Solver solver, const double* gram, int64_t problems, int size, const bool* active, SolverOptions options,
                  double* weights, Stream stream);

/// result [problems, size, size] for orders [problems, size, steps]; a row whose order holds what is no task index is NaN.
const char* projection_coefficients(const double* gram, int64_t problems, int size, const int64_t* order, int64_t steps,
                                    bool conflict_only, double* result, Stream stream);

/// weights [problems, size] for orders drawn from one seed on the device.
const char* pcgrad_weights(const double* gram, int64_t problems, int size, const int64_t* seed, double* weights, Stream stream);

/// weights [problems, size] and new_phi [problems, size, size] for phi like new_phi; in orders [problems, size, steps], or
/// where that is null in those drawn from one seed on the device.
const char* gradvac_weights(const double* gram, int64_t problems, int size, const double* phi, const int64_t* order,
                            int64_t steps, const int64_t* seed, double beta, double epsilon, double* weights, double* new_phi,
                            Stream stream);

}  // namespace mtlkernels::cuda
