// Memories of task gradients and the update in one sweep: y_k <- keep_k y_k + scale_k g_k and out = sum_k weight_k y_k; with
// `squares` y_k <- keep_k y_k + scale_k g_k^2 and out = sum_k weight_k g_k. Each row is read from memory once, each memory and
// the result are written once.
//
// Computed in float64; what is stored is rounded to its dtype. Sums stay in the first-level cache. Tasks that read, move and
// weigh all they have come last, up to four in a sweep.

#include <type_traits>

#include "vector.h"

namespace mtlkernels::cpu {
namespace {

constexpr int64_t kBlock = 2048;  // elements; a multiple of every vector and cache line

/// A memory's elements: float32 for 16-bit gradients.
template <typename T>
using Wide = std::conditional_t<sizeof(T) == 8, double, float>;

/// What becomes of one task. A factor that is exactly 0 leaves what it would multiply unread.
struct Task {
  double keep, scale, weight;

  bool moves() const { return keep != 1 || scale != 0; }
  bool reads_grad(bool squares) const { return scale != 0 || (squares && weight != 0); }
  bool reads_memory(bool squares) const { return keep != 0 && (moves() || (!squares && weight != 0)); }
};

/// One task over one block: its memory and its part of the sums. Null: counts as zero.
template <typename T, bool squares>
void sweep(const T* grad, const Wide<T>* before, Wide<T>* after, Task task, int64_t count, double* sums) {
  constexpr int lanes = kLanes<double>;
  const DoubleVector keep = DoubleVector{} + task.keep, scale = DoubleVector{} + task.scale,
                     weight = DoubleVector{} + task.weight;
  const bool adds = grad && task.scale != 0, weighs = task.weight != 0;
  int64_t e = 0;
  for (; e + lanes <= count; e += lanes) {
    const DoubleVector g = grad ? load_as_double(grad + e) : DoubleVector{};
    DoubleVector y = before ? keep * load_as_double(before + e) : DoubleVector{};
    if (adds) y += scale * (squares ? g * g : g);
    if (after) store_cached(after + e, y);
    if (weighs) store(sums + e, load<DoubleVector>(sums + e) + weight * (squares ? g : y));
  }
  for (; e < count; ++e) {
    const double g = grad ? double(to_float(grad[e])) : 0.0;
    double y = before ? task.keep * double(before[e]) : 0.0;
    if (adds) y += task.scale * (squares ? g * g : g);
    if (after) after[e] = Wide<T>(y);
    if (weighs) sums[e] += task.weight * (squares ? g : y);
  }
}

template <typename T>
void sweep(const T* grad, Wide<T>* memory, Task task, bool squares, int64_t count, double* sums) {
  const Wide<T>* before = task.reads_memory(squares) ? memory : nullptr;
  Wide<T>* after = task.moves() ? memory : nullptr;
  return squares ? sweep<T, true>(grad, before, after, task, count, sums)
                 : sweep<T, false>(grad, before, after, task, count, sums);
}

/// R tasks over one block that read, move and weigh all they have: in one sweep, so that every row is a long stream.
template <typename T, bool squares, int R>
void sweep_whole(const T* const* grads, Wide<T>* const* memories, const Task* tasks, int64_t count, double* sums) {
  constexpr int lanes = kLanes<double>;
  const T* grad[R];
  Wide<T>* memory[R];
  DoubleVector keep[R], scale[R], weight[R];
  for (int r = 0; r < R; ++r) {
    grad[r] = grads[r];
    memory[r] = memories[r];
    keep[r] = DoubleVector{} + tasks[r].keep;
    scale[r] = DoubleVector{} + tasks[r].scale;
    weight[r] = DoubleVector{} + tasks[r].weight;
  }
  int64_t e = 0;
  for (; e + lanes <= count; e += lanes) {
    DoubleVector sum = load<DoubleVector>(sums + e);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const DoubleVector g = load_as_double(grad[r] + e);
      const DoubleVector y = keep[r] * load_as_double(memory[r] + e) + scale[r] * (squares ? g * g : g);
      store_cached(memory[r] + e, y);
      sum += weight[r] * (squares ? g : y);
    }
    store(sums + e, sum);
  }
  for (int r = 0; r < R; ++r) sweep<T, squares>(grad[r] + e, memory[r] + e, memory[r] + e, tasks[r], count - e, sums + e);
}

/// The same for `used` tasks.
template <typename T, bool squares>
void sweep_whole(const T* const* grads, Wide<T>* const* memories, const Task* tasks, int used, int64_t count, double* sums) {
  int r = 0;
  for (; r + 4 <= used; r += 4) sweep_whole<T, squares, 4>(grads + r, memories + r, tasks + r, count, sums);
  if (r + 2 <= used) {
    sweep_whole<T, squares, 2>(grads + r, memories + r, tasks + r, count, sums);
    r += 2;
  }
  if (r < used) sweep_whole<T, squares, 1>(grads + r, memories + r, tasks + r, count, sums);
}

/// The block's sums, rounded.
template <typename T>
void write(const double* sums, int64_t count, bool stream, T* to) {
  constexpr int lanes = kLanes<double>;
  int64_t e = 0;
  for (; e + lanes <= count; e += lanes) {
    const DoubleVector sum = load<DoubleVector>(sums + e);
    if (stream) {
      store_streaming(to + e, sum);
    } else {
      store_cached(to + e, sum);
    }
  }
  for (; e < count; ++e) from_float(Wide<T>(sums[e]), to + e);
}

/// Rows, memories and result lie flat in memory in one order.
template <typename T>
void combine_flat(const Column& column, const Task* tasks, bool squares, int64_t begin, int64_t end, const Output& out) {
  const int num_tasks = column.num_rows / 2;
  Scratch scratch(kBlock * sizeof(double) + size_t(num_tasks) * sizeof(Task));
  double* sums = scratch.as<double>();
  Task* whole = reinterpret_cast<Task*>(sums + kBlock);
  Scratch pointers(size_t(num_tasks) * 16);
  const T** grads = pointers.as<const T*>();
  Wide<T>** memories = pointers.as<Wide<T>*>(num_tasks);
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    std::memset(sums, 0, size_t(count) * sizeof(double));
    int used = 0;
    for (int k = 0; k < num_tasks; ++k) {
      const Task task = tasks[k];
      const T* grad = static_cast<const T*>(column.rows[k]);
      Wide<T>* memory = static_cast<Wide<T>*>(const_cast<void*>(column.rows[num_tasks + k])) + at;
      if (grad && task.keep != 0 && task.scale != 0 && task.weight != 0) {
        grads[used] = grad + at;
        memories[used] = memory;
        whole[used++] = task;
      } else {
        sweep(grad && task.reads_grad(squares) ? grad + at : nullptr, memory, task, squares, count, sums);
      }
    }
    squares ? sweep_whole<T, true>(grads, memories, whole, used, count, sums)
            : sweep_whole<T, false>(grads, memories, whole, used, count, sums);
    T* to = static_cast<T*>(out.rows[0]) + at;
    write(sums, count, out.stream && reinterpret_cast<uintptr_t>(to) % 64 == 0, to);
  }
  if (out.stream) fence_streaming();
}

/// Any strides: blocks of a task are gathered as W, and what is written is scattered.
template <typename T, typename W>
void combine_strided(const Column& column, const Task* tasks, bool squares, int64_t begin, int64_t end, const Output& out) {
  const int num_tasks = column.num_rows / 2;
  Column memories = column;
  memories.dtype = sizeof(W) == 8 ? DType::float64 : DType::float32;
  Scratch scratch(kBlock * (sizeof(double) + 2 * sizeof(W)));
  double* sums = scratch.as<double>();
  W *grads = reinterpret_cast<W*>(sums + kBlock), *memory = grads + kBlock;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    std::memset(sums, 0, size_t(count) * sizeof(double));
    for (int k = 0; k < num_tasks; ++k) {
      const Task task = tasks[k];
      const bool reads = column.rows[k] && task.reads_grad(squares);
      const W* grad = reads ? read_row<W>(column, k, at, count, grads) : nullptr;
      if (task.reads_memory(squares)) read_row<W>(memories, num_tasks + k, at, count, memory);
      sweep(grad, memory, task, squares, count, sums);
      if (task.moves()) {
        W* to = static_cast<W*>(const_cast<void*>(column.rows[num_tasks + k]));
        scatter(memory, column.layout, column.strides[num_tasks + k], at, count, to);
      }
    }
    write(sums, count, false, grads);
    scatter(grads, column.layout, out.strides[0], at, count, static_cast<T*>(out.rows[0]));
  }
}

template <typename T>
void combine_range(const Column& column, const double* factors, bool squares, int64_t begin, int64_t end, const Output& out) {
  const int num_tasks = column.num_rows / 2;
  Scratch scratch(size_t(num_tasks) * sizeof(Task));
  Task* tasks = scratch.as<Task>();
  for (int k = 0; k < num_tasks; ++k) tasks[k] = {factors[k], factors[num_tasks + k], factors[2 * num_tasks + k]};
  if (column.layout.dim == 0) {
    combine_flat<T>(column, tasks, squares, begin, end, out);
  } else {
    combine_strided<T, Wide<T>>(column, tasks, squares, begin, end, out);
  }
}

}  // namespace

namespace MTL_ISA {

void memory_combine(const Column& column, const double* factors, bool squares, int64_t begin, int64_t end, const Output& out) {
  if (begin >= end) return;
  switch (column.dtype) {
    case DType::float32: return combine_range<float>(column, factors, squares, begin, end, out);
    case DType::bfloat16: return combine_range<BFloat16>(column, factors, squares, begin, end, out);
    case DType::float16: return combine_range<Float16>(column, factors, squares, begin, end, out);
    case DType::float64: return combine_range<double>(column, factors, squares, begin, end, out);
  }
}

}  // namespace MTL_ISA
}  // namespace mtlkernels::cpu
