// The plan of a step, and attention in one of its layers.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "instruction_sets.h"
#include "kernel.h"
#include "scratch.h"
#include "tensor.h"
#include "threads.h"

namespace tokendance {

template <class Scalar>
using Array = nb::ndarray<const Scalar, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <class Scalar>
std::vector<Scalar> copied(const Array<Scalar>& array) {
    return std::vector<Scalar>(array.data(), array.data() + array.shape(0));
}

// The plan of a step, with the tasks that it makes.
class Step {
  public:
    Step(const std::string& kernel, int64_t num_slots, Array<int64_t> write_slots,
         Array<int64_t> row_indptr, Array<int64_t> range_indptr, Array<int64_t> rows,
         Array<int64_t> slot_begin, Array<int64_t> slot_end, Array<int32_t> rotations,
         Array<int32_t> key_end)
        : kernel_(set_named(kernel).attention), num_slots_(num_slots) {
        write_slots_ = copied(write_slots);
        rows_ = copied(rows);
        rotations_ = copied(rotations);
        key_end_ = copied(key_end);
        take_read_groups(row_indptr, range_indptr, slot_begin, slot_end);
        check();
        find_partials();
        plan_ = {write_slots_.data(), read_groups_.data(), ranges_.data(),
                 rows_.data(),        partials_.data(),    rotations_.data(),
                 key_end_.data(),     merged_rows_.data(), merged_start_.data()};
    }

    // The next token of a request that runs alone: its slot follows the last one that it reads.
    void extend() {
        require(write_slots_.size() == 1 && !ranges_.empty(), "there is one row, which reads");
        SlotRange& last = ranges_.back();
        require(last.end < num_slots_, "a row writes outside of memory");
        require(key_end_.back() == last.end - last.begin, "the row sees its last range whole");
        write_slots_[0] = last.end;
        ++last.end;
        ++key_end_.back();
    }

    void attend(nb::handle query, nb::handle key, nb::handle value, nb::handle keys,
                nb::handle values, nb::handle output, std::optional<Array<int32_t>> key_begin,
                Table cosines, Table sines, bool interleaved, float scale, int threads) {
        const Tensor memory(keys);
        require(memory.ndim() == 3, "memory has three dimensions");
        Layer layer{};
        describe(layer, Tensor(query), Tensor(key), Tensor(value), Tensor(output),
                 memory.shape(0));
        set_memory(layer, memory, Tensor(values));
        set_tables(layer, key_begin, cosines, sines, interleaved, scale);
        require(threads > 0, "there is at least one thread");
        const nb::gil_scoped_release release;
        run(layer, threads);
    }

    // Where a layer's KV lies; its heads and their size are known.
    void set_memory(Layer& l, const Tensor& keys, const Tensor& values) const {
        require(keys.ndim() == 3 && values.ndim() == 3 && keys.stride(2) == 1 &&
                    values.stride(2) == 1,
                "tensors have three dimensions, the last contiguous");
        require(format_of(keys) == l.format && format_of(values) == l.format,
                "all tensors have one dtype");
        const int64_t slots = keys.shape(1);
        require(slots >= num_slots_ && is(keys, l.kv_heads, slots, l.size) &&
                    is(values, l.kv_heads, slots, l.size) &&
                    has_stride(values, 0, keys.stride(0)) && has_stride(values, 1, keys.stride(1)),
                "memory is (KVH, S, D), of keys and values alike");
        l.keys = keys.data();
        l.values = values.data();
        l.memory_head_stride = keys.stride(0);
        l.memory_slot_stride = keys.stride(1);
    }

    // What a layer sees, and how queries are rotated to where keys lie.
    void set_tables(Layer& layer, const std::optional<Array<int32_t>>& key_begin,
                    const Table& cosines, const Table& sines, bool interleaved,
                    float scale) const {
        require(scale > 0, "the scale of scores must be positive");
        require(!key_begin || key_begin->shape(0) == key_end_.size(),
                "`key_begin` has one entry a read");
        require(cosines.shape(0) == sines.shape(0) && cosines.shape(1) == sines.shape(1),
                "cosines and sines have one shape");
        require(static_cast<int64_t>(cosines.shape(0)) > largest_rotation_,
                "the rotation tables are too short");
        layer.key_begin = key_begin ? key_begin->data() : nullptr;
        layer.cosines = cosines.data();
        layer.sines = sines.data();
        layer.rotary_dim = 2 * static_cast<int64_t>(cosines.shape(1));
        require(layer.rotary_dim <= layer.size, "more components are rotated than a head has");
        layer.interleaved = interleaved;
        layer.scale = scale;
    }

    // Check the numbers of heads and rows, and the size of a head.
    void check_heads(const Layer& l) const {
        require(l.kv_heads > 0 && l.group > 0 && l.group <= kMaxGroup, "unusual numbers of heads");
        require(l.size % 16 == 0 && l.size > 0 && l.size <= 256,
                "the head size must be a multiple of 16, up to 256");
        require(l.rows == static_cast<int64_t>(write_slots_.size()), "a row for each slot");
    }

    // Write new keys and values, and attend. Without the interpreter's lock.
    void run(const Layer& layer, int threads) {
        const std::lock_guard<std::mutex> one_at_a_time(entry_);
        make_tasks(layer.group);
        run_kernel(layer, threads);
    }

  private:
    void take_read_groups(const Array<int64_t>& row_indptr, const Array<int64_t>& range_indptr,
                          const Array<int64_t>& slot_begin, const Array<int64_t>& slot_end) {
        require(row_indptr.shape(0) == range_indptr.shape(0) && row_indptr.shape(0) > 0,
                "read groups have rows and slot ranges");
        require(slot_begin.shape(0) == slot_end.shape(0), "slot ranges have a begin and an end");
        const int64_t* const rows = row_indptr.data();
        const int64_t* const ranges = range_indptr.data();
        const int64_t count = static_cast<int64_t>(row_indptr.shape(0)) - 1;
        const int64_t num_ranges = static_cast<int64_t>(slot_begin.shape(0));
        require(rows[0] == 0 && rows[count] == static_cast<int64_t>(rows_.size()) &&
                    ranges[0] == 0 && ranges[count] == num_ranges,
                "read groups cover all rows and slot ranges");
        int64_t read = 0;
        for (int64_t i = 0; i < count; ++i) {
            require(rows[i] <= rows[i + 1] && rows[i + 1] <= rows[count] &&
                        ranges[i] <= ranges[i + 1] && ranges[i + 1] <= num_ranges,
                    "read groups follow each other");
            read_groups_.push_back({rows[i], rows[i + 1], ranges[i], ranges[i + 1]});
            for (int64_t range = ranges[i]; range < ranges[i + 1]; ++range) {
                ranges_.push_back({slot_begin.data()[range], slot_end.data()[range], read});
                read += rows[i + 1] - rows[i];
            }
        }
        require(read == static_cast<int64_t>(key_end_.size()) &&
                    read == static_cast<int64_t>(rotations_.size()),
                "each row of a read group reads each of its slot ranges");
    }

    // A wrong index would be a wild read or write, so nothing is taken on trust.
    void check() {
        const int64_t num_rows = static_cast<int64_t>(write_slots_.size());
        for (const int64_t slot : write_slots_) {
            require(0 <= slot && slot < num_slots_, "a row writes outside of memory");
        }
        for (const int64_t row : rows_) require(0 <= row && row < num_rows, "no such row");
        for (const ReadGroup& group : read_groups_) {
            for (int64_t i = group.range_begin; i < group.range_end; ++i) {
                const SlotRange& range = ranges_[i];
                require(0 <= range.begin && range.begin <= range.end && range.end <= num_slots_,
                        "a slot range lies outside of memory");
                for (int64_t read = 0; read < group.row_end - group.row_begin; ++read) {
                    require(key_end_[range.first_read + read] <= range.end - range.begin,
                            "a row sees more keys than its slot range has");
                }
            }
        }
        for (const int32_t rotation : rotations_) {
            require(rotation >= 0, "a rotation has no entry");
            largest_rotation_ = std::max<int64_t>(largest_rotation_, rotation);
        }
    }

    // Number the results of rows that are in several read groups, those of a row one after the other.
    void find_partials() {
        const int64_t num_rows = static_cast<int64_t>(write_slots_.size());
        std::vector<int64_t> next(num_rows, 0);
        for (const int64_t row : rows_) ++next[row];
        merged_start_.push_back(0);
        for (int64_t row = 0; row < num_rows; ++row) {
            const int64_t results = next[row];
            require(results > 0, "a row reads nothing");
            next[row] = -1;
            if (results == 1) continue;
            merged_rows_.push_back(row);
            next[row] = num_partials_;
            num_partials_ += results;
            merged_start_.push_back(num_partials_);
        }
        for (const int64_t row : rows_) {
            partials_.push_back(next[row] < 0 ? -1 : next[row]++);
        }
    }

    // Those of many queries, then those of few; each largest first, so that threads end at about
    // the same time.
    void make_tasks(int64_t group) {
        if (group == group_) return;
        group_ = group;
        tasks_.clear();
        const int64_t most = kernel_->rows_per_task(group);
        std::vector<std::pair<int64_t, Task>> by_cost;
        for (size_t index = 0; index < read_groups_.size(); ++index) {
            const ReadGroup& readers = read_groups_[index];
            const int64_t rows = readers.row_end - readers.row_begin;
            for (int64_t first = 0; first < rows; first += most) {
                const int64_t last = std::min(rows, first + most);
                int64_t cost = 0;
                for (int64_t i = readers.range_begin; i < readers.range_end; ++i) {
                    for (int64_t row = first; row < last; ++row) {
                        cost += key_end_[ranges_[i].first_read + row];
                    }
                }
                by_cost.push_back({cost, {static_cast<int64_t>(index), 0, first, last}});
            }
        }
        std::stable_sort(by_cost.begin(), by_cost.end(),
                         [](const auto& a, const auto& b) { return a.first > b.first; });
        for (const bool few : {false, true}) {
            if (few) first_few_ = static_cast<int64_t>(tasks_.size());
            for (const auto& [cost, task] : by_cost) {
                const int64_t queries = (task.last - task.first) * group;
                if ((queries <= kFewQueries) == few) tasks_.push_back(task);
            }
        }
    }

    // The stride of a dimension of one may be any number.
    static bool has_stride(const Tensor& t, int dimension, int64_t stride) {
        return t.shape(dimension) <= 1 || t.stride(dimension) == stride;
    }

    static bool is(const Tensor& t, int64_t a, int64_t b, int64_t c) {
        return t.shape(0) == a && t.shape(1) == b && t.shape(2) == c;
    }

    void describe(Layer& l, const Tensor& query, const Tensor& key, const Tensor& value,
                  const Tensor& output, int64_t kv_heads) const {
        l.format = format_of(query);
        for (const Tensor* tensor : {&query, &key, &value, &output}) {
            require(tensor->dtype().is(query.dtype()), "all tensors have one dtype");
            require(tensor->ndim() == 3 && tensor->stride(2) == 1,
                    "tensors have three dimensions, the last contiguous");
        }
        l.kv_heads = kv_heads;
        l.group = kv_heads > 0 ? query.shape(1) / kv_heads : 0;
        l.rows = query.shape(0);
        l.size = query.shape(2);
        require(l.kv_heads * l.group == query.shape(1), "query heads are a multiple of key heads");
        check_heads(l);
        require(is(key, l.rows, l.kv_heads, l.size) && is(value, l.rows, l.kv_heads, l.size),
                "new keys and values are (T, KVH, D)");
        require(is(output, l.rows, l.kv_heads * l.group, l.size) &&
                    has_stride(output, 1, l.size) &&
                    has_stride(output, 0, l.kv_heads * l.group * l.size),
                "the output is (T, H, D), contiguous");
        l.query = query.data();
        l.query_head_stride = query.stride(1);
        l.query_row_stride = query.stride(0);
        l.key = key.data();
        l.key_head_stride = key.stride(1);
        l.key_row_stride = key.stride(0);
        l.value = value.data();
        l.value_head_stride = value.stride(1);
        l.value_row_stride = value.stride(0);
        l.output = output.data();
    }

    void run_kernel(const Layer& layer, int threads) {
        const int64_t heads = layer.kv_heads * layer.group;
        const size_t numbers = static_cast<size_t>(num_partials_ * heads);
        partial_values_.resize(numbers * layer.size);
        partial_sums_.resize(numbers);
        partial_largest_.resize(numbers);
        const Partials partials{partial_values_.data(), partial_sums_.data(),
                                partial_largest_.data()};

        constexpr int64_t kRows = 256;  // fewer are not worth a second thread
        const int64_t chunks = (layer.rows + kRows - 1) / kRows;
        run_tasks(chunks * layer.kv_heads, chunks > 1 ? threads : 1, [&](int64_t i, int) {
            const int64_t first = i / layer.kv_heads * kRows;
            kernel_->write(plan_, layer, i % layer.kv_heads, first,
                           std::min(layer.rows, first + kRows));
        });
        const int64_t scratch_bytes = kernel_->scratch_bytes(layer.size);
        // Tasks of many queries wait for arithmetic, those of few for memory. Threads begin with
        // one or the other, so that neither stands idle. Each call takes one task, and so `count`
        // calls take all of them.
        const int64_t count = static_cast<int64_t>(tasks_.size()) * layer.kv_heads;
        const int64_t first_few = first_few_ * layer.kv_heads;
        std::atomic<int64_t> next[] = {0, first_few};
        const int64_t ends[] = {first_few, count};
        run_tasks(count, threads, [&](int64_t, int worker) {
            const int kind = worker % 2;
            int64_t i = next[kind]++;
            if (i >= ends[kind]) i = next[1 - kind]++;
            Task task = tasks_[i / layer.kv_heads];
            task.kv_head = i % layer.kv_heads;
            kernel_->attend(plan_, layer, task, partials, thread_scratch<Kernel>(scratch_bytes));
        });
        constexpr int64_t kMerged = 16;
        const int64_t merged = static_cast<int64_t>(merged_rows_.size());
        run_tasks((merged + kMerged - 1) / kMerged, threads, [&](int64_t i, int) {
            kernel_->merge(plan_, layer, partials, i * kMerged,
                           std::min(merged, (i + 1) * kMerged));
        });
    }

    const Kernel* kernel_;
    int64_t group_ = 0;  // of the tasks
    int64_t num_slots_;
    int64_t largest_rotation_ = 0;
    std::vector<int64_t> write_slots_, rows_, partials_, merged_rows_, merged_start_;
    std::vector<int32_t> rotations_, key_end_;
    std::vector<ReadGroup> read_groups_;
    std::vector<SlotRange> ranges_;
    int64_t num_partials_ = 0;
    Plan plan_{};  // of the above
    std::vector<Task> tasks_;
    int64_t first_few_ = 0;  // of the tasks, the first of few queries
    std::vector<float> partial_values_, partial_sums_, partial_largest_;
    std::mutex entry_;
};

}  // namespace tokendance
