// Vectors of one instruction set, written with the compiler's vector extensions.
//
// Each instruction set is a translation unit of its own that defines TD_LANES (32-bit lanes of a
// vector) and TD_NAMESPACE, so that no function of a wider set can be taken for one of a narrower.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace TD_NAMESPACE {

constexpr int kLanes = TD_LANES;
constexpr int kVectorBytes = 4 * kLanes;

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

template <class Vector, class Scalar>
inline Vector load(const Scalar* from) {
    Vector result;
    std::memcpy(&result, from, sizeof(result));
    return result;
}

template <class Vector, class Scalar>
inline Vector load_first(const Scalar* from, int count) {
    Vector result = {};
    std::memcpy(&result, from, count * sizeof(Scalar));
    return result;
}

template <class Vector, class Scalar>
inline void store(Scalar* to, Vector vector) {
    std::memcpy(to, &vector, sizeof(vector));
}

template <class To, class From>
inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

inline Floats splat(float value) { return Floats{} + value; }

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

template <int kStep, int... kLane>
inline void exchange(Words& a, Words& b, std::integer_sequence<int, kLane...>) {
    const Words low =
        __builtin_shufflevector(a, b, (kLane & kStep ? kLane - kStep + kLanes : kLane)...);
    const Words high =
        __builtin_shufflevector(a, b, (kLane & kStep ? kLane + kLanes : kLane + kStep)...);
    a = low;
    b = high;
}

// Transposes kLanes vectors in place: swaps ever larger blocks across the diagonal.
template <int kStep = 1>
inline void transpose(Words (&rows)[kLanes]) {
    if constexpr (kStep < kLanes) {
        for (int i = 0; i < kLanes; ++i) {
            if ((i & kStep) == 0) {
                exchange<kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kLanes>());
            }
        }
        transpose<2 * kStep>(rows);
    }
}

template <int kStep, int... kLane>
inline Floats shifted(Floats vector, std::integer_sequence<int, kLane...>) {
    return __builtin_shufflevector(vector, vector, (kLane ^ kStep)...);
}

template <int kStep = kLanes / 2>
inline float largest(Floats vector) {
    if constexpr (kStep == 0) {
        return vector[0];
    } else {
        const Floats other = shifted<kStep>(vector, std::make_integer_sequence<int, kLanes>());
        return largest<kStep / 2>(larger(vector, other));
    }
}

template <int kStep = kLanes / 2>
inline float sum(Floats vector) {
    if constexpr (kStep == 0) {
        return vector[0];
    } else {
        const Floats other = shifted<kStep>(vector, std::make_integer_sequence<int, kLanes>());
        return sum<kStep / 2>(vector + other);
    }
}

// 2^x for x <= 0, to about 1e-7 of its value; below 2^-126 it is 0. NaN stays NaN.
inline Floats exp2(Floats x) {
    const Floats magic = splat(12582912.0f);  // adding it rounds to an integer
    const Floats clamped = x < -126.0f ? splat(-126.0f) : x;
    const Floats rounded = clamped + magic;
    const Floats rest = clamped - (rounded - magic);
    // Taylor's series of 2^rest on [-1/2, 1/2]: the first term left out is below 2e-8.
    Floats series = splat(1.5403530e-4f);
    series = series * rest + 1.3333558e-3f;
    series = series * rest + 9.6181291e-3f;
    series = series * rest + 5.5504109e-2f;
    series = series * rest + 2.4022651e-1f;
    series = series * rest + 6.9314718e-1f;
    series = series * rest + 1.0f;
    const Ints power = (bits<Ints>(rounded) - bits<Ints>(magic) + 127) << 23;
    return x < -126.0f ? Floats{} : series * bits<Floats>(power);
}

inline uint16_t to_bf16(float value) {
    const uint32_t word = bits<uint32_t>(value);
    if ((word & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // NaN: rounding could make it infinite
    return static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1)) >> 16);
}

inline float from_bf16(uint16_t half) { return bits<float>(static_cast<uint32_t>(half) << 16); }

}  // namespace TD_NAMESPACE
