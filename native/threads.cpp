// torch computes on the threads of an OpenMP runtime that its wheel brings along. Its idle workers
// spin for milliseconds between two products, so threads of our own would have to share the cores
// with them. We do not link against a runtime, as that would be a second one; we look for the one
// that is loaded and enter it as compiled code does: by GOMP_parallel, which GNU's, LLVM's and
// Intel's runtimes have on Linux. Elsewhere, threads of our own serve.

#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>

#include <cstring>
#endif

namespace tokendance {
namespace {

using ParallelRegion = void (*)(void (*function)(void*), void* data, unsigned threads,
                                unsigned flags);

ParallelRegion loaded_region() {
#if defined(__linux__)
    static const ParallelRegion region = [] {
        ParallelRegion found = nullptr;
        // Where torch found it: a runtime that is preloaded takes the place of the one that the
        // wheel brings along (vLLM advises Intel's). A library is searched with all that it
        // depends on, so else this is torch's own.
        void* const torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
        void* symbol = torch == nullptr ? nullptr : dlsym(RTLD_DEFAULT, "GOMP_parallel");
        if (torch != nullptr && symbol == nullptr) symbol = dlsym(torch, "GOMP_parallel");
        std::memcpy(&found, &symbol, sizeof(found));
        return found;
    }();
    return region;
#else
    return nullptr;
#endif
}

struct Job {
    int64_t count;
    const IndexedTask* task;
    std::atomic<int64_t> next{0};
    std::atomic<int> workers{0};

    void work() {
        const int worker = workers++;
        for (int64_t i = next++; i < count; i = next++) (*task)(i, worker);
    }
};

// Threads of our own, which sleep between jobs and live as long as the process.
class Pool {
  public:
    void run(Job& job, int threads) {
        const std::lock_guard<std::mutex> one_at_a_time(entry_);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            while (static_cast<int>(workers_.size()) < threads - 1) {
                const int index = static_cast<int>(workers_.size());
                workers_.emplace_back([this, index] { serve(index); });
                workers_.back().detach();
            }
            job_ = &job;
            helpers_ = busy_ = threads - 1;
            ++generation_;
        }
        wake_.notify_all();
        job.work();
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return busy_ == 0; });
    }

  private:
    void serve(int index) {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            wake_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            if (index >= helpers_) continue;
            Job* const job = job_;
            lock.unlock();
            job->work();
            lock.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::mutex entry_, mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    Job* job_ = nullptr;
    int helpers_ = 0, busy_ = 0;
    uint64_t generation_ = 0;
};

}  // namespace

void run_tasks(int64_t count, int threads, const IndexedTask& task) {
    Job job{count, &task};
    // A team is never made smaller for few tasks: GNU's runtime would end the threads that are left
    // out, and start them again for torch's next product.
    if (threads <= 1 || count <= 1) {
        job.work();
    } else if (const ParallelRegion region = loaded_region()) {
        region([](void* data) { static_cast<Job*>(data)->work(); }, &job,
               static_cast<unsigned>(threads), 0);
    } else {
        static Pool& pool = *new Pool;  // never destroyed: its threads may outlive main()
        pool.run(job, threads);
    }
}

const char* thread_source() { return loaded_region() != nullptr ? "openmp" : "own"; }

}  // namespace tokendance
