// What lies between the products of a model: work on each row of a step by itself.
#pragma once

#include <cstdint>

#include "kernel.h"

namespace tokendance {

// Root mean square norm: of the rows, or of their sums with others.
struct Norm {
    Format format;
    int64_t size;            // of a row
    const void* rows;        // (T, size)
    const void* added;       // (T, size), or null
    void* sums;              // (T, size), written where something is added
    const void* weight;      // (size,)
    void* output;            // (T, size)
    float epsilon;
    bool weight_from_one;    // the factor is 1 + weight, in float32
};

// Rows to which others are added, in place.
struct Addition {
    Format format;
    int64_t size;            // of a row
    void* rows;              // (T, size)
    const void* added;       // (T, size)
};

// Rotation of the queries' and keys' heads of rows, in place; before that a norm of each head.
struct Rotation {
    Format format;
    int64_t heads, kv_heads, size, rotary_dim;
    void* rows;              // (T, row_stride): queries, then keys, head by head
    int64_t row_stride;
    const void* cosines;     // (T, rotary_dim)
    const void* sines;
    const void* query_weight;  // (size,) of the norm, or null
    const void* key_weight;
    float epsilon;
    bool weight_from_one;
};

enum class Activation { kSilu, kGeluTanh };

// Activation of the first half of a row times its second half.
struct Gate {
    Format format;
    Activation activation;
    int64_t size;            // of the output's row
    const void* rows;        // (T, 2 size)
    void* output;            // (T, size)
};

// What each instruction set provides; rows `first` to `last` - 1.
struct RowKernel {
    void (*normalise)(const Norm&, int64_t first, int64_t last);
    void (*rotate)(const Rotation&, int64_t first, int64_t last);
    void (*gate)(const Gate&, int64_t first, int64_t last);
    void (*add)(const Addition&, int64_t first, int64_t last);
};

}  // namespace tokendance
