// `PackedWeights` of the Python module: a linear layer whose weights are laid out once (products.h).

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "instruction_sets.h"
#include "product_ops.h"
#include "row_work.h"
#include "tensor.h"
#include "threads.h"

namespace tokendance {
namespace {

// Bytes of rows that a task takes with it from panel to panel: half of a second cache.
constexpr int64_t kChunkBytes = 384 << 10;
constexpr int64_t kAlignment = 64;

int64_t rounded_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Numbers as they lie in memory: float, or bfloat16 as uint16_t.
float as_float(float number) { return number; }
float as_float(uint16_t number) {
    const uint32_t word = static_cast<uint32_t>(number) << 16;
    float result;
    std::memcpy(&result, &word, sizeof(result));
    return result;
}

WeightKind kind_named(const std::string& name) {
    require(name == "bfloat16" || name == "int8", "weights are bfloat16 or int8");
    return name == "int8" ? WeightKind::kBytes : WeightKind::kBFloat16;
}

// Where panels and scales lie in the memory of a layer.
struct Layout {
    Layout(WeightKind kind, int64_t inputs, int64_t outputs, int64_t panel) {
        panels = (outputs + panel - 1) / panel;
        blocks = (inputs + kBlock - 1) / kBlock;
        if (kind == WeightKind::kBytes) {
            scales_at = rounded_up(panels * panel * blocks * kBlock, kAlignment);
            bytes = scales_at + rounded_up(panels * panel * blocks * 4, kAlignment);
        } else {
            scales_at = bytes = rounded_up(panels * panel * inputs * 2, kAlignment);
        }
    }
    int64_t panels, blocks, scales_at, bytes;
};

void pack_pairs(const uint16_t* weight, const Weights& w, const Layout& layout, int64_t panel,
                uint16_t* to) {
    for (int64_t p = 0; p < layout.panels; ++p) {
        for (int64_t k = 0; k < w.inputs; k += 2) {
            for (int64_t lane = 0; lane < panel; ++lane, to += 2) {
                const int64_t n = p * panel + lane;
                for (int64_t i = 0; i < 2; ++i) {
                    to[i] = n < w.outputs ? weight[n * w.inputs + k + i] : 0;
                }
            }
        }
    }
}

template <class Number>
void pack_bytes(const Number* weight, const Weights& w, const Layout& layout, int64_t panel,
                uint8_t* to, float* scales) {
    std::fill(to, to + layout.panels * panel * layout.blocks * kBlock, uint8_t{128});
    std::fill(scales, scales + layout.panels * panel * layout.blocks, 0.0f);
    for (int64_t n = 0; n < w.outputs; ++n) {
        const int64_t p = n / panel, lane = n % panel;
        for (int64_t block = 0; block < layout.blocks; ++block) {
            const int64_t first = block * kBlock, last = std::min(w.inputs, first + kBlock);
            const Number* const row = weight + n * w.inputs;
            float most = 0.0f, finite = 0.0f;  // else it is no number, as all that comes of it
            for (int64_t k = first; k < last; ++k) {
                most = std::max(most, std::abs(as_float(row[k])));
                finite += as_float(row[k]) * 0.0f;
            }
            const int64_t place = p * layout.blocks + block;
            scales[place * panel + lane] = most / 127.0f + finite;
            if (finite != 0.0f) continue;
            const float inverse = most < 1e-30f ? 0.0f : 127.0f / most;
            for (int64_t k = first; k < last; ++k) {
                const int64_t in = k - first;
                to[place * kBlock * panel + (in / 4 * panel + lane) * 4 + in % 4] =
                    static_cast<uint8_t>(128 + std::lrint(as_float(row[k]) * inverse));
            }
        }
    }
}

int64_t packed_bytes(const std::string& kernel, const std::string& kind, int64_t inputs,
                     int64_t outputs) {
    const ProductKernel& products = *set_named(kernel).products;
    return Layout(kind_named(kind), inputs, outputs, products.panel).bytes;
}

bool has_pairs(const std::string& kernel, int64_t inputs) {
    return set_named(kernel).products->has_pairs && inputs % 2 == 0;
}

void pack(const Tensor& weight, const Weights& weights, const Layout& layout, int64_t panel) {
    char* const to = static_cast<char*>(const_cast<void*>(weights.panels));
    const auto as_bytes = [&](const auto* numbers) {
        pack_bytes(numbers, weights, layout, panel, reinterpret_cast<uint8_t*>(to),
                   reinterpret_cast<float*>(to + layout.scales_at));
    };
    const bool bytes = weights.kind == WeightKind::kBytes;
    if (format_of(weight) == Format::kBFloat16) {
        const auto* const halves = static_cast<const uint16_t*>(weight.data());
        if (bytes) return as_bytes(halves);
        pack_pairs(halves, weights, layout, panel, reinterpret_cast<uint16_t*>(to));
    } else {
        require(bytes, "only weights in bfloat16 are kept in bfloat16");
        as_bytes(static_cast<const float*>(weight.data()));
    }
}

}  // namespace

PackedWeights::PackedWeights(const std::string& kernel, const std::string& kind,
                             nb::handle weight, nb::handle bias, nb::handle memory)
    : kernel_(set_named(kernel).products), memory_(nb::borrow(memory)) {
    const Tensor from(weight), to(memory);
    require(from.ndim() == 2 && from.stride(1) == 1 && from.stride(0) == from.shape(1),
            "a weight has two dimensions and is contiguous");
    weights_ = {kind_named(kind), from.shape(1), from.shape(0), to.data(), nullptr};
    require(weights_.kind == WeightKind::kBytes || has_pairs(kernel, from.shape(1)),
            "pairs of bfloat16 are not multiplied by this kernel, or the inputs are no pairs");
    const Layout layout(weights_.kind, weights_.inputs, weights_.outputs, kernel_->panel);
    require(to.ndim() == 1 && to.stride(0) == 1 && to.shape(0) >= layout.bytes &&
                reinterpret_cast<uintptr_t>(to.data()) % kAlignment == 0,
            "the memory is too small, or not aligned");
    num_panels_ = layout.panels;
    blocks_ = layout.blocks;
    weights_.scales = reinterpret_cast<const float*>(static_cast<char*>(to.data()) + layout.scales_at);
    pack(from, weights_, layout, kernel_->panel);
    if (bias.is_none()) return;
    const Tensor add(bias);
    require(add.ndim() == 1 && add.shape(0) == weights_.outputs && add.stride(0) == 1 &&
                format_of(add) == Format::kFloat32,
            "a bias has a float32 number for each output");
    const float* const numbers = static_cast<const float*>(add.data());
    bias_.assign(numbers, numbers + weights_.outputs);
}

void PackedWeights::multiply(nb::handle rows, nb::handle output, int threads) const {
    const Tensor in = Tensor(rows).rows(), out = Tensor(output).rows();
    require(in.ndim() == 2 && out.ndim() == 2, "rows have two dimensions");
    const int64_t count = in.shape(0);
    require_rows(in, count, weights_.inputs);
    require_rows(out, count, weights_.outputs);
    require_same_dtype(out, in);
    const Format format = format_of(in);
    require(takes(format), "weights in bfloat16 are multiplied with rows in bfloat16");
    const nb::gil_scoped_release release;
    multiply_rows(format, in.data(), out.data(), count, threads);
}

void PackedWeights::multiply_rows(Format format, const void* rows, void* output, int64_t count,
                                  int threads) const {
    Product product{weights_, format, rows, {}, bias_.empty() ? nullptr : bias_.data(), output};
    std::vector<int8_t> numbers;
    std::vector<float> scales;
    std::vector<int32_t> offsets;
    if (weights_.kind == WeightKind::kBytes) {
        numbers.resize(count * blocks_ * kBlock);
        scales.resize(count * blocks_);
        offsets.resize(count * blocks_);
        product.bytes = {blocks_, numbers.data(), scales.data(), offsets.data()};
        constexpr int64_t kRowsPerTask = 64;
        run_tasks((count + kRowsPerTask - 1) / kRowsPerTask, threads, [&](int64_t i, int) {
            kernel_->to_bytes(product, i * kRowsPerTask, std::min(count, (i + 1) * kRowsPerTask));
        });
    }
    multiply_in_tasks(product, count, threads);
}

void PackedWeights::multiply_in_tasks(const Product& product, int64_t count, int threads) const {
    if (count == 0) return;
    const int64_t row_bytes = weights_.inputs * (weights_.kind == WeightKind::kBytes ? 1 : 2);
    const int64_t most = std::max<int64_t>(1, kChunkBytes / row_bytes);
    const int64_t chunks = (count + most - 1) / most;
    // Some tasks for each thread, so that one which is held up does not hold up all.
    const int64_t wanted = (4 * threads + chunks - 1) / chunks;
    const int64_t parts = std::min(num_panels_, wanted);
    run_tasks(chunks * parts, threads, [&](int64_t i, int) {
        const int64_t part = i % parts, chunk = i / parts;
        kernel_->multiply(product, count * chunk / chunks, count * (chunk + 1) / chunks,
                          num_panels_ * part / parts, num_panels_ * (part + 1) / parts);
    });
}

void bind_products(nb::module_& m) {
    m.def("packed_bytes", &packed_bytes, nb::arg("kernel"), nb::arg("kind"), nb::arg("inputs"),
          nb::arg("outputs"), "Bytes that the weights of a layer take, a multiple of 64.");
    m.def("has_pairs", &has_pairs, nb::arg("kernel"), nb::arg("inputs"),
          "Whether weights in bfloat16, with so many inputs, can be multiplied.");
    nb::class_<PackedWeights>(m, "PackedWeights", "A linear layer; see models/packing.py.")
        .def(nb::init<const std::string&, const std::string&, nb::handle, nb::handle, nb::handle>(),
             nb::arg("kernel"), nb::arg("kind"), nb::arg("weight"), nb::arg("bias").none(),
             nb::arg("memory"))
        .def("multiply", &PackedWeights::multiply, nb::arg("rows"), nb::arg("output"),
             nb::arg("threads"));
}

}  // namespace tokendance
