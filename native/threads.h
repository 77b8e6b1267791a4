// Running tasks on several threads.
#pragma once

#include <cstdint>
#include <functional>

namespace tokendance {

// Calls `task(0) ... task(count - 1)`, each once, in any order, on up to `threads` threads; returns
// when all are done. Tasks must not throw.
void run_tasks(int64_t count, int threads, const std::function<void(int64_t)>& task);

// Where the threads come from: "openmp" are those that torch uses, too.
const char* thread_source();

}  // namespace tokendance
