// Lets a program that runs under valgrind's callgrind say which part of it is counted. Never installed.

#include <valgrind/callgrind.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

/// Counts from here on, with empty caches.
EXPORT void start() {
  CALLGRIND_START_INSTRUMENTATION;
  CALLGRIND_ZERO_STATS;
}

/// Writes what was counted to a file, as `label`, and counts no more.
EXPORT void stop(const char* label) {
  CALLGRIND_DUMP_STATS_AT(label);
  CALLGRIND_STOP_INSTRUMENTATION;
}
