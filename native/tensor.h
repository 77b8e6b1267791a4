// Tensors of torch.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <stdexcept>

#include "kernel.h"

namespace tokendance {

namespace nb = nanobind;

inline void require(bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(what);
}

// A torch tensor as torch says that it lies there. DLPack says the same, in ten times the time: 2
// microseconds for each tensor are as long as a layer takes that decodes one request.
class Tensor {
  public:
    explicit Tensor(nb::handle tensor)
        : data_(reinterpret_cast<void*>(nb::cast<uintptr_t>(tensor.attr("data_ptr")()))),
          dtype_(tensor.attr("dtype")) {
        require(nb::cast<bool>(tensor.attr("is_cpu")), "tensors lie in the memory of the CPU");
        const auto shape = nb::cast<nb::tuple>(tensor.attr("shape"));
        const auto strides = nb::cast<nb::tuple>(tensor.attr("stride")());
        ndim_ = shape.size();
        require(ndim_ <= kMaxDimensions, "tensors have three dimensions at most");
        for (size_t i = 0; i < ndim_; ++i) {
            shape_[i] = nb::cast<int64_t>(shape[i]);
            strides_[i] = nb::cast<int64_t>(strides[i]);
        }
    }

    // The same without a first dimension of one, as models have it for their batch.
    Tensor rows() const {
        Tensor result = *this;
        if (ndim_ == 3 && shape_[0] == 1) {
            --result.ndim_;
            std::copy(shape_ + 1, shape_ + 3, result.shape_);
            std::copy(strides_ + 1, strides_ + 3, result.strides_);
        }
        return result;
    }

    void* data() const { return data_; }
    nb::handle dtype() const { return dtype_; }  // one object for each
    size_t ndim() const { return ndim_; }
    int64_t shape(size_t i) const { return shape_[i]; }
    int64_t stride(size_t i) const { return strides_[i]; }

  private:
    static constexpr size_t kMaxDimensions = 3;
    void* data_;
    nb::object dtype_;
    size_t ndim_;
    int64_t shape_[kMaxDimensions], strides_[kMaxDimensions];
};

// float32 or bfloat16.
inline Format format_of(const Tensor& tensor) {
    const auto kind = [](const char* name) {  // never freed: it lives as long as torch does
        return nb::object(nb::module_::import_("torch").attr(name)).release();
    };
    static const nb::handle kinds[] = {kind("float32"), kind("bfloat16")};
    if (tensor.dtype().is(kinds[0])) return Format::kFloat32;
    require(tensor.dtype().is(kinds[1]), "the dtype must be float32 or bfloat16");
    return Format::kBFloat16;
}

inline int64_t bytes_of(Format format) { return format == Format::kFloat32 ? 4 : 2; }

}  // namespace tokendance
