// Tensors of torch, and which code may run on them.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

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

// Of the kernels of all instruction sets, those that this machine can run, in their order.
template <class Kernel>
std::vector<const Kernel*> usable(std::initializer_list<const Kernel*> kernels) {
    const auto runs = [](const char* name) {
#if defined(TD_X86)
        __builtin_cpu_init();
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool avx512 =
            avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        if (std::strcmp(name, "avx2") == 0) return avx2;
        if (std::strcmp(name, "avx512") == 0) return avx512;
        if (std::strcmp(name, "avx512-bf16") == 0) {
            return avx512 && __builtin_cpu_supports("avx512bf16") != 0;
        }
#endif
        return std::strcmp(name, "portable") == 0;
    };
    std::vector<const Kernel*> found;
    for (const Kernel* kernel : kernels) {
        if (runs(kernel->name)) found.push_back(kernel);
    }
    return found;
}

// The one of them that has a name.
template <class Kernel>
const Kernel* kernel_named(const std::string& name, const std::vector<const Kernel*>& kernels) {
    const auto found = std::find_if(kernels.begin(), kernels.end(), [&](const Kernel* kernel) {
        return name == kernel->name;
    });
    require(found != kernels.end(), "there is no kernel of this name for this machine");
    return *found;
}

}  // namespace tokendance
