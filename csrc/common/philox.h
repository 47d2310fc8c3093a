#pragma once
// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): random bits as a function of a counter
// and a key, so that every backend draws the same ones in any order. mtlkernels/random.py is the same in PyTorch.

#include <cstdint>

#include "team.h"

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
/// not depend on how many others there are. `keys` holds size words. Ends with a sync.
template <class Team>
MTL_HOST_DEVICE void random_order(const Team& team, uint64_t seed, int64_t problem, int row, int size, uint32_t* keys,
                                  int64_t* order) {
  for_owned(team, 0, (size + 3) / 4, [&](int block) {
    const Philox bits = philox({{static_cast<uint32_t>(block), static_cast<uint32_t>(row), static_cast<uint32_t>(problem),
                                 static_cast<uint32_t>(static_cast<uint64_t>(problem) >> 32)}},
                               seed);
    for (int word = 0; word < 4; ++word) {
      if (block * 4 + word < size) keys[block * 4 + word] = bits.word[word];
    }
  });
  team.sync();
  for_owned(team, 0, size, [&](int j) {
    int place = 0;
    for (int i = 0; i < size; ++i) place += keys[i] < keys[j] || (keys[i] == keys[j] && i < j);
    order[place] = j;
  });
  team.sync();
}

}  // namespace mtlkernels
