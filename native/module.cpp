// The Python module `tokendance.attention._native`.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernel.h"
#include "threads.h"

namespace nb = nanobind;

namespace tokendance {

extern const Kernel kPortable;
#if defined(TD_X86)
extern const Kernel kAvx2, kAvx512, kAvx512Bf16;
#endif

namespace {

// Widest first; only those that this machine can run.
std::vector<const Kernel*> usable_kernels() {
    std::vector<const Kernel*> found;
#if defined(TD_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&kAvx512Bf16);
    if (avx512) found.push_back(&kAvx512);
    if (avx2) found.push_back(&kAvx2);
#endif
    found.push_back(&kPortable);
    return found;
}

template <class Scalar>
using Array = nb::ndarray<const Scalar, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Tensor = nb::ndarray<nb::device::cpu>;
using Table = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <class Scalar>
std::vector<Scalar> copied(const Array<Scalar>& array) {
    return std::vector<Scalar>(array.data(), array.data() + array.shape(0));
}

void require(bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(what);
}

// Memory that starts where a cache line does.
struct alignas(64) CacheLine {
    char bytes[64];
};

// Each thread's scratch memory, not initialised, kept from step to step: for many threads, to map new
// pages takes longer than a step of few rows. It lies near the core that writes it first.
char* thread_scratch(int64_t bytes) {
    thread_local std::unique_ptr<CacheLine[]> memory;
    thread_local int64_t lines = 0;
    const int64_t needed = (bytes + sizeof(CacheLine) - 1) / sizeof(CacheLine);
    if (needed > lines) {
        lines = 0;
        memory.reset(new CacheLine[needed]);
        lines = needed;
    }
    return reinterpret_cast<char*>(memory.get());
}

// The plan of a step, with the tasks that it makes.
class Step {
  public:
    Step(const std::string& kernel, int64_t num_slots, Array<int64_t> write_slots,
         Array<int64_t> unit_rows, Array<int64_t> unit_pieces, Array<int64_t> rows,
         Array<int64_t> starts, Array<int64_t> stops, Array<int32_t> turns, Array<int32_t> lasts)
        : num_slots_(num_slots) {
        for (const Kernel* usable : usable_kernels()) {
            if (kernel == usable->name) kernel_ = usable;
        }
        require(kernel_ != nullptr, "there is no kernel of this name for this machine");
        write_slots_ = copied(write_slots);
        rows_ = copied(rows);
        turns_ = copied(turns);
        lasts_ = copied(lasts);
        take_units(unit_rows, unit_pieces, starts, stops);
        check();
        find_partials();
        plan_ = {write_slots_.data(), units_.data(),       pieces_.data(),
                 rows_.data(),        partials_.data(),    turns_.data(),
                 lasts_.data(),       merged_rows_.data(), merged_start_.data()};
    }

    void attend(Tensor query, Tensor key, Tensor value, Tensor keys, Tensor values, Tensor output,
                std::optional<Array<int32_t>> firsts, Table cosines, Table sines, bool interleaved,
                float scale, int threads) {
        Layer layer{};
        describe(layer, query, key, value, keys, values, output);
        require(scale > 0, "the scale of scores must be positive");
        require(threads > 0, "there is at least one thread");
        require(!firsts || firsts->shape(0) == lasts_.size(), "`firsts` has one entry a read");
        require(cosines.shape(0) == sines.shape(0) && cosines.shape(1) == sines.shape(1),
                "cosines and sines have one shape");
        require(static_cast<int64_t>(cosines.shape(0)) > largest_turn_,
                "the rotation tables are too short");
        layer.firsts = firsts ? firsts->data() : nullptr;
        layer.cosines = cosines.data();
        layer.sines = sines.data();
        layer.rotated = 2 * static_cast<int64_t>(cosines.shape(1));
        require(layer.rotated <= layer.size, "more components turn than a head has");
        layer.interleaved = interleaved;
        layer.scale = scale;
        const nb::gil_scoped_release release;
        const std::lock_guard<std::mutex> one_at_a_time(entry_);
        make_tasks(layer.group);
        run(layer, threads);
    }

  private:
    void take_units(const Array<int64_t>& unit_rows, const Array<int64_t>& unit_pieces,
                    const Array<int64_t>& starts, const Array<int64_t>& stops) {
        require(unit_rows.shape(0) == unit_pieces.shape(0) && unit_rows.shape(0) > 0,
                "units have rows and pieces");
        require(starts.shape(0) == stops.shape(0), "pieces have a start and a stop");
        const int64_t* const rows = unit_rows.data();
        const int64_t* const pieces = unit_pieces.data();
        const int64_t count = static_cast<int64_t>(unit_rows.shape(0)) - 1;
        const int64_t num_pieces = static_cast<int64_t>(starts.shape(0));
        require(rows[0] == 0 && rows[count] == static_cast<int64_t>(rows_.size()) &&
                    pieces[0] == 0 && pieces[count] == num_pieces,
                "units cover all rows and pieces");
        int64_t read = 0;
        for (int64_t i = 0; i < count; ++i) {
            require(rows[i] <= rows[i + 1] && rows[i + 1] <= rows[count] &&
                        pieces[i] <= pieces[i + 1] && pieces[i + 1] <= num_pieces,
                    "units follow each other");
            units_.push_back({rows[i], rows[i + 1], pieces[i], pieces[i + 1]});
            for (int64_t piece = pieces[i]; piece < pieces[i + 1]; ++piece) {
                pieces_.push_back({starts.data()[piece], stops.data()[piece], read});
                read += rows[i + 1] - rows[i];
            }
        }
        require(read == static_cast<int64_t>(lasts_.size()) &&
                    read == static_cast<int64_t>(turns_.size()),
                "each row of a unit reads each of its pieces");
    }

    // A wrong index would be a wild read or write, so nothing is taken on trust.
    void check() {
        const int64_t num_rows = static_cast<int64_t>(write_slots_.size());
        for (const int64_t slot : write_slots_) {
            require(0 <= slot && slot < num_slots_, "a row writes outside of memory");
        }
        for (const int64_t row : rows_) require(0 <= row && row < num_rows, "no such row");
        for (const Unit& unit : units_) {
            for (int64_t i = unit.first_piece; i < unit.last_piece; ++i) {
                const Piece& piece = pieces_[i];
                require(0 <= piece.start && piece.start <= piece.stop && piece.stop <= num_slots_,
                        "a piece lies outside of memory");
                for (int64_t read = 0; read < unit.last_row - unit.first_row; ++read) {
                    require(lasts_[piece.first_read + read] <= piece.stop - piece.start,
                            "a row sees more keys than its piece has");
                }
            }
        }
        for (const int32_t turn : turns_) {
            require(turn >= 0, "a rotation has no entry");
            largest_turn_ = std::max<int64_t>(largest_turn_, turn);
        }
    }

    // Number the results of rows that are in several units, those of a row one after the other.
    void find_partials() {
        const int64_t num_rows = static_cast<int64_t>(write_slots_.size());
        std::vector<int64_t> next(num_rows, 0);
        for (const int64_t row : rows_) ++next[row];
        merged_start_.push_back(0);
        for (int64_t row = 0; row < num_rows; ++row) {
            const int64_t parts = next[row];
            require(parts > 0, "a row reads nothing");
            next[row] = -1;
            if (parts == 1) continue;
            merged_rows_.push_back(row);
            next[row] = num_partials_;
            num_partials_ += parts;
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
        std::vector<std::pair<int64_t, Task>> found;
        for (size_t index = 0; index < units_.size(); ++index) {
            const Unit& unit = units_[index];
            const int64_t rows = unit.last_row - unit.first_row;
            for (int64_t first = 0; first < rows; first += most) {
                const int64_t last = std::min(rows, first + most);
                int64_t cost = 0;
                for (int64_t i = unit.first_piece; i < unit.last_piece; ++i) {
                    for (int64_t row = first; row < last; ++row) {
                        cost += lasts_[pieces_[i].first_read + row];
                    }
                }
                found.push_back({cost, {static_cast<int64_t>(index), 0, first, last}});
            }
        }
        std::stable_sort(found.begin(), found.end(),
                         [](const auto& a, const auto& b) { return a.first > b.first; });
        for (const bool few : {false, true}) {
            if (few) first_few_ = static_cast<int64_t>(tasks_.size());
            for (const auto& [cost, task] : found) {
                const int64_t queries = (task.last - task.first) * group;
                if ((queries <= kFewQueries) == few) tasks_.push_back(task);
            }
        }
    }

    void describe(Layer& l, const Tensor& query, const Tensor& key, const Tensor& value,
                  const Tensor& keys, const Tensor& values, const Tensor& output) const {
        const nb::dlpack::dtype dtype = query.dtype();
        if (dtype == nb::dtype<float>()) {
            l.format = Format::kFloat32;
        } else {
            require(dtype.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat) &&
                        dtype.bits == 16 && dtype.lanes == 1,
                    "the dtype must be float32 or bfloat16");
            l.format = Format::kBFloat16;
        }
        for (const Tensor* other : {&key, &value, &keys, &values, &output}) {
            require(other->dtype() == dtype, "all tensors have one dtype");
            require(other->ndim() == 3 && other->stride(2) == 1,
                    "tensors have three dimensions, the last contiguous");
        }
        // The stride of a dimension of one may be any number.
        const auto has_stride = [](const Tensor& t, int dimension, int64_t stride) {
            return t.shape(dimension) <= 1 || t.stride(dimension) == stride;
        };
        require(query.ndim() == 4 && query.stride(3) == 1,
                "the query has four dimensions, the last contiguous");
        l.kv_heads = query.shape(0);
        l.group = query.shape(1);
        l.rows = query.shape(2);
        l.size = query.shape(3);
        require(l.kv_heads > 0 && l.group > 0 && l.group <= kMaxGroup, "unusual numbers of heads");
        require(l.size % 16 == 0 && l.size > 0 && l.size <= 256,
                "the head size must be a multiple of 16, up to 256");
        require(l.rows == static_cast<int64_t>(write_slots_.size()), "a row for each slot");
        const auto is = [](const Tensor& t, int64_t a, int64_t b, int64_t c) {
            return static_cast<int64_t>(t.shape(0)) == a && static_cast<int64_t>(t.shape(1)) == b &&
                   static_cast<int64_t>(t.shape(2)) == c;
        };
        require(is(key, l.kv_heads, l.rows, l.size) && is(value, l.kv_heads, l.rows, l.size),
                "new keys and values are (KVH, T, D)");
        const int64_t slots = static_cast<int64_t>(keys.shape(1));
        require(slots >= num_slots_ && is(keys, l.kv_heads, slots, l.size) &&
                    is(values, l.kv_heads, slots, l.size) && has_stride(keys, 1, l.size) &&
                    has_stride(values, 1, l.size) && has_stride(values, 0, keys.stride(0)),
                "memory is (KVH, S, D), each head contiguous");
        require(is(output, l.rows, l.kv_heads * l.group, l.size) &&
                    has_stride(output, 1, l.size) &&
                    has_stride(output, 0, l.kv_heads * l.group * l.size),
                "the output is (T, H, D), contiguous");
        l.query = query.data();
        l.query_head_stride = query.stride(0);
        l.query_group_stride = query.stride(1);
        l.query_row_stride = query.stride(2);
        l.key = key.data();
        l.key_head_stride = key.stride(0);
        l.key_row_stride = key.stride(1);
        l.value = value.data();
        l.value_head_stride = value.stride(0);
        l.value_row_stride = value.stride(1);
        l.keys = keys.data();
        l.values = values.data();
        l.memory_head_stride = keys.stride(0);
        l.output = output.data();
    }

    void run(const Layer& layer, int threads) {
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
            kernel_->attend(plan_, layer, task, partials, thread_scratch(scratch_bytes));
        });
        constexpr int64_t kMerged = 16;
        const int64_t merged = static_cast<int64_t>(merged_rows_.size());
        run_tasks((merged + kMerged - 1) / kMerged, threads, [&](int64_t i, int) {
            kernel_->merge(plan_, layer, partials, i * kMerged,
                           std::min(merged, (i + 1) * kMerged));
        });
    }

    const Kernel* kernel_ = nullptr;
    int64_t group_ = 0;  // of the tasks
    int64_t num_slots_;
    int64_t largest_turn_ = 0;
    std::vector<int64_t> write_slots_, rows_, partials_, merged_rows_, merged_start_;
    std::vector<int32_t> turns_, lasts_;
    std::vector<Unit> units_;
    std::vector<Piece> pieces_;
    int64_t num_partials_ = 0;
    Plan plan_{};  // of the above
    std::vector<Task> tasks_;
    int64_t first_few_ = 0;  // of the tasks, the first of few queries
    std::vector<float> partial_values_, partial_sums_, partial_largest_;
    std::mutex entry_;
};

}  // namespace
}  // namespace tokendance

NB_MODULE(_native, m) {
    using namespace tokendance;
    m.doc() = "Shared-in-place attention on a CPU.";
    m.def("kernels", [] {
        std::vector<std::string> names;
        for (const Kernel* kernel : usable_kernels()) names.emplace_back(kernel->name);
        return names;
    }, "Names of the kernels that this machine can run, the fastest first.");
    m.def("thread_source", [] { return std::string(thread_source()); },
          "Whose threads are used: \"openmp\" are torch's, \"own\" are the module's.");
    nb::class_<Step>(m, "Step", "The plan of a step; see attention/native_backend.py.")
        .def(nb::init<const std::string&, int64_t, Array<int64_t>, Array<int64_t>,
                      Array<int64_t>, Array<int64_t>, Array<int64_t>, Array<int64_t>,
                      Array<int32_t>, Array<int32_t>>())
        .def("attend", &Step::attend, nb::arg("query"), nb::arg("key"), nb::arg("value"),
             nb::arg("keys"), nb::arg("values"), nb::arg("output"), nb::arg("firsts").none(),
             nb::arg("cosines"), nb::arg("sines"), nb::arg("interleaved"), nb::arg("scale"),
             nb::arg("threads"));
}
