#pragma once
// Weighted sums of task gradients, out_m[e] = sum_k w_mk * g_k[e], each row read from memory once, each result written once.
//
// Sums run in float64 in the order of k and are rounded to float32, then to 16 bits; the memory is slower than the arithmetic.
// Those of bfloat16 rows are float32 where vectors have 64 bytes and every weight is within float32's range: there it is not.
// Results that no cache could keep are stored past it, which saves reading the line before it is overwritten.

#include "vector.h"
#include "weighted_sum.h"

namespace mtlkernels::cpu {
namespace {

// Elements of a block that is combined once: the processor's own prefetching gains from long stretches of each row, and the
// sums of sweeps stay in the first-level cache. A multiple of every vector and cache line.
constexpr int64_t kLongBlock = 2048;

/// Rounds sums to where they belong. `Ahead`: rows are asked for.
template <typename T, bool Stream, bool Ahead>
struct Store {
  static constexpr int64_t kAhead = Ahead ? kBlock : 0;
  T* out;

  template <typename V>
  void operator()(int64_t e, V sum) const {
    if constexpr (Stream) {
      store_streaming(out + e, sum);
    } else {
      store_cached(out + e, sum);
    }
  }
  template <typename V>
  void last(int64_t e, int64_t count, V sum) const {
    T some[sizeof(V) / sizeof(sum[0])];
    store_cached(some, sum);
    std::memcpy(out + e, some, size_t(count) * sizeof(T));
  }
};

/// The rows of `weights` [num_out][num_rows] over up to kLongBlock elements, read from rows[k] (null: no gradient) and written
/// to to[m].
template <typename T, typename A = double>
class Block {
 public:
  explicit Block(int num_rows) : num_rows_(num_rows), scratch_(kLongBlock * sizeof(A) + size_t(num_rows) * 16) {
    sums_ = scratch_.as<A>();
    weights_ = sums_ + kLongBlock;
    rows_ = reinterpret_cast<const T**>(weights_ + num_rows);
  }

  /// Reads the rows from their element `from` on.
  void run(const T* const* rows, const A* weights, int64_t count, T* to, bool stream, int64_t from = 0) {
    int used = 0;
    for (int k = 0; k < num_rows_; ++k) {
      if (!rows[k] || weights[k] == 0) continue;
      rows_[used] = rows[k] + from;
      weights_[used++] = weights[k];
    }
    if (used == 0) {
      std::memset(to, 0, size_t(count) * sizeof(T));
    } else if (sizeof(T) == 4 && used <= kRows) {  // which the processor follows by itself; 16-bit rows it does not
      stream ? sum_block(rows_, weights_, used, count, sums_, Store<T, true, false>{to})
             : sum_block(rows_, weights_, used, count, sums_, Store<T, false, false>{to});
    } else {
      stream ? sum_block(rows_, weights_, used, count, sums_, Store<T, true, true>{to})
             : sum_block(rows_, weights_, used, count, sums_, Store<T, false, true>{to});
    }
  }

 private:
  const int num_rows_;
  Scratch scratch_;
  A *sums_, *weights_;
  const T** rows_;
};

}  // namespace
}  // namespace mtlkernels::cpu
