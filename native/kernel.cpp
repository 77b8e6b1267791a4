// The kernel of shared-in-place attention. Compiled once for each instruction set: see simd.h.
//
// A task is some rows of a read group with one key head. It walks over the keys of the group's slot
// ranges in blocks, all its queries over each block, in an online softmax (FlashAttention, arXiv
// 2205.14135, algorithm 1).
//
// For many queries a block's keys and values are laid out for the vector unit once and used tile by
// tile, so that the work is matrix products from the first cache:
//
//     scores (rows, keys) = queries (rows, D) x block keys (D, keys)
//     output (rows, D)   += weights (rows, keys) x block values (keys, D)
//
// Both are one small product (`multiply`), whose left factor is read number by number and whose
// right factor by vectors. Few queries, as when a request decodes, do not repay the layout: scores
// are dot products with keys as they lie in memory (`score_in_memory`), and the second product
// takes values from there (`InMemory`), so that memory is read once, in order. Where the machine
// multiplies pairs of bfloat16, a "number" is a pair of neighbours along the inner dimension.

// No template of the standard library is used here: its functions would be compiled for the widest
// instruction set, and the linker might choose them for code that runs on any machine.

#include "kernel.h"

#include "simd.h"

namespace TD_NAMESPACE {

using tokendance::Format;
using tokendance::Kernel;
using tokendance::kFewQueries;
using tokendance::Layer;
using tokendance::Partials;
using tokendance::Plan;
using tokendance::ReadGroup;
using tokendance::SlotRange;
using tokendance::Task;

constexpr int kBlock = 64;       // keys of a block
constexpr int kTile = 24;        // queries of a tile
constexpr int kTileStride = (kTile + kLanes - 1) / kLanes * kLanes;  // whole vectors of queries
constexpr int kTilesPerTask = 8;
// Accumulators of `multiply`, rows by vectors: as many as the registers hold.
constexpr int kMaxRows = 6;
constexpr int kMaxVectors = kLanes == 16 ? 4 : 2;
// Beyond this, values in memory would be read again for every few rows.
static_assert(kFewQueries <= kMaxRows);
constexpr float kNothing = -__builtin_inff();

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

template <class Item>
constexpr Item least(Item a, Item b) {
    return b < a ? b : a;
}
template <class Item>
constexpr Item most(Item a, Item b) {
    return a < b ? b : a;
}

// ---- numbers -----------------------------------------------------------------------------------

// How the products take them: one float, or a pair of bfloat16, 32 bits each. Memory in bfloat16 is
// widened to floats where the machine has no products of pairs.
template <bool kPairs>
inline Floats add_product(Floats sum, Words a, Words b) {
#if defined(__AVX512BF16__)
    if constexpr (kPairs) {
        return bits<Floats>(_mm512_dpbf16_ps(
            bits<__m512>(sum), bits<__m512bh>(a), bits<__m512bh>(b)));
    }
#endif
    return sum + bits<Floats>(a) * bits<Floats>(b);
}

// ---- the product -------------------------------------------------------------------------------

// to (rows, n) = from * scale + left (rows, inner) x right (inner, n); from is `to` itself, with a
// factor for each row, or nothing where `scales` is null.
template <class Right>
struct Product {
    float* to;
    int64_t to_stride;
    const float* scales;
    const uint32_t* left;
    int64_t left_stride;  // from row to row; along the inner dimension it is contiguous
    Right right;
    int64_t inner;
};

// A right factor that was laid out for the product.
struct LaidOut {
    const uint32_t* words;
    int64_t stride;  // from inner to inner

    template <int kVectors>
    void read(int64_t k, int64_t column, Words (&to)[kVectors]) const {
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) {
            to[j] = load<Words>(words + k * stride + column + j * kLanes);
        }
    }
};

// Pairs of neighbours: word i of `to`, both vectors in a row, is (first[i], second[i]).
template <int... kHalf>
inline void interleave(const uint16_t* first, const uint16_t* second, Words (&to)[2],
                       std::integer_sequence<int, kHalf...>) {
    typedef uint16_t Numbers __attribute__((vector_size(kVectorBytes)));
    const Numbers a = load<Numbers>(first);
    const Numbers b = load<Numbers>(second);
    to[0] = bits<Words>(__builtin_shufflevector(a, b, (kHalf / 2 + kHalf % 2 * 2 * kLanes)...));
    to[1] = bits<Words>(
        __builtin_shufflevector(a, b, (kLanes + kHalf / 2 + kHalf % 2 * 2 * kLanes)...));
}

// Values as they lie in memory, (keys, D). Their number is even where they are taken in pairs.
template <bool kPairs, class Number>
struct InMemory {
    const Number* const* values;

    template <int kVectors>
    void read(int64_t k, int64_t column, Words (&to)[kVectors]) const {
        if constexpr (sizeof(Number) == 4) {
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j) {
                to[j] = load<Words>(values[k] + column + j * kLanes);
            }
        } else if constexpr (kPairs && kVectors % 2 == 0) {
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; j += 2) {
                Words both[2];
                interleave(values[2 * k] + column + j * kLanes,
                           values[2 * k + 1] + column + j * kLanes, both,
                           std::make_integer_sequence<int, 2 * kLanes>());
                to[j] = both[0];
                to[j + 1] = both[1];
            }
        } else if constexpr (kPairs) {
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j) {
                const int64_t at = column + j * kLanes;
                to[j] = widened(values[2 * k] + at) >> 16 | widened(values[2 * k + 1] + at);
            }
        } else {
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j) to[j] = widened(values[k] + column + j * kLanes);
        }
    }
};

template <bool kPairs, int kRows, int kVectors, class Right>
inline void multiply_tile(const Product<Right>& p, int64_t row, int64_t column) {
    // Unrolled, so that the sums are registers from the first to the last.
    Floats sums[kRows][kVectors];
    float* const to = p.to + row * p.to_stride + column;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) {
            sums[i][j] = p.scales == nullptr
                             ? Floats{}
                             : load<Floats>(to + i * p.to_stride + j * kLanes) * p.scales[row + i];
        }
    }
    const uint32_t* left = p.left + row * p.left_stride;
    for (int64_t k = 0; k < p.inner; ++k) {
        Words vectors[kVectors];
        p.right.template read<kVectors>(k, column, vectors);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
            const Words number = Words{} + load<uint32_t>(left + i * p.left_stride);
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j) {
                sums[i][j] = add_product<kPairs>(sums[i][j], number, vectors[j]);
            }
        }
        ++left;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) {
            store(to + i * p.to_stride + j * kLanes, sums[i][j]);
        }
    }
}

template <bool kPairs, int kVectors, class Right>
inline void multiply_columns(const Product<Right>& p, int64_t rows, int64_t column) {
    static_assert(kMaxRows == 6);  // what is left below
    int64_t row = 0;
    for (; row + kMaxRows <= rows; row += kMaxRows) {
        multiply_tile<kPairs, kMaxRows, kVectors>(p, row, column);
    }
    switch (rows - row) {
        case 5: return multiply_tile<kPairs, 5, kVectors>(p, row, column);
        case 4: return multiply_tile<kPairs, 4, kVectors>(p, row, column);
        case 3: return multiply_tile<kPairs, 3, kVectors>(p, row, column);
        case 2: return multiply_tile<kPairs, 2, kVectors>(p, row, column);
        case 1: return multiply_tile<kPairs, 1, kVectors>(p, row, column);
        default: return;
    }
}

// `columns` is a multiple of kLanes.
template <bool kPairs, class Right>
void multiply(const Product<Right>& p, int64_t rows, int64_t columns) {
    int64_t column = 0;
    for (; column + kMaxVectors * kLanes <= columns; column += kMaxVectors * kLanes) {
        multiply_columns<kPairs, kMaxVectors>(p, rows, column);
    }
    if constexpr (kMaxVectors == 4) {
        if (column + 2 * kLanes <= columns) {
            multiply_columns<kPairs, 2>(p, rows, column);
            column += 2 * kLanes;
        }
    }
    if (column < columns) multiply_columns<kPairs, 1>(p, rows, column);
}

// ---- a block -----------------------------------------------------------------------------------

// Fetch what comes a block later, most often: keys of a range follow each other. Where they do not,
// a wrong address does no harm; it is never a pointer. It goes into the second cache: a core can
// wait for few lines at once on their way to the first (docs/log.md). `stride` is that of slots.
template <class Number>
inline void prefetch_next(const Number* numbers, int64_t size, int64_t stride) {
    const uintptr_t next = reinterpret_cast<uintptr_t>(numbers) + kBlock * stride * sizeof(Number);
    for (uintptr_t at = 0; at < size * sizeof(Number); at += 64) {
        constexpr int kRead = 0;
        constexpr int kSecondCache = 2;
        __builtin_prefetch(reinterpret_cast<const void*>(next + at), kRead, kSecondCache);
    }
}

// Keys (count, D) become (inner, kBlock); `count` is a multiple of the lanes.
template <bool kPairs, class Number>
void lay_out_keys(const Number* const* keys, int64_t size, int64_t stride, int count,
                  uint32_t* to) {
    constexpr bool kWiden = sizeof(Number) == 2 && !kPairs;
    const int words = static_cast<int>(size * sizeof(Number) / 4);
    for (int first_key = 0; first_key < count; first_key += kLanes) {
        for (int first_word = 0; first_word < words; first_word += kLanes) {
            const int width = least(kLanes, words - first_word);
            Words block[kLanes];
            for (int i = 0; i < kLanes; ++i) {
                const Number* const key = keys[first_key + i];
                if (first_word == 0) prefetch_next(key, size, stride);
                const char* const from = reinterpret_cast<const char*>(key) + 4 * first_word;
                block[i] = width == kLanes ? load<Words>(from) : load_first<Words>(from, 4 * width);
            }
            transpose(block);
            for (int i = 0; i < width; ++i) {
                if constexpr (kWiden) {
                    uint32_t* const row = to + 2 * (first_word + i) * kBlock + first_key;
                    store(row, block[i] << 16);
                    store(row + kBlock, block[i] & 0xffff0000u);
                } else {
                    store(to + (first_word + i) * kBlock + first_key, block[i]);
                }
            }
        }
    }
}

// Values become (inner, D).
template <bool kPairs, class Number>
void lay_out_values(const Number* const* values, int64_t size, int64_t stride, int64_t inner,
                    uint32_t* to) {
    const InMemory<kPairs, Number> from{values};
    for (int64_t k = 0; k < inner; ++k) {
        constexpr int kKeys = kPairs ? 2 : 1;
        for (int i = 0; i < kKeys; ++i) prefetch_next(values[kKeys * k + i], size, stride);
        for (int64_t column = 0; column < size; column += kLanes) {  // D is a multiple of 16
            Words words[1];
            from.template read<1>(k, column, words);
            store(to + k * size + column, words[0]);
        }
    }
}

// scores (kRows, kBlock) = queries (kRows, inner) x keys as they lie in memory, read by vectors.
// `count` is as above. `kWhole` is the number of whole vectors of a head where it is known when
// compiled, else 0.
template <bool kPairs, int kRows, int kWhole, class Number>
void score_in_memory(const Number* const* keys, int64_t size, int64_t stride, int count,
                     const uint32_t* queries, float* scores) {
    constexpr int kStep = kPairs ? 2 : 1;  // numbers in a word
    const int64_t inner = size / kStep;
    const int64_t whole = kWhole > 0 ? kWhole * kLanes : inner / kLanes * kLanes;
    // D is a multiple of 16, so what is left of pairs is half a vector.
    constexpr int kRest = kLanes / 2;
    for (int first = 0; first < count; first += kLanes) {
        Floats dots[kRows][kLanes];
        for (int i = 0; i < kLanes; ++i) {
            const Number* const key = keys[first + i];
            prefetch_next(key, size, stride);
            Floats sums[kRows] = {};
#pragma GCC unroll 4
            for (int64_t word = 0; word < whole; word += kLanes) {
                Words words;
                if constexpr (sizeof(Number) == 2 && !kPairs) {
                    words = widened(key + word);
                } else {
                    words = load<Words>(key + word * kStep);
                }
#pragma GCC unroll 8
                for (int row = 0; row < kRows; ++row) {
                    const Words query = load<Words>(queries + row * inner + word);
                    sums[row] = add_product<kPairs>(sums[row], query, words);
                }
            }
#pragma GCC unroll 8
            for (int row = 0; row < kRows; ++row) dots[row][i] = sums[row];
            if constexpr (kPairs && kWhole == 0) {
                if (whole == inner) continue;
                const Words words = load_first<Words>(key + whole * kStep, kRest * kStep);
                for (int row = 0; row < kRows; ++row) {
                    const Words query = load_first<Words>(queries + row * inner + whole, kRest);
                    dots[row][i] = add_product<kPairs>(dots[row][i], query, words);
                }
            }
        }
        for (int row = 0; row < kRows; ++row) {
            store(scores + row * kBlock + first, sums_of(dots[row]));
        }
    }
}

// ---- a tile of queries -------------------------------------------------------------------------

constexpr int kQueriesPerTask = kTile * kTilesPerTask;
static_assert(kQueriesPerTask >= tokendance::kMaxGroup);

// A thread's buffers, one after the other in the memory that it is given.
struct Scratch {
    // `memory` is null where only the size is asked for.
    Scratch(int64_t size, void* memory) : start(static_cast<char*>(memory)) {
        sums = take<Floats>(kQueriesPerTask);
        keys = take<uint32_t>(size * kBlock);
        values = take<uint32_t>(size * kBlock);
        queries = take<uint32_t>(size * kQueriesPerTask);
        output = take<float>(size * kQueriesPerTask);
        scores = take<float>(kTile * kBlock);
        head = take<float>(size);
        largest = take<float>(kTilesPerTask * kTileStride);
        rotated_by = take<int>(kQueriesPerTask);
    }

    // All sizes are multiples of 64 bytes, since D is one of 16.
    template <class Item>
    Item* take(int64_t count) {
        Item* const items = start == nullptr ? nullptr : reinterpret_cast<Item*>(start + bytes);
        bytes += count * sizeof(Item);
        return items;
    }

    char* start;
    int64_t bytes = 0;
    Floats* sums;       // of each query's weights, lane by lane
    uint32_t* keys;     // (inner, kBlock)
    uint32_t* values;   // (inner, D)
    uint32_t* queries;  // (kQueriesPerTask, inner)
    float* output;      // (kQueriesPerTask, D)
    float* scores;      // (kTile, kBlock)
    float* head;        // (D,)
    float* largest;     // (kTilesPerTask, kTileStride)
    int* rotated_by;     // of each row
};

template <class Number, bool kPairs>
class Attention {
  public:
    Attention(const Plan& plan, const Layer& layer, const Task& task, void* scratch)
        : plan_(plan),
          layer_(layer),
          task_(task),
          readers_(plan.read_groups[task.read_group]),
          s_(layer.size, scratch) {
        num_queries_ = static_cast<int>((task.last - task.first) * layer.group);
        inner_ = layer.size / (kPairs ? 2 : 1);
        are_few_ = num_queries_ <= kFewQueries;
        for (int64_t row = task.first; row < task.last; ++row) s_.rotated_by[row - task.first] = -1;
    }

    void run(const Partials& partials) {
        std::memset(s_.output, 0, num_queries_ * layer_.size * sizeof(float));
        for (int query = 0; query < num_queries_; ++query) {
            s_.sums[query] = Floats{};
            s_.largest[largest_at(query)] = kNothing;
        }
        for (int64_t i = readers_.range_begin; i < readers_.range_end; ++i) {
            gather(plan_.ranges[i]);
        }
        attend_block();
        for (int query = 0; query < num_queries_; ++query) finish(query, partials);
    }

  private:
    static int largest_at(int query) { return query / kTile * kTileStride + query % kTile; }
    int64_t row_of(int query) const { return task_.first + query / layer_.group; }

    int key_begin(const SlotRange& range, int64_t row) const {
        return layer_.key_begin == nullptr ? 0
                                           : most(0, layer_.key_begin[range.first_read + row]);
    }
    int key_end(const SlotRange& range, int64_t row) const {
        return plan_.key_end[range.first_read + row];
    }

    // Keys from several ranges make a block, as long as they are read at the same rotation: how
    // memory happens to be divided then changes neither the speed nor the order of sums.
    void gather(const SlotRange& range) {
        int begin = INT32_MAX;
        int end = 0;
        for (int64_t row = task_.first; row < task_.last; ++row) {
            if (key_begin(range, row) >= key_end(range, row)) continue;
            begin = least(begin, key_begin(range, row));
            end = most(end, key_end(range, row));
        }
        if (begin >= end) return;
        if (rotations_differ(range)) {
            attend_block();
            for (int64_t row = task_.first; row < task_.last; ++row) {
                rotate_queries(row, plan_.rotations[range.first_read + row]);
            }
        }
        const int64_t head = task_.kv_head * layer_.memory_head_stride;
        while (begin < end) {
            if (count_ == kBlock) attend_block();
            const int taken = least(kBlock - count_, end - begin);
            strips_[num_strips_++] = {&range, begin, taken, count_};
            for (int i = 0; i < taken; ++i) {
                const int64_t at =
                    head + (range.begin + begin + i) * layer_.memory_slot_stride;
                keys_[count_] = static_cast<const Number*>(layer_.keys) + at;
                values_[count_++] = static_cast<const Number*>(layer_.values) + at;
            }
            begin += taken;
        }
    }

    bool rotations_differ(const SlotRange& range) const {
        for (int64_t row = task_.first; row < task_.last; ++row) {
            const int rotation = plan_.rotations[range.first_read + row];
            if (s_.rotated_by[row - task_.first] != rotation) return true;
        }
        return false;
    }

    // Lay out the G queries of a row, rotated by an entry of the tables.
    void rotate_queries(int64_t row, int rotation) {
        const int64_t index = row - task_.first;
        if (s_.rotated_by[index] == rotation) return;
        s_.rotated_by[index] = rotation;
        const int64_t batch_row = plan_.rows[readers_.row_begin + row];
        for (int64_t g = 0; g < layer_.group; ++g) {
            const int64_t head = task_.kv_head * layer_.group + g;
            const Number* const query = static_cast<const Number*>(layer_.query) +
                                        head * layer_.query_head_stride +
                                        batch_row * layer_.query_row_stride;
            uint32_t* const to = s_.queries + (index * layer_.group + g) * inner_;
            for (int64_t d = 0; d < layer_.size; ++d) s_.head[d] = to_float(query[d]);
            if (rotation != 0) rotate(rotation);
            if constexpr (kPairs) {
                for (int64_t d = 0; d < inner_; ++d) {
                    to[d] = to_bf16(s_.head[2 * d]) |
                            static_cast<uint32_t>(to_bf16(s_.head[2 * d + 1])) << 16;
                }
            } else {
                std::memcpy(to, s_.head, layer_.size * sizeof(float));
            }
        }
    }

    void rotate(int rotation) {
        const int64_t half = layer_.rotary_dim / 2;
        const float* const cosines = layer_.cosines + rotation * half;
        const float* const sines = layer_.sines + rotation * half;
        float* const head = s_.head;
        const int64_t step = layer_.interleaved ? 2 : 1;
        const int64_t apart = layer_.interleaved ? 1 : half;
        for (int64_t i = 0; i < half; ++i) {
            const float a = head[step * i];
            const float b = head[step * i + apart];
            head[step * i] = a * cosines[i] - b * sines[i];
            head[step * i + apart] = b * cosines[i] + a * sines[i];
        }
    }

    // All queries over the keys that were gathered.
    void attend_block() {
        if (count_ == 0) return;
        // Whole vectors of keys; none of those that are added is seen.
        columns_ = (count_ + kLanes - 1) / kLanes * kLanes;
        for (int i = count_; i < columns_; ++i) {
            keys_[i] = keys_[count_ - 1];
            values_[i] = values_[count_ - 1];
        }
        pairs_ = kPairs ? (count_ + 1) / 2 : count_;
        if (!are_few_) {
            const int64_t stride = layer_.memory_slot_stride;
            lay_out_keys<kPairs>(keys_, layer_.size, stride, columns_, s_.keys);
            lay_out_values<kPairs>(values_, layer_.size, stride, pairs_, s_.values);
        }
        for (int query = 0; query < num_queries_; query += kTile) {
            attend_tile(query, least(kTile, num_queries_ - query));
        }
        count_ = 0;
        num_strips_ = 0;
    }

    void attend_tile(int query, int rows) {
        bool all = count_ == columns_;
        bool any = false;
        for (int64_t row = row_of(query); row <= row_of(query + rows - 1); ++row) {
            for (int i = 0; i < num_strips_; ++i) {
                const Strip& strip = strips_[i];
                const int begin = key_begin(*strip.range, row) - strip.first;
                const int end = key_end(*strip.range, row) - strip.first;
                all = all && begin <= 0 && end >= strip.count;
                any = any || most(begin, 0) < least(end, strip.count);
            }
        }
        if (!any) return;
        const uint32_t* const queries = s_.queries + query * inner_;
        if (are_few_) {
            score_few(rows, queries);
        } else {
            const LaidOut keys{s_.keys, kBlock};
            multiply<kPairs>(
                Product<LaidOut>{s_.scores, kBlock, nullptr, queries, inner_, keys, inner_}, rows,
                columns_);
        }
        if (!all) {
            for (int i = 0; i < rows; ++i) hide(s_.scores + i * kBlock, row_of(query + i));
        }
        float scales[kTileStride];
        weigh(query, rows, scales);
        if (are_few_) {
            for (int i = 0; i < count_; ++i) {
                prefetch_next(values_[i], layer_.size, layer_.memory_slot_stride);
            }
            add_values(query, rows, scales, InMemory<kPairs, Number>{values_});
        } else {
            add_values(query, rows, scales, LaidOut{s_.values, layer_.size});
        }
    }

    template <int kRows = kFewQueries>
    void score_few(int rows, const uint32_t* queries) {
        if constexpr (kRows > 0) {
            if (rows < kRows) return score_few<kRows - 1>(rows, queries);
            const int64_t stride = layer_.memory_slot_stride;
            if constexpr (kPairs) {
                if (inner_ == 2 * kLanes) {  // heads of 64, as most small models have
                    score_in_memory<kPairs, kRows, 2>(keys_, layer_.size, stride, columns_,
                                                      queries, s_.scores);
                    return;
                }
            }
            score_in_memory<kPairs, kRows, 0>(keys_, layer_.size, stride, columns_, queries,
                                              s_.scores);
        }
    }

    template <class Right>
    void add_values(int query, int rows, const float* scales, Right values) {
        multiply<kPairs>(Product<Right>{s_.output + query * layer_.size, layer_.size, scales,
                                        reinterpret_cast<const uint32_t*>(s_.scores), kBlock,
                                        values, pairs_},
                         rows, layer_.size);
    }

    // Scores of keys that a row does not see become -inf.
    void hide(float* scores, int64_t row) const {
        int column = 0;
        for (int i = 0; i < num_strips_; ++i) {
            const Strip& strip = strips_[i];
            const int begin = key_begin(*strip.range, row) - strip.first;
            const int end = key_end(*strip.range, row) - strip.first;
            if (begin >= end) continue;
            const int seen = strip.column + least(most(begin, 0), strip.count);
            while (column < seen) scores[column++] = kNothing;
            column = most(column, strip.column + least(end, strip.count));
        }
        while (column < columns_) scores[column++] = kNothing;
    }

    // Weights are powers of 2.
    float to_log2() const { return layer_.scale * 1.44269504f; }

    // Turn a tile's scores into weights, in place, and find the factors for the earlier output.
    void weigh(int query, int rows, float* scales) {
        const float factor = to_log2();
        float tops[kTileStride] = {};
        for (int i = 0; i < rows; ++i) {
            const float* const scores = s_.scores + i * kBlock;
            Floats top = load<Floats>(scores);
            for (int column = kLanes; column < columns_; column += kLanes) {
                top = larger(load<Floats>(scores + column), top);
            }
            tops[i] = largest(top);
        }
        float shifts[kTileStride];
        float* const largest_before = s_.largest + largest_at(query);
        for (int i = 0; i < rows; i += kLanes) {
            const Floats before = load<Floats>(largest_before + i);
            const Floats now = larger(load<Floats>(tops + i), before);
            // Where nothing is seen yet, all scores are -inf, and any finite number serves.
            const Floats shift = now == kNothing ? Floats{} : now;
            store(largest_before + i, now);
            store(shifts + i, shift);
            store(scales + i, exp2<false>((before - shift) * factor));
        }
        for (int i = 0; i < rows; ++i) {
            float* const scores = s_.scores + i * kBlock;
            Floats total = {};
            for (int column = 0; column < columns_; column += kLanes) {
                const Floats score = load<Floats>(scores + column);
                // Exactly 0 for the largest, however large it is; never above.
                const Floats weights = exp2<kPairs>((score - shifts[i]) * factor);
                total += weights;
                store_weights(scores, column, weights);
            }
            s_.sums[query + i] = s_.sums[query + i] * scales[i] + total;
        }
    }

    static void store_weights(float* scores, int column, Floats weights) {
#if defined(__AVX512BF16__)
        if constexpr (kPairs) {
            store(reinterpret_cast<uint16_t*>(scores) + column,
                  bits<Halves>(_mm512_cvtneps_pbh(bits<__m512>(weights))));
            return;
        }
#endif
        store(scores + column, weights);
    }

    void finish(int query, const Partials& partials) {
        const int64_t row = readers_.row_begin + row_of(query);
        const int64_t head = task_.kv_head * layer_.group + query % layer_.group;
        const int64_t heads = layer_.kv_heads * layer_.group;
        const float* const from = s_.output + query * layer_.size;
        const float total = sum(s_.sums[query]);
        if (plan_.partials[row] < 0) {
            auto* const to = static_cast<Number*>(layer_.output) +
                             (plan_.rows[row] * heads + head) * layer_.size;
            for (int64_t d = 0; d < layer_.size; ++d) put(to + d, from[d] / total);
            return;
        }
        const int64_t at = plan_.partials[row] * heads + head;
        std::memcpy(partials.values + at * layer_.size, from, layer_.size * sizeof(float));
        partials.sums[at] = total;
        partials.largest[at] = s_.largest[largest_at(query)] * to_log2();
    }

    const Plan& plan_;
    const Layer& layer_;
    const Task& task_;
    const ReadGroup& readers_;
    Scratch s_;
    int num_queries_;
    bool are_few_;
    int64_t inner_;

    // The block that is being gathered: its keys, and the strips of slot ranges that they are from.
    struct Strip {
        const SlotRange* range;
        int first, count;  // of the range's keys
        int column;        // of the block
    };
    const Number* keys_[kBlock];
    const Number* values_[kBlock];
    Strip strips_[kBlock];
    int count_ = 0;
    int columns_ = 0;  // the count in whole vectors
    int64_t pairs_ = 0;
    int num_strips_ = 0;
};

// ---- what is exported --------------------------------------------------------------------------

int64_t rows_per_task(int64_t group) {
    return kQueriesPerTask / group;
}

template <class Number>
void write_as(const Plan& plan, const Layer& l, int64_t kv_head, int64_t first, int64_t last) {
    const auto* const key = static_cast<const Number*>(l.key) + kv_head * l.key_head_stride;
    const auto* const value = static_cast<const Number*>(l.value) + kv_head * l.value_head_stride;
    auto* const keys = static_cast<Number*>(l.keys) + kv_head * l.memory_head_stride;
    auto* const values = static_cast<Number*>(l.values) + kv_head * l.memory_head_stride;
    for (int64_t row = first; row < last; ++row) {
        const int64_t to = plan.write_slots[row] * l.memory_slot_stride;
        std::memcpy(keys + to, key + row * l.key_row_stride, l.size * sizeof(Number));
        std::memcpy(values + to, value + row * l.value_row_stride, l.size * sizeof(Number));
    }
}

void write(const Plan& plan, const Layer& l, int64_t kv_head, int64_t first, int64_t last) {
    if (l.format == Format::kFloat32) return write_as<float>(plan, l, kv_head, first, last);
    write_as<uint16_t>(plan, l, kv_head, first, last);
}

int64_t scratch_bytes(int64_t size) {
    return Scratch(size, nullptr).bytes;
}

void attend(const Plan& plan, const Layer& layer, const Task& task, const Partials& partials,
            void* scratch) {
    if (layer.format == Format::kFloat32) {
        Attention<float, false>(plan, layer, task, scratch).run(partials);
    } else {
        Attention<uint16_t, kHasPairs>(plan, layer, task, scratch).run(partials);
    }
}

template <class Number>
void merge_as(const Plan& plan, const Layer& l, const Partials& partials, int64_t first,
              int64_t last) {
    const int64_t heads = l.kv_heads * l.group;
    for (int64_t merged = first; merged < last; ++merged) {
        const int64_t start = plan.merged_start[merged];
        const int64_t stop = plan.merged_start[merged + 1];
        for (int64_t head = 0; head < heads; ++head) {
            float top = kNothing;
            for (int64_t i = start; i < stop; ++i) {
                top = most(top, partials.largest[i * heads + head]);
            }
            float total = 0.0f;
            float* const sum = partials.values + (start * heads + head) * l.size;
            for (int64_t i = start; i < stop; ++i) {
                const int64_t at = i * heads + head;
                const float largest = partials.largest[at];
                const float weight =
                    largest == top ? 1.0f : exp2<false>(splat(largest - top))[0];
                total += weight * partials.sums[at];
                const float* const add = partials.values + at * l.size;
                if (i == start) {
                    for (int64_t d = 0; d < l.size; ++d) sum[d] = weight * add[d];
                } else {
                    for (int64_t d = 0; d < l.size; ++d) sum[d] += weight * add[d];
                }
            }
            auto* const to = static_cast<Number*>(l.output) +
                             (plan.merged_rows[merged] * heads + head) * l.size;
            for (int64_t d = 0; d < l.size; ++d) put(to + d, sum[d] / total);
        }
    }
}

void merge(const Plan& plan, const Layer& l, const Partials& partials, int64_t first,
           int64_t last) {
    if (l.format == Format::kFloat32) return merge_as<float>(plan, l, partials, first, last);
    merge_as<uint16_t>(plan, l, partials, first, last);
}

extern const Kernel kAttention = {scratch_bytes, rows_per_task, write, attend, merge};

}  // namespace TD_NAMESPACE
