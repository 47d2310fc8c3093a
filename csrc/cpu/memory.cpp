// Memories of task gradients and the update in one sweep: y_k <- keep_k y_k + scale_k g_k and out = sum_k weight_k y_k; with
// `squares` y_k <- keep_k y_k + scale_k g_k^2 and out = sum_k weight_k g_k. Each row is read from memory once, each memory and
// the result are written once.
//
// Computed in float32, as on CUDA; in float64 for 16-bit and float64 gradients, rows of any strides, and factors that leave
// float32's range. Up to eight tasks that read, move and weigh all they have go in one sweep, whose sums stay in registers;
// what other tasks add is in the first-level cache by then.

#include <type_traits>

#include "vector.h"

namespace mtlkernels::cpu {
namespace {

constexpr int64_t kBlock = 2048;  // elements; a multiple of every vector and cache line
constexpr int kTasks = 8;         // of a sweep
constexpr int kFollowed = 4;      // tasks whose two rows each the processor's own prefetching follows
constexpr int64_t kAhead = 512;   // elements that the others' rows are asked for before they are read

/// What becomes of one task. A factor that is exactly 0 leaves what it would multiply unread.
struct Task {
  double keep, scale, weight;

  bool moves() const { return keep != 1 || scale != 0; }
  bool reads_grad(bool squares) const { return scale != 0 || (squares && weight != 0); }
  bool reads_memory(bool squares) const { return keep != 0 && (moves() || (!squares && weight != 0)); }
};

/// One task over one block, computed as S: its memory and its part of the sums. Null: counts as zero.
template <typename T, typename S, bool squares>
void sweep(const T* grad, const Rounded<T>* before, Rounded<T>* after, Task task, int64_t count, S* sums) {
  const S scale = S(task.scale), weight = S(task.weight), keep = S(task.keep);
  const bool adds = grad && task.scale != 0, weighs = task.weight != 0;
  int64_t e = 0;
  for (; e + kLanes<S> <= count; e += kLanes<S>) {
    const Vector<S> g = grad ? load_as<S>(grad + e) : Vector<S>{};
    Vector<S> y = before ? keep * load_as<S>(before + e) : Vector<S>{};
    if (adds) y += scale * (squares ? g * g : g);
    if (after) store_cached(after + e, y);
    if (weighs) store(sums + e, load<Vector<S>>(sums + e) + weight * (squares ? g : y));
  }
  for (; e < count; ++e) {
    const S g = grad ? S(to_float(grad[e])) : S(0);
    S y = before ? keep * S(before[e]) : S(0);
    if (adds) y += scale * (squares ? g * g : g);
    if (after) after[e] = Rounded<T>(y);
    if (weighs) sums[e] += weight * (squares ? g : y);
  }
}

template <typename T, typename S>
void sweep(const T* grad, Rounded<T>* memory, Task task, bool squares, int64_t count, S* sums) {
  const Rounded<T>* before = task.reads_memory(squares) ? memory : nullptr;
  Rounded<T>* after = task.moves() ? memory : nullptr;
  return squares ? sweep<T, S, true>(grad, before, after, task, count, sums)
                 : sweep<T, S, false>(grad, before, after, task, count, sums);
}

/// The sums from element `e` on, rounded.
template <typename T, typename S>
void write(const S* sums, int64_t e, int64_t count, bool stream, T* to) {
  for (; e + kLanes<S> <= count; e += kLanes<S>) {
    const Vector<S> sum = load<Vector<S>>(sums + e);
    if (stream) {
      store_streaming(to + e, sum);
    } else {
      store_cached(to + e, sum);
    }
  }
  for (; e < count; ++e) from_float(Rounded<T>(sums[e]), to + e);
}

/// Tasks that read, move and weigh all they have, and where one block of them lies.
template <typename T>
struct Whole {
  const T** grads;
  Rounded<T>** memories;
  Task* tasks;
};

/// One sweep over R of them: from the sums so far (unless `First`, which has none) to `to`, or if that is null to the sums.
template <typename T, typename S, bool squares, int R, bool First>
void sweep_whole(Whole<T> whole, int64_t count, S* sums, T* to, bool stream) {
  const T* grad[R];
  Rounded<T>* memory[R];
  Vector<S> keep[R], scale[R], weight[R];
  for (int r = 0; r < R; ++r) {
    grad[r] = whole.grads[r];
    memory[r] = whole.memories[r];
    keep[r] = Vector<S>{} + S(whole.tasks[r].keep);
    scale[r] = Vector<S>{} + S(whole.tasks[r].scale);
    weight[r] = Vector<S>{} + S(whole.tasks[r].weight);
  }
  int64_t e = 0;
  for (; e + kLanes<S> <= count; e += kLanes<S>) {
    if (R > kFollowed && e * int64_t(sizeof(S)) % 64 == 0) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        __builtin_prefetch(grad[r] + e + kAhead);
        __builtin_prefetch(memory[r] + e + kAhead, 1);
      }
    }
    Vector<S> sum = First ? Vector<S>{} : load<Vector<S>>(sums + e);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vector<S> g = load_as<S>(grad[r] + e);
      const Vector<S> y = keep[r] * load_as<S>(memory[r] + e) + scale[r] * (squares ? g * g : g);
      sum += weight[r] * (squares ? g : y);
      store_cached(memory[r] + e, y);
    }
    if (!to) {
      store(sums + e, sum);
    } else if (stream) {
      store_streaming(to + e, sum);
    } else {
      store_cached(to + e, sum);
    }
  }
  if (First) std::memset(sums + e, 0, size_t(count - e) * sizeof(S));
  for (int r = 0; r < R; ++r)
    sweep<T, S, squares>(grad[r] + e, memory[r] + e, memory[r] + e, whole.tasks[r], count - e, sums + e);
  if (to) write(sums, e, count, false, to);
}

template <typename T, typename S>
using Sweep = void (*)(Whole<T>, int64_t, S*, T*, bool);

template <typename T, typename S, bool squares, bool First>
Sweep<T, S> pick_sweep(int tasks) {
  switch (tasks) {
    case 1: return sweep_whole<T, S, squares, 1, First>;
    case 2: return sweep_whole<T, S, squares, 2, First>;
    case 3: return sweep_whole<T, S, squares, 3, First>;
    case 4: return sweep_whole<T, S, squares, 4, First>;
    case 5: return sweep_whole<T, S, squares, 5, First>;
    case 6: return sweep_whole<T, S, squares, 6, First>;
    case 7: return sweep_whole<T, S, squares, 7, First>;
    default: return sweep_whole<T, S, squares, 8, First>;
  }
}

/// `used` tasks, one or more, and the result. `first`: there are no sums yet.
template <typename T, typename S, bool squares>
void finish(Whole<T> whole, int used, bool first, int64_t count, S* sums, T* to, bool stream) {
  for (int r = 0; r < used; r += kTasks, first = false) {
    const int now = used - r < kTasks ? used - r : kTasks;
    const Sweep<T, S> run = first ? pick_sweep<T, S, squares, true>(now) : pick_sweep<T, S, squares, false>(now);
    run({whole.grads + r, whole.memories + r, whole.tasks + r}, count, sums, r + now == used ? to : nullptr, stream);
  }
}

/// Rows, memories and result lie flat in memory in one order.
template <typename T, typename S>
void combine_flat(const Column& column, const Task* tasks, bool squares, int64_t begin, int64_t end, const Output& out) {
  const int num_tasks = column.num_rows / 2;
  Scratch scratch(kBlock * sizeof(S) + size_t(num_tasks) * sizeof(Task)), pointers(size_t(num_tasks) * 16);
  S* sums = scratch.as<S>();
  const Whole<T> whole{pointers.as<const T*>(), pointers.as<Rounded<T>*>(num_tasks), reinterpret_cast<Task*>(sums + kBlock)};
  std::memset(sums, 0, kBlock * sizeof(S));  // what there is without tasks
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    T* to = static_cast<T*>(out.rows[0]) + at;
    const bool stream = out.stream && reinterpret_cast<uintptr_t>(to) % 64 == 0;
    int used = 0;
    for (int k = 0; k < num_tasks; ++k) {
      const Task task = tasks[k];
      const T* grad = static_cast<const T*>(column.rows[k]);
      Rounded<T>* memory = static_cast<Rounded<T>*>(const_cast<void*>(column.rows[num_tasks + k])) + at;
      if (grad && task.keep != 0 && task.scale != 0 && task.weight != 0) {
        whole.grads[used] = grad + at;
        whole.memories[used] = memory;
        whole.tasks[used++] = task;
        continue;
      }
      if (k == used) std::memset(sums, 0, size_t(count) * sizeof(S));  // the first of its kind
      sweep(grad && task.reads_grad(squares) ? grad + at : nullptr, memory, task, squares, count, sums);
    }
    if (used == 0) {
      write(sums, 0, count, stream, to);
    } else {
      const auto run = squares ? finish<T, S, true> : finish<T, S, false>;
      run(whole, used, used == num_tasks, count, sums, to, stream);
    }
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
    write(sums, 0, count, false, grads);
    scatter(grads, column.layout, out.strides[0], at, count, static_cast<T*>(out.rows[0]));
  }
}

template <typename T>
void combine_range(const Column& column, const double* factors, bool squares, int64_t begin, int64_t end, const Output& out) {
  const int num_tasks = column.num_rows / 2;
  Scratch scratch(size_t(num_tasks) * sizeof(Task));
  Task* tasks = scratch.as<Task>();
  for (int k = 0; k < num_tasks; ++k) tasks[k] = {factors[k], factors[num_tasks + k], factors[2 * num_tasks + k]};
  if (column.layout.dim != 0) return combine_strided<T, Rounded<T>>(column, tasks, squares, begin, end, out);
  if constexpr (std::is_same_v<T, float>) {
    if (fit_float(factors, 3 * num_tasks)) return combine_flat<T, float>(column, tasks, squares, begin, end, out);
  }
  combine_flat<T, double>(column, tasks, squares, begin, end, out);
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
