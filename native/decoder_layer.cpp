// `DecoderLayer` of the Python module: a whole layer of a model in one call.
//
// It does, with the same kernels and in the same order, what `FusedLayer` of models/fused.py does with
// a call for each part, so its numbers are the same to the last bit. Where few rows are computed, the
// calls took a fifth of a step; and each of them lets go of the interpreter's lock, which another
// thread may then keep for milliseconds.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <optional>
#include <string>
#include <tuple>

#include "instruction_sets.h"
#include "product_ops.h"
#include "row_work.h"
#include "scratch.h"
#include "step.h"
#include "tensor.h"

namespace tokendance {
namespace {

// A weight, what is added to the mean square, and whether the factor is 1 + weight.
using NormOfPython = std::tuple<nb::object, float, bool>;

// The norm of rows, or of heads, with its weight.
class HeldNorm {
  public:
    HeldNorm() = default;
    HeldNorm(const NormOfPython& norm, int64_t size) : kept_(std::get<0>(norm)) {
        const Tensor weight(kept_);
        require(weight.ndim() == 1 && weight.shape(0) == size && weight.stride(0) == 1,
                "a weight has one number for each of a row");
        weight_ = weight.data();
        format_ = format_of(weight);
        epsilon_ = std::get<1>(norm);
        from_one_ = std::get<2>(norm);
    }
    HeldNorm(const std::optional<NormOfPython>& norm, int64_t size) {
        if (norm) *this = HeldNorm(*norm, size);
    }

    explicit operator bool() const { return weight_ != nullptr; }
    bool is_of(Format format) const { return weight_ == nullptr || format_ == format; }
    const void* weight() const { return weight_; }
    float epsilon() const { return epsilon_; }
    bool from_one() const { return from_one_; }

  private:
    nb::object kept_;
    const void* weight_ = nullptr;
    Format format_ = Format::kFloat32;
    float epsilon_ = 0.0f;
    bool from_one_ = false;
};

class DecoderLayer {
  public:
    DecoderLayer(const std::string& kernel, nb::object qkv, nb::object output, nb::object gate_up,
                 nb::object down, int64_t heads, int64_t kv_heads, int64_t size,
                 const std::string& activation, const NormOfPython& before,
                 const std::optional<NormOfPython>& after_attention, const NormOfPython& between,
                 const std::optional<NormOfPython>& after_mlp,
                 const std::optional<NormOfPython>& of_query,
                 const std::optional<NormOfPython>& of_key)
        : rows_(set_named(kernel).rows), activation_(activation_named(activation)),
          qkv_(qkv), output_(output), gate_up_(gate_up), down_(down), heads_(heads),
          kv_heads_(kv_heads), size_(size), hidden_(qkv_->inputs()), inner_(down_->inputs()),
          before_(before, hidden_), after_attention_(after_attention, hidden_),
          between_(between, hidden_), after_mlp_(after_mlp, hidden_), of_query_(of_query, size),
          of_key_(of_key, size) {
        require(heads > 0 && kv_heads > 0 && size > 0 && heads % kv_heads == 0,
                "query heads are a multiple of key heads");
        require(qkv_->outputs() == (heads + 2 * kv_heads) * size &&
                    output_->inputs() == heads * size && output_->outputs() == hidden_ &&
                    gate_up_->inputs() == hidden_ && gate_up_->outputs() == 2 * inner_ &&
                    down_->outputs() == hidden_,
                "the products of a layer fit each other");
        require(!of_query_ == !of_key_ && of_query_.epsilon() == of_key_.epsilon() &&
                    of_query_.from_one() == of_key_.from_one(),
                "queries and keys have norms alike, or none");
    }

    void forward(nb::handle hidden, nb::handle cosines, nb::handle sines, Step& step,
                 nb::handle keys, nb::handle values,
                 std::optional<Array<int32_t>> key_begin, Table rope_cosines, Table rope_sines,
                 bool interleaved, float scale, nb::handle output, int threads) const {
        const Tensor in = Tensor(hidden).rows(), out = Tensor(output).rows();
        const Tensor cos = Tensor(cosines).rows(), sin = Tensor(sines).rows();
        require(in.ndim() == 2 && cos.ndim() == 2, "rows have two dimensions");
        const int64_t count = in.shape(0), rotary = cos.shape(1);
        require(rotary % 2 == 0 && rotary <= size_, "more is rotated than a head has");
        require_rows(in, count, hidden_);
        require_rows(out, count, hidden_);
        require_rows(cos, count, rotary);
        require_rows(sin, count, rotary);
        for (const Tensor* tensor : {&out, &cos, &sin}) require_same_dtype(*tensor, in);
        const Format format = format_of(in);
        for (const PackedWeights* weights : {&*qkv_, &*output_, &*gate_up_, &*down_}) {
            require(weights->takes(format), "weights in bfloat16 are multiplied with such rows");
        }
        for (const HeldNorm* norm :
             {&before_, &after_attention_, &between_, &after_mlp_, &of_query_, &of_key_}) {
            require(norm->is_of(format), "weights of norms have the dtype of rows");
        }
        require(threads > 0, "there is at least one thread");
        Layer layer{};
        layer.format = format;
        layer.kv_heads = kv_heads_;
        layer.group = heads_ / kv_heads_;
        layer.rows = count;
        layer.size = size_;
        step.check_heads(layer);
        step.set_memory(layer, Tensor(keys), Tensor(values));
        step.set_tables(layer, key_begin, rope_cosines, rope_sines, interleaved, scale);
        const nb::gil_scoped_release release;
        compute({format, count, rotary, threads, in.data(), cos.data(), sin.data(), out.data()},
                layer, step);
    }

  private:
    // One of its products, held as long as the layer.
    class HeldProduct {
      public:
        explicit HeldProduct(nb::object weights)
            : kept_(weights), weights_(&nb::cast<const PackedWeights&>(weights)) {}
        const PackedWeights* operator->() const { return weights_; }
        const PackedWeights& operator*() const { return *weights_; }

      private:
        nb::object kept_;
        const PackedWeights* weights_;
    };

    struct Rows {
        Format format;
        int64_t count, rotary;
        int threads;
        const void *hidden, *cosines, *sines;
        void* output;
    };

    // What is made on the way, of all rows. `part` is what attention or the gate adds to them, and
    // `other` the norm of that.
    struct Buffers {
        char *normed, *qkv, *attended, *part, *other, *gates, *active;
    };

    Buffers make_buffers(const Rows& rows) const {
        const int64_t sizes[] = {hidden_, (heads_ + 2 * kv_heads_) * size_, heads_ * size_, hidden_,
                                 hidden_, 2 * inner_, inner_};
        Buffers buffers{};
        char** const all[] = {&buffers.normed, &buffers.qkv, &buffers.attended, &buffers.part,
                              &buffers.other, &buffers.gates, &buffers.active};
        const int64_t number = bytes_of(rows.format);
        const auto bytes = [&](int64_t size) {
            constexpr int64_t kLine = sizeof(CacheLine);
            return (rows.count * size * number + kLine - 1) / kLine * kLine;
        };
        int64_t total = 0;
        for (const int64_t size : sizes) total += bytes(size);
        char* memory = thread_scratch<DecoderLayer>(total);
        for (size_t i = 0; i < std::size(sizes); memory += bytes(sizes[i]), ++i) *all[i] = memory;
        return buffers;
    }

    void compute(const Rows& rows, Layer& layer, Step& step) const {
        if (rows.count == 0) return;
        const Buffers to = make_buffers(rows);
        normalise(rows, before_, rows.hidden, to.normed);
        multiply(rows, *qkv_, to.normed, to.qkv);
        rotate(rows, to.qkv);
        attend(rows, to, layer, step);
        multiply(rows, *output_, to.attended, to.part);
        const char* const first = normalised(rows, after_attention_, to.part, to.other);
        normalise(rows, between_, rows.hidden, to.normed, first, rows.output);
        multiply(rows, *gate_up_, to.normed, to.gates);
        const Gate gate{rows.format, activation_, inner_, to.gates, to.active};
        in_row_tasks(rows.count, 2 * inner_, rows.threads,
                     [&](int64_t from, int64_t end) { rows_->gate(gate, from, end); });
        multiply(rows, *down_, to.active, to.part);
        const char* const second = normalised(rows, after_mlp_, to.part, to.other);
        const Addition addition{rows.format, hidden_, rows.output, second};
        in_row_tasks(rows.count, hidden_, rows.threads,
                     [&](int64_t from, int64_t end) { rows_->add(addition, from, end); });
    }

    static void multiply(const Rows& rows, const PackedWeights& weights, const void* from,
                         void* to) {
        weights.multiply_rows(rows.format, from, to, rows.count, rows.threads);
    }

    void normalise(const Rows& rows, const HeldNorm& norm, const void* from, void* to,
                   const void* added = nullptr, void* sums = nullptr) const {
        const Norm work{rows.format,   hidden_, from,           added,          sums,
                        norm.weight(), to,      norm.epsilon(), norm.from_one()};
        in_row_tasks(rows.count, hidden_, rows.threads,
                     [&](int64_t first, int64_t last) { rows_->normalise(work, first, last); });
    }

    // The norm of a part, or the part where there is none.
    const char* normalised(const Rows& rows, const HeldNorm& norm, char* part, char* other) const {
        if (!norm) return part;
        normalise(rows, norm, part, other);
        return other;
    }

    void rotate(const Rows& rows, char* qkv) const {
        const int64_t width = (heads_ + 2 * kv_heads_) * size_;
        const Rotation work{rows.format,         heads_,
                            kv_heads_,           size_,
                            rows.rotary,         qkv,
                            width,               rows.cosines,
                            rows.sines,          of_query_.weight(),
                            of_key_.weight(),    of_query_.epsilon(),
                            of_query_.from_one()};
        in_row_tasks(rows.count, (heads_ + kv_heads_) * size_, rows.threads,
                     [&](int64_t first, int64_t last) { rows_->rotate(work, first, last); });
    }

    void attend(const Rows& rows, const Buffers& to, Layer& layer, Step& step) const {
        const int64_t number = bytes_of(rows.format);
        layer.query = to.qkv;
        layer.key = to.qkv + heads_ * size_ * number;
        layer.value = to.qkv + (heads_ + kv_heads_) * size_ * number;
        layer.query_head_stride = layer.key_head_stride = layer.value_head_stride = size_;
        layer.query_row_stride = layer.key_row_stride = layer.value_row_stride =
            (heads_ + 2 * kv_heads_) * size_;
        layer.output = to.attended;
        step.run(layer, rows.threads);
    }

    const RowKernel* rows_;
    Activation activation_;
    HeldProduct qkv_, output_, gate_up_, down_;
    int64_t heads_, kv_heads_, size_, hidden_, inner_;
    HeldNorm before_, after_attention_, between_, after_mlp_, of_query_, of_key_;
};

}  // namespace

void bind_layers(nb::module_& m) {
    nb::class_<DecoderLayer>(m, "DecoderLayer", "A layer of a model; see models/fused.py.")
        .def(nb::init<const std::string&, nb::object, nb::object, nb::object, nb::object, int64_t,
                      int64_t, int64_t, const std::string&, const NormOfPython&,
                      const std::optional<NormOfPython>&, const NormOfPython&,
                      const std::optional<NormOfPython>&, const std::optional<NormOfPython>&,
                      const std::optional<NormOfPython>&>(),
             nb::arg("kernel"), nb::arg("qkv"), nb::arg("output"), nb::arg("gate_up"),
             nb::arg("down"), nb::arg("heads"), nb::arg("kv_heads"), nb::arg("size"),
             nb::arg("activation"), nb::arg("before"), nb::arg("after_attention").none(),
             nb::arg("between"), nb::arg("after_mlp").none(), nb::arg("of_query").none(),
             nb::arg("of_key").none())
        .def("forward", &DecoderLayer::forward, nb::arg("hidden"), nb::arg("cosines"),
             nb::arg("sines"), nb::arg("step"), nb::arg("keys"), nb::arg("values"),
             nb::arg("key_begin").none(), nb::arg("rope_cosines"), nb::arg("rope_sines"),
             nb::arg("interleaved"), nb::arg("scale"), nb::arg("output"), nb::arg("threads"));
}

}  // namespace tokendance
