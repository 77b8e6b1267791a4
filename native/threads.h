// Running tasks on several threads.
#pragma once

#include <cstdint>
#include <functional>

namespace tokendance {

// Calls `task(i, worker)` once for each i below `count`, in any order, on up to `threads` threads;
// returns when all are done. Calls with the same worker, below `threads`, do not overlap. Tasks must
// not throw.
using IndexedTask = std::function<void(int64_t i, int worker)>;
void run_tasks(int64_t count, int threads, const IndexedTask& task);

// Where the threads come from: "openmp" are those that torch uses, too.
const char* thread_source();

}  // namespace tokendance
