// Rows of a step, as Python hands them over, and work on them that is divided among threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "rows.h"
#include "tensor.h"
#include "threads.h"

namespace tokendance {

// Fewer numbers than this are not worth a second thread.
constexpr int64_t kNumbersPerTask = 1 << 15;

// Calls `work(first, last)` for all rows, a part of them each time.
template <class Work>
void in_row_tasks(int64_t rows, int64_t row_size, int threads, const Work& work) {
    const int64_t chunk = std::max<int64_t>(1, kNumbersPerTask / std::max<int64_t>(1, row_size));
    const int64_t count = (rows + chunk - 1) / chunk;
    if (count == 1) return work(0, rows);
    run_tasks(count, threads, [&](int64_t i, int) {
        work(i * chunk, std::min(rows, (i + 1) * chunk));
    });
}

// (T, n), row by row.
inline void require_rows(const Tensor& tensor, int64_t rows, int64_t size) {
    require(tensor.ndim() == 2 && tensor.shape(0) == rows && tensor.shape(1) == size,
            "rows have other shapes");
    require(tensor.stride(1) == 1 && (rows <= 1 || tensor.stride(0) == size),
            "rows are contiguous");
}

inline void require_same_dtype(const Tensor& tensor, const Tensor& other) {
    require(tensor.dtype().is(other.dtype()), "all tensors have one dtype");
}

inline Activation activation_named(const std::string& name) {
    require(name == "silu" || name == "gelu_tanh", "there is no such activation");
    return name == "silu" ? Activation::kSilu : Activation::kGeluTanh;
}

}  // namespace tokendance
