#pragma once
// The CPU kernels behind the ops: no torch, no allocation visible to the caller. Each .cpp of this folder that includes
// vector.h is compiled once per instruction set into a namespace of its own; kernels() picks one at run time.

#include <cstdint>

#include "../common/finish.h"
#include "../common/gradient_dropout.h"
#include "../common/numeric.h"
#include "../common/paired_plan.h"

namespace mtlkernels::cpu {

/// The elements of a tensor in logical (row-major) order, or of several tensors that share `sizes`.
/// Adjacent dimensions are merged and dimensions of size 1 dropped by the caller where the strides of all rows allow it.
struct Layout {
  int64_t numel;
  int dim;               // 0: all rows lie flat in memory, element i at offset i
  const int64_t* sizes;  // [dim]
};

/// The K gradients of one tensor. All share a dtype and a layout; each has its own strides when the layout is not flat.
struct Column {
  const void* const* rows;        // [num_rows], null where a task has no gradient
  const int64_t* const* strides;  // [num_rows][layout.dim] in elements; unused when flat
  int num_rows;
  DType dtype;
  Layout layout;
};

/// Where the M results of one tensor go; the layout's sizes are the column's.
struct Output {
  void* const* rows;              // [num_rows]
  const int64_t* const* strides;  // [num_rows][layout.dim]; unused when flat
  int num_rows;
  bool stream;  // results are large and alias no gradient: store past the caches
};

/// The channels of a tensor, consecutive stretches of `rest` elements, and the top task of each. An index that is no row, or a
/// row that is null, leaves its channel without one.
struct Channels {
  const int64_t* top;  // [channels]
  int64_t rest;
};

/// What decides which of a tensor's gradients GradDrop drops.
struct Drop {
  const double* leak;  // [num_rows]
  const bool* active;  // [num_rows], or null for all; a row that is not active is not read
  uint64_t seed;
  uint32_t place;  // of the tensor in the list
};

/// What a trimmed mean leaves out: of an element's active gradients the `count` smallest and as many of the largest.
struct Trim {
  int64_t count;       // fewer where fewer than 2 count + 1 tasks are active: all but one or two
  const bool* active;  // [num_rows], or null for all; a row that is not active is not read
};

/// What gradient dropout multiplies a tensor with.
struct Noise {
  bool gaussian;  // draws are normal numbers; else 1 or 0
  NoiseLevel<float> narrow;
  NoiseLevel<double> wide;  // for float64 gradients
  uint64_t seed;
  uint32_t place;  // of the tensor in the list
};

struct Kernels {
  const char* name;

  /// Adds the inner products of rows [0, num_left) with rows [num_left, num_rows) over elements [begin, end), cut into segments
  /// of `segment` elements, to sums[segment][num_left][num_rows - num_left]. With num_left == num_rows: of all rows with each
  /// other, upper triangle only. With a form, the odd rows are first formed of themselves and the row before, in float32
  /// (float64) and in fast memory; num_left == num_rows then.
  void (*gram)(const Column& column, int num_left, PairForm form, int64_t begin, int64_t end, int64_t segment, double* sums);

  /// out[m] = sum_k weights[m][k] * row k over elements [begin, end), summed in float64 in the order of k. A row whose weight
  /// is exactly 0 is not read. A single output may be one of the rows.
  void (*combine)(const Column& column, const double* weights, int64_t begin, int64_t end, const Output& out);

  /// Both: adds the inner products of all rows to sums[num_rows][num_rows], upper triangle only, and writes out = sum_k
  /// weights[k] * row k, for elements [begin, end). Every row is read, a weight of exactly 0 leaves its row out of the result.
  /// `out` is one result, which may be one of the rows. The products have the bits of gram's.
  void (*gram_combine)(const Column& column, const double* weights, int64_t begin, int64_t end, const Output& out,
                       double* sums);

  /// One step of SGD or Adam along g = sum_k weights[k] row k over elements [begin, end): g as combine forms it, rounded to
  /// float32 (float64 of float64), in which the step is computed as mtlkernels/finish.py says. `moved` are the parameter and
  /// its states: the momentum, unless options.momentum is 0; or both moments, and with options.amsgrad the largest second one.
  void (*combine_sgd)(const Column& column, const double* weights, const SgdOptions& options, double lr, int64_t begin,
                      int64_t end, const Output& moved);
  void (*combine_adam)(const Column& column, const double* weights, const AdamOptions& options, double lr, double step,
                       int64_t begin, int64_t end, const Output& moved);

  /// out = a + radius b, or if `adaptive` a + radius a^2 b, for rows a and b over elements [begin, end), computed in float64.
  /// The output may be one of the rows.
  void (*perturb)(const Column& column, double radius, bool adaptive, int64_t begin, int64_t end, const Output& out);

  /// Over elements [begin, end) of a column of K gradients (null: counts as zero) and then K memories, float64 or float32 as
  /// the column's dtype is float64 or not, which are written: memory_k <- keep_k memory_k + scale_k row_k and out = sum_k
  /// weight_k memory_k, or if `squares` scale_k row_k^2 and out = sum_k weight_k row_k, computed in float32 where gradients and
  /// factors allow it, else in float64. `factors` [3][K] are keep, scale and weight. What has a factor of exactly 0 is not
  /// read; a memory that does not move is not written. The output may be one of the gradients.
  void (*memory_combine)(const Column& column, const double* factors, bool squares, int64_t begin, int64_t end,
                         const Output& out);

  /// sum_e h^2 / sqrt(S + h^2 + epsilon), h = factor g, over elements [begin, end) of a column of a gradient g and its memory
  /// S, which is float64 or float32 as the column's dtype is float64 or not.
  double (*excess_risk)(const Column& column, double factor, double epsilon, int64_t begin, int64_t end);

  /// Adds <row i, row j> over those elements of [begin, end) whose channel has top task i to inner[num_rows][num_rows].
  void (*priority_inner)(const Column& column, const Channels& channels, int64_t begin, int64_t end, double* inner);

  /// out = sum_k row k + alpha[i] row i over elements [begin, end), i the top task of an element's channel. The output may be
  /// one of the rows.
  void (*priority_combine)(const Column& column, const Channels& channels, const double* alpha, int64_t begin, int64_t end,
                           const Output& out);

  /// out = the positive or the negative part of the rows, as drop_signs of mtlkernels/elementwise.py, over elements [begin,
  /// end) in logical order; begin is a multiple of 4. The output may be one of the rows.
  void (*graddrop)(const Column& column, const Drop& drop, int64_t begin, int64_t end, const Output& out);
  /// out = the mean of the active rows' elements [begin, end) that are left, as trim_extremes of mtlkernels/elementwise.py; an
  /// absent row is zeros. The output may be one of the rows.
  void (*trimmed_mean)(const Column& column, const Trim& trim, int64_t begin, int64_t end, const Output& out);

  /// out = the only row times noise, as noise of mtlkernels/gradient_dropout.py, over elements [begin, end) in logical order;
  /// begin is a multiple of 4. The output may be the row.
  void (*gradient_dropout)(const Column& column, const Noise& noise, int64_t begin, int64_t end, const Output& out);
};

/// The kernels of the best instruction set this processor has, or of the one MTLKERNELS_CPU_CAPABILITY names
/// (baseline, avx2, avx512, avx512_bf16). An unknown or unsupported name gets the best one; the package refuses it before.
const Kernels& kernels();

}  // namespace mtlkernels::cpu
