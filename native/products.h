// Rows of a step times the weights of a linear layer.
//
// Weights lie in panels of `panel` outputs, so that one load has the same inputs of neighbouring
// outputs. In bfloat16 a panel has, for each pair of inputs, that pair of each output. In bytes it
// has, for each four inputs, those of each output, as w / scale + 128; each output has a scale for
// each block of kBlock inputs.
#pragma once

#include <cstdint>

#include "kernel.h"

namespace tokendance {

constexpr int64_t kBlock = 64;

enum class WeightKind { kBFloat16, kBytes };

struct Weights {
    WeightKind kind;
    int64_t inputs, outputs;
    const void* panels;
    const float* scales;  // of bytes: (panels, blocks, panel)
};

// Rows as the products of bytes take them: x / scale, with a scale for each block of a row.
struct ByteRows {
    int64_t blocks;     // of a row; behind the last input there are zeros
    int8_t* numbers;    // (T, blocks kBlock)
    float* scales;      // (T, blocks); not a number where the row has one that is none, or infinite
    int32_t* offsets;   // (T, blocks): -128 times the sum of the block's numbers
};

struct Product {
    Weights weights;
    Format format;      // of rows and output
    const void* rows;   // (T, inputs)
    ByteRows bytes;     // the same, where the weights are bytes
    const float* bias;  // (outputs,), or null
    void* output;       // (T, outputs)
};

// What each instruction set provides.
struct ProductKernel {
    int64_t panel;   // outputs of a panel
    bool has_pairs;  // whether it multiplies weights in bfloat16
    void (*to_bytes)(const Product&, int64_t first_row, int64_t last_row);
    void (*multiply)(const Product&, int64_t first_row, int64_t last_row, int64_t first_panel,
                     int64_t last_panel);
};

}  // namespace tokendance
