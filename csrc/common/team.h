#pragma once
// The threads that work on one K x K problem. The functions of kxk.h and kxk_solvers.h are written for a team: work on
// elements is spread over its threads, and each element is computed by one thread in one order, so that a team of any size,
// on the host or on a device, gives the same bits.
//
// Element i of anything belongs to thread i mod size. A thread that reads what another one wrote, or writes what another one
// has read, needs a `sync` in between. Decisions are taken by all threads alike, from values that all of them see.

#include "numeric.h"

namespace mtlkernels {

/// The host's team: one thread.
struct Serial {
  static constexpr int size = 1;  // a power of two
  MTL_HOST_DEVICE constexpr int rank() const { return 0; }

  /// Every thread calls it; what was written before is seen by all after.
  MTL_HOST_DEVICE void sync() const {}

  /// The sum of the threads' values, for all of them. Orders no memory.
  MTL_HOST_DEVICE int sum(int value) const { return value; }

  /// The smallest of the threads' values, of equals the one with the lowest index, for all of them. A thread that has none
  /// gives index -1 and a value that is greater than those that there are. No value is NaN. Orders no memory.
  MTL_HOST_DEVICE void first_minimum(double&, int&) const {}
};

/// Calls body(i) for the elements i from `begin` to below `end` that belong to the calling thread.
template <class Team, class Body>
MTL_HOST_DEVICE void for_owned(const Team& team, int begin, int end, const Body& body) {
#ifdef __CUDA_ARCH__
#pragma unroll 1  // a thread of a warp has one or two
#endif
  for (int i = begin + ((team.rank() - begin) & (Team::size - 1)); i < end; i += Team::size) body(i);
}

template <class Team>
MTL_HOST_DEVICE bool owns(const Team& team, int element) {
  return ((element - team.rank()) & (Team::size - 1)) == 0;
}

}  // namespace mtlkernels
