// Vectors of one instruction set, written with the compiler's vector extensions.
//
// Each instruction set is a translation unit of its own that defines TD_LANES (32-bit lanes of a
// vector) and TD_NAMESPACE, so that no function of a wider set can be taken for one of a narrower.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace TD_NAMESPACE {

constexpr int kLanes = TD_LANES;
constexpr int kVectorBytes = 4 * kLanes;

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));
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
inline Floats add_neighbours(Floats a, Floats b, std::integer_sequence<int, kLane...>) {
    // Of these two only one is a shuffle for the machine; the other blends.
    const Floats same =
        __builtin_shufflevector(a, b, (kLane & kStep ? kLane + kLanes : kLane)...);
    const Floats neighbours =
        __builtin_shufflevector(a, b, (kLane & kStep ? kLane - kStep + kLanes : kLane + kStep)...);
    return same + neighbours;
}

// Lane i becomes the sum of all lanes of vector i. The vectors are used up.
template <int kStep = 1>
inline Floats sums_of(Floats (&vectors)[kLanes]) {
    if constexpr (kStep < kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i += 2 * kStep) {
            vectors[i] = add_neighbours<kStep>(vectors[i], vectors[i + kStep],
                                               std::make_integer_sequence<int, kLanes>());
        }
        return sums_of<2 * kStep>(vectors);
    }
    return vectors[0];
}

template <int kStep, int... kLane>
inline Floats shifted(Floats vector, std::integer_sequence<int, kLane...>) {
    return __builtin_shufflevector(vector, vector, (kLane ^ kStep)...);
}

// All lanes combined into one, by halves.
template <int kStep = kLanes / 2, class Combine>
inline float fold(Floats vector, Combine combine) {
    if constexpr (kStep == 0) {
        return vector[0];
    } else {
        const Floats other = shifted<kStep>(vector, std::make_integer_sequence<int, kLanes>());
        return fold<kStep / 2>(combine(vector, other), combine);
    }
}

inline float largest(Floats vector) {
    return fold(vector, [](Floats a, Floats b) { return larger(a, b); });
}

inline float sum(Floats vector) {
    return fold(vector, [](Floats a, Floats b) { return a + b; });
}

// Polynomials of least relative error for 2^x on [-1/2, 1/2].
constexpr float kShort[] = {0.999999261f, 0.693121815f, 0.240247448f, 0.0559178603f,
                            0.00957010179f};
constexpr float kLong[] = {1.0f,           0.693147206f,  0.240226469f,  0.0555032878f,
                           0.00961848896f, 0.00133999312f, 0.000153458119f};

// 2^x for x <= 0, to about 1e-7 of its value, or 4e-6 if it is to be rounded to bfloat16 anyway. Far
// below 2^-126 it is 0. NaN stays NaN.
template <bool kRounded>
inline Floats exp2(Floats x) {
#if defined(__AVX512F__)
    // 2^-200 is 0. The order of arguments matters: where one of them is NaN, the second is taken.
    const __m512 clamped = _mm512_max_ps(bits<__m512>(splat(-200.0f)), bits<__m512>(x));
    const __m512 whole = _mm512_roundscale_ps(clamped, _MM_FROUND_TO_NEAREST_INT);
    const Floats rest = bits<Floats>(clamped) - bits<Floats>(whole);
#else
    const Floats magic = splat(12582912.0f);  // adding it rounds to an integer
    const Floats clamped = x < -126.0f ? splat(-126.0f) : x;
    const Floats rounded = clamped + magic;
    const Floats rest = clamped - (rounded - magic);
#endif
    Floats series;
    if constexpr (kRounded) {
        series = splat(kShort[4]);
        for (int i = 3; i >= 0; --i) series = series * rest + kShort[i];
    } else {
        series = splat(kLong[6]);
        for (int i = 5; i >= 0; --i) series = series * rest + kLong[i];
    }
#if defined(__AVX512F__)
    return bits<Floats>(_mm512_scalef_ps(bits<__m512>(series), whole));
#else
    const Ints power = (bits<Ints>(rounded) - bits<Ints>(magic) + 127) << 23;
    return x < -126.0f ? Floats{} : series * bits<Floats>(power);
#endif
}

inline uint16_t to_bf16(float value) {
    const uint32_t word = bits<uint32_t>(value);
    if ((word & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // NaN: rounding could make it infinite
    return static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1)) >> 16);
}

inline float from_bf16(uint16_t half) { return bits<float>(static_cast<uint32_t>(half) << 16); }

// Numbers in bfloat16, as the bits of floats.
inline Words widened(const uint16_t* numbers) {
    return __builtin_convertvector(load<Halves>(numbers), Words) << 16;
}

// How numbers lie in memory: float, or bfloat16 as uint16_t.
inline float to_float(float value) { return value; }
inline float to_float(uint16_t value) { return from_bf16(value); }
inline void put(float* to, float value) { *to = value; }
inline void put(uint16_t* to, float value) { *to = to_bf16(value); }

// A vector of numbers that lie in memory as float, or as bfloat16 in uint16_t.
inline Floats read(const float* from) { return load<Floats>(from); }
inline Floats read(const uint16_t* from) { return bits<Floats>(widened(from)); }
inline void write(float* to, Floats numbers) { store(to, numbers); }
inline void write(uint16_t* to, Floats numbers) {
    const Words words = bits<Words>(numbers);
    const Words rounded = (words + 0x7fffu + ((words >> 16) & 1)) >> 16;
    // NaN: rounding could make it infinite.
    const Words safe = (words & 0x7fffffffu) > 0x7f800000u ? Words{} + 0x7fc0u : rounded;
    store(to, __builtin_convertvector(safe, Halves));
}

}  // namespace TD_NAMESPACE
