// GradDrop on the CPU: an element's positive or its negative gradients, by a random number, each gradient read from memory
// once.
//
// In float32 (float64 for float64) in the order of the rows and without fused multiply-adds, as every backend does it: all give
// the same bits. Random words are drawn a few vectors at a time, so that drawing them overlaps with waiting for the memory.
//
// Cost: with AVX2, of which a vector holds four of Philox's 32 x 32 bit products, sixteen elements' words take 18
// multiplications, 18 shifts, 34 exclusive ors, an addition and two shuffles, 4.6 instructions an element; three tasks' signs
// take 23 for eight elements, 2.9 an element. That is 7.5 an element, 1.9 cycles where four start in each, 2.5 where three do:
// more than the 12 bytes of a read take a core from memory that delivers more than 6. AVX-512 needs less than half.

#include "blocks.h"
#include "random.h"
#include "vector.h"

namespace mtlkernels::cpu {
namespace {

static_assert(kBlock % kDraw == 0);
constexpr int kRows = 8;  // rows per sweep: their pointers and sums stay in registers

/// Sums of an element's K gradients, in one lane each: of the positive and of the negative magnitudes, and the leaks of both.
template <typename V>
struct Sides {
  V up, down, leaked_up, leaked_down;
};

/// The positive and the negative part of a vector, a NaN in both: minima and maxima take their second operand then.
#if defined(__AVX512F__)
inline FloatVector rise_of(FloatVector a) { return (FloatVector)_mm512_max_ps(__m512{}, (__m512)a); }
inline FloatVector fall_of(FloatVector a) { return (FloatVector)_mm512_min_ps(__m512{}, (__m512)a); }
#elif defined(__AVX2__)
inline FloatVector rise_of(FloatVector a) { return (FloatVector)_mm256_max_ps(__m256{}, (__m256)a); }
inline FloatVector fall_of(FloatVector a) { return (FloatVector)_mm256_min_ps(__m256{}, (__m256)a); }
#endif
template <typename V>
inline V rise_of(V a) {
  return a < 0 ? V{} : a;
}
template <typename V>
inline V fall_of(V a) {
  return a > 0 ? V{} : a;
}

/// Adds `value` to the sums of its side, a NaN to both.
template <bool Leaks, typename V>
inline void add(Sides<V>& sides, V value, V leak) {
  const V rise = rise_of(value), fall = fall_of(value);
  sides.up += rise;
  sides.down -= fall;
  if constexpr (Leaks) {
    sides.leaked_up += rise * leak;
    sides.leaked_down -= fall * leak;
  }
}

template <typename V>
inline V drawn(const Sides<V>& sides, V uniform) {
  const V total = sides.up + sides.down;
  return (sides.up > uniform * total ? sides.up - sides.leaked_down : sides.leaked_up - sides.down) + total * 0;
}

/// One sweep over R rows, whole vectors: from the sums of earlier sweeps (unless `First`) to those of the next or to `out`,
/// with the random words of elements from `begin` on.
template <typename S, int R, bool Leaks, bool First, bool Last>
void sweep(const S* const* rows, const S* leak, const Words& random, int64_t begin, int64_t count, S* sums, S* out,
           bool stream) {
  using V = Vector<S>;
  const S* row[R];
  V leaks[R];
  for (int r = 0; r < R; ++r) {
    row[r] = rows[r];
    leaks[r] = V{} + leak[r];
  }
  alignas(64) uint32_t words[kDraw];
  for (int64_t e = 0; e < count;) {
    int64_t word = (begin + e) % kDraw;  // 0 but for the last vector of a block
    if constexpr (Last) random.draw(begin + e - word, words);
    for (; word < kDraw && e < count; word += kLanes<S>, e += kLanes<S>) {
      Sides<V> sides{};
      if constexpr (!First) sides = load<Sides<V>>(sums + 4 * e);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) add<Leaks>(sides, load<V>(row[r] + e), leaks[r]);
      if constexpr (!Last) {
        store(sums + 4 * e, sides);
      } else if (stream) {
        store_streaming(out + e, drawn(sides, uniforms(words + word, S())));
      } else {
        store(out + e, drawn(sides, uniforms(words + word, S())));
      }
    }
  }
}

template <typename S>
using Sweep = void (*)(const S* const*, const S*, const Words&, int64_t, int64_t, S*, S*, bool);

template <typename S, bool Leaks, bool First>
Sweep<S> pick_last(int rows) {
  switch (rows) {
    case 1: return sweep<S, 1, Leaks, First, true>;
    case 2: return sweep<S, 2, Leaks, First, true>;
    case 3: return sweep<S, 3, Leaks, First, true>;
    case 4: return sweep<S, 4, Leaks, First, true>;
    case 5: return sweep<S, 5, Leaks, First, true>;
    case 6: return sweep<S, 6, Leaks, First, true>;
    case 7: return sweep<S, 7, Leaks, First, true>;
    default: return sweep<S, 8, Leaks, First, true>;
  }
}

/// The rows that count, over a block of whole vectors.
template <typename S, bool Leaks>
void drop_block(const S* const* rows, const S* leak, int num_rows, const Words& random, int64_t begin, int64_t count, S* sums,
                S* out, bool stream) {
  int r = 0;
  for (; r + kRows < num_rows; r += kRows) {
    const Sweep<S> run = r == 0 ? sweep<S, kRows, Leaks, true, false> : sweep<S, kRows, Leaks, false, false>;
    run(rows + r, leak + r, random, begin, count, sums, out, false);
  }
  const Sweep<S> run = r == 0 ? pick_last<S, Leaks, true>(num_rows) : pick_last<S, Leaks, false>(num_rows - r);
  run(rows + r, leak + r, random, begin, count, sums, out, stream);
}

/// Computed as S, written as T.
template <typename S, typename T>
void drop_range(const Column& column, const Drop& drop, int64_t begin, int64_t end, const Output& out) {
  const int num_rows = column.num_rows;
  Scratch scratch((size_t(num_rows + 5) * kBlock + size_t(num_rows)) * sizeof(S) + size_t(num_rows) * (sizeof(S*) + 4));
  S* values = scratch.as<S>();
  S* sums = values + num_rows * kBlock;
  S* results = sums + 4 * kBlock;
  S* leak = results + kBlock;
  const S** rows = reinterpret_cast<const S**>(leak + (num_rows + 1) / 2 * 2);
  int64_t block = 0;
  const Words random(drop.seed, drop.place);
  int used = 0;
  bool leaks = false;
  Scratch places(size_t(num_rows) * sizeof(int));
  int* task = places.as<int>();
  for (int k = 0; k < num_rows; ++k) {
    if (!column.rows[k] || (drop.active && !drop.active[k])) continue;
    task[used] = k;
    leak[used++] = S(drop.leak[k]);
    leaks |= drop.leak[k] != 0;
  }
  const auto run = leaks ? drop_block<S, true> : drop_block<S, false>;
  for_blocks<S, T>(
      column, begin, end, out, used, rows, values, results,
      [&](int64_t at, int64_t count) {
        for (int r = 0; r < used; ++r) rows[r] = read_row<S>(column, task[r], at, count, values + r * kBlock);
        block = at;
      },
      [&](int64_t from, int64_t count, S* to, bool stream) {
        run(rows, leak, used, random, block + from, count, sums, to, stream);
      });
}

}  // namespace

namespace MTL_ISA {

void graddrop(const Column& column, const Drop& drop, int64_t begin, int64_t end, const Output& out) {
  switch (column.dtype) {
    case DType::float32: return drop_range<float, float>(column, drop, begin, end, out);
    case DType::bfloat16: return drop_range<float, BFloat16>(column, drop, begin, end, out);
    case DType::float16: return drop_range<float, Float16>(column, drop, begin, end, out);
    case DType::float64: return drop_range<double, double>(column, drop, begin, end, out);
  }
}

}  // namespace MTL_ISA
}  // namespace mtlkernels::cpu
