#pragma once
// Gram matrix for more than eight tasks, of 16 bits for more than four, on the tensor cores.
//
// With X the rows [R, elements], G = X X'. Lane l of a warp loads 16 bytes of rows l / 4, l / 4 + 8, ..., at quarter l % 4 of
// 64 bytes. These registers are the fragments of X as a matrix instruction wants them, and of X', too, because a sum over the
// elements takes them in any order: each row goes from memory to the tensor cores and nowhere else.
//
// 16-bit products are exact in float32. A float32 element is the exact sum of three bfloat16, and six of the nine products of
// their parts make up the product to 2^-24 of its size. float64 has its own instruction. Matrix instructions cut off rather
// than round, so few follow each other before their sum is added to a total, and totals are added in float64.

#include <type_traits>

#include "gram.cuh"

namespace mtlkernels {

/// sums += A B, [16, 16] times [16, 8], for bfloat16 or half. A is rows (low, high) of two groups, B one group; each is a
/// group's four elements of a lane.
template <typename T>
__device__ inline void multiply(float (&sums)[4], const uint32_t (&low)[2], const uint32_t (&high)[2],
                                const uint32_t (&columns)[2]) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(low[0]), "r"(high[0]), "r"(low[1]), "r"(high[1]), "r"(columns[0]), "r"(columns[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(low[0]), "r"(high[0]), "r"(low[1]), "r"(high[1]), "r"(columns[0]), "r"(columns[1]));
  }
}

/// sums += A B, [8, 4] times [4, 8], for float64.
__device__ inline void multiply(double (&sums)[2], double rows, double columns) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(sums[0]), "+d"(sums[1])
      : "d"(rows), "d"(columns));
}

/// The products of one step of a warp, added to the tiles' sums; of one part of it, where it has several. `kChain`: steps after
/// which the sums go to the totals.
template <typename T, int R>
struct Multiplier {  // bfloat16 and half
  using S = TensorCoreShape<2, R>;
  static constexpr int kChain = 4;

  __device__ static void add(const Packed<T> (&rows)[S::groups], int, float (&sums)[S::tiles][S::tile_sums]) {
    const auto part = [&](int group, int half, uint32_t (&words)[2]) {
      words[0] = half ? rows[group].raw.z : rows[group].raw.x;
      words[1] = half ? rows[group].raw.w : rows[group].raw.y;
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[S::groups == 1 ? 2 : S::groups][2] = {};  // a tile's second group is zero where there is one
#pragma unroll
      for (int g = 0; g < S::groups; ++g) part(g, half, words[g]);
      int tile = 0;
#pragma unroll
      for (int i = 0; i < S::groups; i += 2)
#pragma unroll
        for (int j = i; j < S::groups; ++j) multiply<T>(sums[tile++], words[i], words[i + 1], words[j]);
    }
  }
};

/// Two floats as bfloat16 in one word, rounded to nearest, and what the rounding left of them.
__device__ inline uint32_t take_bfloat16(float& first, float& second) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  first -= __uint_as_float(word << 16);
  second -= __uint_as_float(word & 0xffff0000u);
  return word;
}

template <int R>
struct Multiplier<float, R> {
  using S = TensorCoreShape<4, R>;
  static constexpr int kChain = 8;

  __device__ static void add(const Packed<float> (&rows)[S::groups], int, float (&sums)[S::tiles][S::tile_sums]) {
    uint32_t parts[3][S::groups][2];
#pragma unroll
    for (int g = 0; g < S::groups; ++g) {
      float rest[4];
#pragma unroll
      for (int lane = 0; lane < 4; ++lane) rest[lane] = rows[g].values[lane];
#pragma unroll
      for (int p = 0; p < 3; ++p)
#pragma unroll
        for (int word = 0; word < 2; ++word) parts[p][g][word] = take_bfloat16(rest[2 * word], rest[2 * word + 1]);
    }
    constexpr int kProducts[6][2] = {{2, 0}, {0, 2}, {1, 1}, {1, 0}, {0, 1}, {0, 0}};  // the smallest first
    int tile = 0;
#pragma unroll
    for (int i = 0; i < S::groups; i += 2) {
#pragma unroll
      for (int j = i; j < S::groups; ++j) {
        float step[4] = {};
#pragma unroll
        for (const auto& [a, b] : kProducts) multiply<BFloat16>(step, parts[a][i], parts[a][i + 1], parts[b][j]);
#pragma unroll
        for (int s = 0; s < 4; ++s) sums[tile][s] += step[s];
        ++tile;
      }
    }
  }
};

template <int R>
struct Multiplier<double, R> {
  using S = TensorCoreShape<8, R>;
  static constexpr int kChain = kDeviceChunk;

  __device__ static void add(const Packed<double> (&rows)[S::groups], int, double (&sums)[S::tiles][S::tile_sums]) {
#pragma unroll
    for (int lane = 0; lane < 2; ++lane) {
      int tile = 0;
#pragma unroll
      for (int i = 0; i < S::groups; ++i)
#pragma unroll
        for (int j = i; j < S::groups; ++j) multiply(sums[tile++], rows[i].values[lane], rows[j].values[lane]);
    }
  }
};

/// 16 bytes of a row from element e on, one by one; what lies past `end`, and a null row, is zero.
template <typename T>
__device__ inline Packed<T> load_tail(const T* row, int64_t e, int64_t end) {
  Packed<T> packed;
#pragma unroll
  for (int lane = 0; lane < kLanes<T>; ++lane)
    if (row && e + lane < end) packed.values[lane] = row[e + lane];
  return packed;
}

/// Row and column of sum `s` of a thread's `lane`.
template <typename T, int R>
__device__ inline void place_of_sum(int s, int lane, int& row, int& column) {
  using S = TensorCoreShape<int(sizeof(T)), R>;
  int tile = s / S::tile_sums, group = 0;
  while (tile >= S::groups - group) {
    tile -= S::groups - group;
    group += S::tile_groups;
  }
  row = 8 * (group + s % S::tile_sums / 2) + lane / 4;
  column = 8 * (group + tile) + lane % 4 * 2 + s % 2;
}

/// The block's part of gram_tensor_core, of rows that are made of what `forms` says and multiplied by `product`.
/// `parts`: in how many rounds of the loop a batch is multiplied; with one, the next batch is loaded meanwhile, which takes
/// registers. Contract: all threads of the block call it.
template <typename T, int R, int parts, typename Product, typename Rows>
__device__ __forceinline__ void gram_on_tensor_cores(Product product, Rows forms, const TensorTable& table, double* partials) {
  using S = TensorCoreShape<int(sizeof(T)), R>;
  using Total = std::conditional_t<S::total_bytes == 8, double, float>;
  extern __shared__ __align__(16) unsigned char memory[];
  double* products = reinterpret_cast<double*>(memory);
  Total* totals = reinterpret_cast<Total*>(products + num_pairs(R));  // [sums][threads]
  constexpr int warps = S::threads / kWarpSize;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const Chunk chunk = find_chunk(table, blockIdx.x);

  __shared__ const T* rows[R];  // and not in registers alone, which the sums of 64 rows need
  bool mine = true;
  for (int k = threadIdx.x; k < R; k += S::threads) {
    rows[k] = k < table.num_pointers ? static_cast<const T*>(table.pointers(chunk.tensor)[k]) : nullptr;
    mine &= is_aligned(rows[k]);
  }
  const bool aligned = __syncthreads_and(mine);
  const T* own[S::groups];  // the rows that this thread loads
  if constexpr (R <= 16) {
#pragma unroll
    for (int g = 0; g < S::groups; ++g) own[g] = rows[8 * g + lane / 4];
  }
  const auto row_of = [&](int group) {
    if constexpr (R <= 16) {
      return own[group];
    } else {
      return rows[8 * group + lane / 4];
    }
  };

  const auto load = [&](int batch, Packed<T>(&to)[S::batch][S::groups]) {
    const int64_t first = chunk.begin + (batch * warps + warp) * S::batch * S::step, e = first + lane % 4 * kLanes<T>;
    if (aligned && first + S::batch * S::step <= chunk.end) {  // one branch for all rows, so that their loads go out together
#pragma unroll
      for (int b = 0; b < S::batch; ++b)
#pragma unroll
        for (int g = 0; g < S::groups; ++g) {
          const T* row = row_of(g);
          if (row) to[b][g] = load_packed(row + e + b * S::step);
        }
    } else {
#pragma unroll
      for (int b = 0; b < S::batch; ++b)
#pragma unroll
        for (int g = 0; g < S::groups; ++g) to[b][g] = load_tail(row_of(g), e + b * S::step, chunk.end);
    }
  };
  Sum<T> sums[S::tiles][S::tile_sums] = {};
  const auto add_to_totals = [&] {
#pragma unroll
    for (int s = 0; s < S::sums; ++s) {
      totals[s * S::threads + threadIdx.x] += Total(sums[s / S::tile_sums][s % S::tile_sums]);
      sums[s / S::tile_sums][s % S::tile_sums] = 0;
    }
  };

#pragma unroll
  for (int s = 0; s < S::sums; ++s) totals[s * S::threads + threadIdx.x] = 0;
  constexpr int elements = S::step * S::batch * warps;  // of a batch of all warps
  const int batches = int((chunk.end - chunk.begin + elements - 1) / elements);
  Packed<T> now[S::batch][S::groups];
  load(0, now);
  constexpr bool ahead = parts == 1;
  constexpr int rounds = ahead && R <= 16 ? 2 : 1;  // two, so that the next batch need not move to where the last one was
#pragma unroll rounds
  for (int round = 0; round < batches * parts; ++round) {
    const int batch = round / parts;
    Packed<T> next[S::batch][S::groups];
    if (ahead && batch + 1 < batches) load(batch + 1, next);
    if (!ahead && round % parts == 0 && round > 0) load(batch, now);
#pragma unroll
    for (int b = 0; b < S::batch; ++b) product.add(now[b], round % parts, sums);
    if ((round + 1) * S::batch % (Product::kChain * parts) == 0) add_to_totals();
#pragma unroll
    for (int b = 0; b < S::batch && ahead; ++b)
#pragma unroll
      for (int g = 0; g < S::groups; ++g) now[b][g] = next[b][g];
  }
  add_to_totals();
  __syncthreads();

  for (int entry = threadIdx.x; entry < S::sums * kWarpSize; entry += S::threads) {
    double sum = 0;
    for (int w = 0; w < warps; ++w) sum += double(totals[entry / kWarpSize * S::threads + w * kWarpSize + entry % kWarpSize]);
    int row, column;
    place_of_sum<T, R>(entry / kWarpSize, entry % kWarpSize, row, column);
    if (row <= column) products[pair_index(R, row, column)] = sum;
  }
  __syncthreads();
  if constexpr (sizeof(Sum<T>) == 4) mend_products<T, R>(forms, table, chunk, reinterpret_cast<double*>(totals), products);
  for (int p = threadIdx.x; p < num_pairs(R); p += S::threads)
    partials[int64_t(table.first_block + blockIdx.x) * num_pairs(R) + p] = products[p];
}

/// partials[block][pair] = products of one chunk, for R = 8 (of 16 bits), 16 or 64 rows at most; as gram_chunks.
template <typename T, int R>
__global__ void __launch_bounds__(TensorCoreShape<int(sizeof(T)), R>::threads, R <= 16 ? 2 : 1)
    gram_tensor_core(const __grid_constant__ TensorTable table, double* partials) {
  gram_on_tensor_cores<T, R, 1>(Multiplier<T, R>(), GradientRows(), table, partials);
}

}  // namespace mtlkernels
