#pragma once
// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): random bits as a function of a counter
// and a key, so that every backend draws the same ones in any order. mtlkernels/random.py is the same in PyTorch.

#include <cstdint>

#include "numeric.h"

namespace mtlkernels {

struct Philox {
  uint32_t word[4];
};

/// The four random words of one counter under one 64-bit key.
MTL_HOST_DEVICE inline Philox philox(Philox counter, uint64_t key) {
  uint32_t key_low = static_cast<uint32_t>(key), key_high = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = 0xD2511F53ull * counter.word[0], second = 0xCD9E8D57ull * counter.word[2];
    counter = {{static_cast<uint32_t>(second >> 32) ^ counter.word[1] ^ key_low, static_cast<uint32_t>(second),
                static_cast<uint32_t>(first >> 32) ^ counter.word[3] ^ key_high, static_cast<uint32_t>(first)}};
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
  return counter;
}

/// A random order of the tasks 0 .. size - 1 for one row of one problem: tasks sorted by random keys, equal keys by index.
/// The key of task j is word j % 4 of the counter {j / 4, row, low and high half of problem}, so the order of two tasks does
/// not depend on how many others there are. `keys` holds size words.
MTL_HOST_DEVICE inline void random_order(uint64_t seed, int64_t problem, int row, int size, uint32_t* keys, int64_t* order) {
  for (int block = 0; block * 4 < size; ++block) {
    const Philox bits = philox({{static_cast<uint32_t>(block), static_cast<uint32_t>(row), static_cast<uint32_t>(problem),
                                 static_cast<uint32_t>(static_cast<uint64_t>(problem) >> 32)}},
                               seed);
    for (int j = block * 4; j < size && j < block * 4 + 4; ++j) keys[j] = bits.word[j % 4];
  }
  for (int j = 0; j < size; ++j) {  // insertion sort: stable, and the sizes are small
    int place = j;
    for (; place > 0 && keys[order[place - 1]] > keys[j]; --place) order[place] = order[place - 1];
    order[place] = j;
  }
}

}  // namespace mtlkernels
