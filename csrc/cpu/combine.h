#pragma once
// Weighted sums of task gradients, out_m[e] = sum_k w_mk * g_k[e], each row read from memory once, each result written once.
//
// Sums run in float64 in the order of k and are rounded to float32, then to 16 bits; the memory is slower than the arithmetic.
// Results that no cache could keep are stored past it, which saves reading the line before it is overwritten.

#include <type_traits>

#include "vector.h"

namespace mtlkernels::cpu {
namespace {

constexpr int64_t kBlock = 512;  // elements; a multiple of every vector and cache line
constexpr int kRows = 8;         // rows per sweep: their pointers and the output's stay in registers

/// What a sum is rounded to on its way to a T.
template <typename T>
using Rounded = std::conditional_t<sizeof(T) == 8, double, float>;

template <typename A, typename T>
inline Vector<A> load_as(const T* from) {
  if constexpr (std::is_same_v<A, double>) {
    return load_as_double(from);
  } else {
    return load<Vector<A>>(from);
  }
}

/// One sweep over up to kRows rows: from the sums of earlier sweeps (unless `First`) to the output or to the next sweep. Sums
/// are in A: double, or float for float rows.
template <typename T, typename A, int R, bool First, bool Last, bool Stream>
void sweep(const T* const* rows, const A* weights, int64_t count, A* sums, T* out) {
  constexpr int lanes = kLanes<A>;
  const T* row[R];
  Vector<A> weight[R];
  for (int r = 0; r < R; ++r) {
    row[r] = rows[r];
    weight[r] = Vector<A>{} + weights[r];
  }
  int64_t e = 0;
  for (; e + lanes <= count; e += lanes) {
    Vector<A> sum = First ? Vector<A>{} : load<Vector<A>>(sums + e);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      sum += weight[r] * load_as<A>(row[r] + e);
      if (e * int64_t(sizeof(T)) % 64 == 0) __builtin_prefetch(row[r] + e + kBlock);  // of the next block
    }
    if constexpr (!Last) {
      store(sums + e, sum);
    } else if constexpr (Stream) {
      store_streaming(out + e, sum);
    } else {
      store_cached(out + e, sum);
    }
  }
  for (; e < count; ++e) {
    A sum = First ? A(0) : sums[e];
    for (int r = 0; r < R; ++r) sum += weights[r] * A(to_float(row[r][e]));
    if constexpr (Last) {
      from_float(Rounded<T>(sum), out + e);
    } else {
      sums[e] = sum;
    }
  }
}

template <typename T, typename A>
using Sweep = void (*)(const T* const*, const A*, int64_t, A*, T*);

template <typename T, typename A, bool First, bool Last, bool Stream>
Sweep<T, A> pick_sweep(int rows) {
  switch (rows) {
    case 1: return sweep<T, A, 1, First, Last, Stream>;
    case 2: return sweep<T, A, 2, First, Last, Stream>;
    case 3: return sweep<T, A, 3, First, Last, Stream>;
    case 4: return sweep<T, A, 4, First, Last, Stream>;
    case 5: return sweep<T, A, 5, First, Last, Stream>;
    case 6: return sweep<T, A, 6, First, Last, Stream>;
    case 7: return sweep<T, A, 7, First, Last, Stream>;
    default: return sweep<T, A, 8, First, Last, Stream>;
  }
}

/// out = sum of `num_rows` weighted rows over one block.
template <typename T, typename A>
void combine_block(const T* const* rows, const A* weights, int num_rows, int64_t count, A* sums, T* out, bool stream) {
  if (num_rows == 0) {
    std::memset(out, 0, size_t(count) * sizeof(T));
    return;
  }
  for (int r = 0; r < num_rows; r += kRows) {
    const bool first = r == 0, last = r + kRows >= num_rows;
    const int now = last ? num_rows - r : kRows;
    const Sweep<T, A> run =
        !last    ? first ? pick_sweep<T, A, true, false, false>(now) : pick_sweep<T, A, false, false, false>(now)
           : first ? stream ? pick_sweep<T, A, true, true, true>(now) : pick_sweep<T, A, true, true, false>(now)
           : stream ? pick_sweep<T, A, false, true, true>(now)
                 : pick_sweep<T, A, false, true, false>(now);
    run(rows + r, weights + r, count, sums, out);
  }
}

/// The rows of `weights` [num_out][num_rows] over one block, read from rows[k] (null: no gradient) and written to to[m].
template <typename T, typename A = double>
class Block {
 public:
  explicit Block(int num_rows) : num_rows_(num_rows), scratch_(kBlock * sizeof(A) + size_t(num_rows) * 16) {
    sums_ = scratch_.as<A>();
    weights_ = sums_ + kBlock;
    rows_ = reinterpret_cast<const T**>(weights_ + num_rows);
  }

  void run(const T* const* rows, const A* weights, int64_t count, T* to, bool stream) {
    int used = 0;
    for (int k = 0; k < num_rows_; ++k) {
      if (!rows[k] || weights[k] == 0) continue;
      rows_[used] = rows[k];
      weights_[used++] = weights[k];
    }
    combine_block<T, A>(rows_, weights_, used, count, sums_, to, stream);
  }

 private:
  const int num_rows_;
  Scratch scratch_;
  A *sums_, *weights_;
  const T** rows_;
};

}  // namespace
}  // namespace mtlkernels::cpu
