// A linear layer whose weights are laid out once (products.h), as an object of Python.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <string>
#include <vector>

#include "products.h"

namespace tokendance {

namespace nb = nanobind;

// Weights of a linear layer in panels, in memory that somebody else keeps.
class PackedWeights {
  public:
    PackedWeights(const std::string& kernel, const std::string& kind, nb::handle weight,
                  nb::handle bias, nb::handle memory);

    void multiply(nb::handle rows, nb::handle output, int threads) const;

    // The same for `count` rows, contiguous, of a format that `takes` allows. Without the
    // interpreter's lock.
    void multiply_rows(Format format, const void* rows, void* output, int64_t count,
                       int threads) const;

    bool takes(Format format) const {
        return weights_.kind == WeightKind::kBytes || format == Format::kBFloat16;
    }
    int64_t inputs() const { return weights_.inputs; }
    int64_t outputs() const { return weights_.outputs; }

  private:
    void multiply_in_tasks(const Product& product, int64_t count, int threads) const;

    const ProductKernel* kernel_;
    nb::object memory_;
    Weights weights_;
    int64_t num_panels_, blocks_;
    std::vector<float> bias_;
};

}  // namespace tokendance
