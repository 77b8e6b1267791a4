// What a step reads, as the planner (attention/plan.py) lays it out, and one layer's tensors.
#pragma once

#include <cstdint>

namespace tokendance {

// Rows that read the same ranges of slots. Begin and end are indices of the plan's arrays.
struct ReadGroup {
    int64_t row_begin, row_end;
    int64_t range_begin, range_end;
};

// Consecutive slots, and where the group's rows find what they see of them (one entry a row).
struct SlotRange {
    int64_t begin, end;
    int64_t first_read;
};

// Arrays of the step; whoever calls a kernel owns them.
struct Plan {
    const int64_t* write_slots;  // (T,) slot that each row writes
    const ReadGroup* read_groups;
    const SlotRange* ranges;
    const int64_t* rows;          // of the batch, group by group
    const int64_t* partials;      // for each of `rows`, where its result waits; -1: it is the output
    const int32_t* rotations;     // (reads,) row of the rotation tables; 0 is no rotation
    const int32_t* key_end;       // (reads,) keys of the range before this one are seen ...
    const int64_t* merged_rows;   // rows with several partial results
    const int64_t* merged_start;  // (merged_rows + 1,) ranges of partials, consecutive
};

// Queries that may share a key head: a task holds at least one row with all of them.
constexpr int64_t kMaxGroup = 128;

// So few queries do not repay laying out keys and values: they are read as they lie in memory.
constexpr int64_t kFewQueries = 6;

enum class Format { kFloat32, kBFloat16 };

// One layer. Strides are in elements; the last dimension is contiguous everywhere.
struct Layer {
    Format format;
    int64_t kv_heads, group, rows, size;
    const void* query;  // (T, H, D)
    int64_t query_head_stride, query_row_stride;
    const void* key;  // (T, KVH, D)
    int64_t key_head_stride, key_row_stride;
    const void* value;  // (KVH, T, D)
    int64_t value_head_stride, value_row_stride;
    void* keys;    // (KVH, S, D), written
    void* values;  // likewise
    int64_t memory_head_stride, memory_slot_stride;
    void* output;              // (T, H, D)
    const int32_t* key_begin;  // (reads,) ... from this one on; null: all of them
    const float* cosines;      // (rotations, rotary_dim / 2)
    const float* sines;
    int64_t rotary_dim;  // components of a head that are rotated
    bool interleaved;
    float scale;
};

// Partial results of a layer: of each row and head the weighted values, before they are divided
// by the sum of weights; that sum; and the largest score (in units of log 2).
struct Partials {
    float* values;   // (num_partials, H, D)
    float* sums;     // (num_partials, H)
    float* largest;  // (num_partials, H)
};

// A part of a layer's work that one thread does at a time.
struct Task {
    int64_t read_group;
    int64_t kv_head;
    int64_t first, last;  // of the group's rows, each with all its G queries
};

// What each instruction set provides.
struct Kernel {
    // Bytes of scratch memory, aligned to 64, that a thread needs for `attend`, given D.
    int64_t (*scratch_bytes)(int64_t size);
    // Rows of one task, given G.
    int64_t (*rows_per_task)(int64_t group);
    void (*write)(const Plan&, const Layer&, int64_t kv_head, int64_t first, int64_t last);
    void (*attend)(const Plan&, const Layer&, const Task&, const Partials&, void* scratch);
    void (*merge)(const Plan&, const Layer&, const Partials&, int64_t first, int64_t last);
};

}  // namespace tokendance
