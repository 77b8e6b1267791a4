// `RowOps` of the Python module: what lies between the products of a model (rows.h).

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "instruction_sets.h"
#include "row_work.h"
#include "tensor.h"

namespace tokendance {

namespace {

template <class Work>
void for_rows(int64_t rows, int64_t row_size, int threads, const Work& work) {
    const nb::gil_scoped_release release;
    in_row_tasks(rows, row_size, threads, work);
}

const void* weight_of(const nb::handle& weight, const Tensor& rows, int64_t size) {
    if (weight.is_none()) return nullptr;
    const Tensor tensor(weight);
    require_same_dtype(tensor, rows);
    require(tensor.ndim() == 1 && tensor.shape(0) == size && tensor.stride(0) == 1,
            "a weight has one number for each of a row");
    return tensor.data();
}

class RowOps {
  public:
    explicit RowOps(const std::string& kernel)
        : kernel_(set_named(kernel).rows) {}

    void normalise(nb::handle rows, nb::handle added, nb::handle sums, nb::handle weight,
                   float epsilon, bool weight_from_one, nb::handle output, int threads) const {
        const Tensor in = Tensor(rows).rows(), out = Tensor(output).rows();
        require(in.ndim() == 2, "rows have two dimensions");
        const int64_t count = in.shape(0), size = in.shape(1);
        require_rows(in, count, size);
        require_rows(out, count, size);
        require_same_dtype(out, in);
        Norm norm{};
        norm.format = format_of(in);
        norm.size = size;
        norm.rows = in.data();
        norm.weight = weight_of(weight, in, size);
        require(norm.weight != nullptr, "a norm has a weight");
        norm.output = out.data();
        norm.epsilon = epsilon;
        norm.weight_from_one = weight_from_one;
        if (!added.is_none()) {
            const Tensor more = Tensor(added).rows(), both = Tensor(sums).rows();
            require_rows(more, count, size);
            require_rows(both, count, size);
            require_same_dtype(more, in);
            require_same_dtype(both, in);
            norm.added = more.data();
            norm.sums = both.data();
        }
        for_rows(count, size, threads, [&](int64_t first, int64_t last) {
            kernel_->normalise(norm, first, last);
        });
    }

    void rotate(nb::handle rows, int64_t heads, int64_t kv_heads, int64_t size, nb::handle cosines,
                nb::handle sines, nb::handle query_weight, nb::handle key_weight, float epsilon,
                bool weight_from_one, int threads) const {
        const Tensor in = Tensor(rows).rows();
        const Tensor cos = Tensor(cosines).rows(), sin = Tensor(sines).rows();
        require(in.ndim() == 2 && in.stride(1) == 1, "rows have two dimensions, one contiguous");
        const int64_t count = in.shape(0);
        require(heads > 0 && kv_heads > 0 && size > 0 && (heads + kv_heads) * size <= in.shape(1),
                "a row has fewer numbers than its heads");
        require(count <= 1 || in.stride(0) >= in.shape(1), "rows overlap");
        require(cos.ndim() == 2, "cosines have two dimensions");
        const int64_t rotary = cos.shape(1);
        require(rotary % 2 == 0 && rotary <= size, "more is rotated than a head has");
        require_rows(cos, count, rotary);
        require_rows(sin, count, rotary);
        require_same_dtype(cos, in);
        require_same_dtype(sin, in);
        Rotation rotation{};
        rotation.format = format_of(in);
        rotation.heads = heads;
        rotation.kv_heads = kv_heads;
        rotation.size = size;
        rotation.rotary_dim = rotary;
        rotation.rows = in.data();
        rotation.row_stride = in.stride(0);
        rotation.cosines = cos.data();
        rotation.sines = sin.data();
        rotation.query_weight = weight_of(query_weight, in, size);
        rotation.key_weight = weight_of(key_weight, in, size);
        rotation.epsilon = epsilon;
        rotation.weight_from_one = weight_from_one;
        for_rows(count, (heads + kv_heads) * size, threads, [&](int64_t first, int64_t last) {
            kernel_->rotate(rotation, first, last);
        });
    }

    void gate(nb::handle rows, const std::string& activation, nb::handle output,
              int threads) const {
        const Tensor in = Tensor(rows).rows(), out = Tensor(output).rows();
        require(out.ndim() == 2, "rows have two dimensions");
        const int64_t count = out.shape(0), size = out.shape(1);
        require_rows(in, count, 2 * size);
        require_rows(out, count, size);
        require_same_dtype(out, in);
        const Gate gate{format_of(in), activation_named(activation), size, in.data(), out.data()};
        for_rows(count, 2 * size, threads, [&](int64_t first, int64_t last) {
            kernel_->gate(gate, first, last);
        });
    }

  private:
    const RowKernel* kernel_;
};

}  // namespace

void bind_rows(nb::module_& m) {
    nb::class_<RowOps>(m, "RowOps", "What lies between the products; see models/fused.py.")
        .def(nb::init<const std::string&>())
        .def("normalise", &RowOps::normalise, nb::arg("rows"), nb::arg("added").none(),
             nb::arg("sums").none(), nb::arg("weight"), nb::arg("epsilon"),
             nb::arg("weight_from_one"), nb::arg("output"), nb::arg("threads"))
        .def("rotate", &RowOps::rotate, nb::arg("rows"), nb::arg("heads"), nb::arg("kv_heads"),
             nb::arg("size"), nb::arg("cosines"), nb::arg("sines"), nb::arg("query_weight").none(),
             nb::arg("key_weight").none(), nb::arg("epsilon"), nb::arg("weight_from_one"),
             nb::arg("threads"))
        .def("gate", &RowOps::gate, nb::arg("rows"), nb::arg("activation"), nb::arg("output"),
             nb::arg("threads"));
}

}  // namespace tokendance
