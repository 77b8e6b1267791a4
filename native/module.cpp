// The Python module `tokendance.attention._native`.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "instruction_sets.h"
#include "step.h"
#include "threads.h"

namespace nb = nanobind;

namespace tokendance {

void bind_products(nb::module_& m);  // product_ops.cpp
void bind_rows(nb::module_& m);      // row_ops.cpp
void bind_layers(nb::module_& m);    // decoder_layer.cpp

}  // namespace tokendance

NB_MODULE(_native, m) {
    using namespace tokendance;
    m.doc() = "Shared-in-place attention on a CPU, and the products of a model.";
    // What is alive when the interpreter ends is no leak, and nothing to tell a user.
    nb::set_leak_warnings(false);
    m.def("kernels", [] {
        std::vector<std::string> names;
        for (const InstructionSet& set : usable_sets()) names.emplace_back(set.name);
        return names;
    }, "Names of the kernels that this machine can run, the fastest first.");
    m.def("thread_source", [] { return std::string(thread_source()); },
          "Whose threads are used: \"openmp\" are torch's, \"own\" are the module's.");
    nb::class_<Step>(m, "Step", "The plan of a step; see attention/native_backend.py.")
        .def(nb::init<const std::string&, int64_t, Array<int64_t>, Array<int64_t>,
                      Array<int64_t>, Array<int64_t>, Array<int64_t>, Array<int64_t>,
                      Array<int32_t>, Array<int32_t>>())
        .def("extend", &Step::extend)
        .def("attend", &Step::attend, nb::arg("query"), nb::arg("key"), nb::arg("value"),
             nb::arg("keys"), nb::arg("values"), nb::arg("output"), nb::arg("key_begin").none(),
             nb::arg("cosines"), nb::arg("sines"), nb::arg("interleaved"), nb::arg("scale"),
             nb::arg("threads"));
    bind_products(m);
    bind_rows(m);
    bind_layers(m);
}
