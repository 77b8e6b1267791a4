// What lies between the products of a model, fused: one call in place of five to ten of torch's, and
// each number is read and written once. Compiled once for each instruction set: see simd.h.
//
// Sums and functions are in float32; a result is rounded to the dtype once, but where models of
// transformers round in between, and a rounding decides what is computed next, we round there, too.

#include "rows.h"

#include "simd.h"

namespace TD_NAMESPACE {

using tokendance::Activation;
using tokendance::Addition;
using tokendance::Format;
using tokendance::Gate;
using tokendance::Norm;
using tokendance::Rotation;
using tokendance::RowKernel;

// As a number of the dtype is read again after it was written.
inline Floats rounded(Floats numbers, const float*) { return numbers; }
inline Floats rounded(Floats numbers, const uint16_t*) {
    uint16_t halves[kLanes];
    write(halves, numbers);
    return read(halves);
}
inline float rounded_one(float number, const float*) { return number; }
inline float rounded_one(float number, const uint16_t*) { return from_bf16(to_bf16(number)); }

// ---- norm --------------------------------------------------------------------------------------

template <class Number>
inline float inverse_rms(const Number* row, int64_t size, float epsilon) {
    Floats squares[4] = {};
    int64_t i = 0;
    for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
        for (int part = 0; part < 4; ++part) {
            const Floats numbers = read(row + i + part * kLanes);
            squares[part] += numbers * numbers;
        }
    }
    for (; i + kLanes <= size; i += kLanes) {
        const Floats numbers = read(row + i);
        squares[0] += numbers * numbers;
    }
    float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    for (; i < size; ++i) {
        const float number = to_float(row[i]);
        total += number * number;
    }
    return 1.0f / __builtin_sqrtf(total / static_cast<float>(size) + epsilon);
}

template <class Number>
inline void scale_row(const Number* row, const Number* weight, float factor, bool from_one,
                      int64_t size, Number* output) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        const Floats numbers = read(row + i) * factor;
        const Floats weights = read(weight + i);
        write(output + i, from_one ? numbers * (weights + 1.0f)
                                   : rounded(numbers, row) * weights);
    }
    for (; i < size; ++i) {
        const float number = to_float(row[i]) * factor;
        const float one = to_float(weight[i]);
        put(output + i, from_one ? number * (one + 1.0f) : rounded_one(number, row) * one);
    }
}

// Write the sums of numbers; they may take the place of one of them.
template <class Number>
inline void add_numbers(const Number* one, const Number* other, int64_t count, Number* sums) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) write(sums + i, read(one + i) + read(other + i));
    for (; i < count; ++i) put(sums + i, to_float(one[i]) + to_float(other[i]));
}

template <class Number>
void add_as(const Addition& addition, int64_t first, int64_t last) {
    Number* const rows = static_cast<Number*>(addition.rows) + first * addition.size;
    const Number* const added = static_cast<const Number*>(addition.added) + first * addition.size;
    add_numbers(rows, added, (last - first) * addition.size, rows);
}

template <class Number>
void normalise_as(const Norm& norm, int64_t first, int64_t last) {
    const int64_t size = norm.size;
    for (int64_t at = first * size; at < last * size; at += size) {
        const Number* row = static_cast<const Number*>(norm.rows) + at;
        if (norm.added != nullptr) {
            Number* const sums = static_cast<Number*>(norm.sums) + at;
            add_numbers(row, static_cast<const Number*>(norm.added) + at, size, sums);
            row = sums;
        }
        scale_row(row, static_cast<const Number*>(norm.weight),
                  inverse_rms(row, size, norm.epsilon), norm.weight_from_one, size,
                  static_cast<Number*>(norm.output) + at);
    }
}

// ---- rotation ----------------------------------------------------------------------------------

template <class Number>
inline void rotate_head(Number* head, const Number* cosines, const Number* sines, int64_t half) {
    Number* const other = head + half;
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
        const Floats a = read(head + i), b = read(other + i);
        write(head + i, a * read(cosines + i) - b * read(sines + i));
        write(other + i, b * read(cosines + half + i) + a * read(sines + half + i));
    }
    for (; i < half; ++i) {
        const float a = to_float(head[i]), b = to_float(other[i]);
        put(head + i, a * to_float(cosines[i]) - b * to_float(sines[i]));
        put(other + i, b * to_float(cosines[half + i]) + a * to_float(sines[half + i]));
    }
}

template <class Number>
void rotate_as(const Rotation& r, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        Number* head = static_cast<Number*>(r.rows) + row * r.row_stride;
        const Number* const cosines = static_cast<const Number*>(r.cosines) + row * r.rotary_dim;
        const Number* const sines = static_cast<const Number*>(r.sines) + row * r.rotary_dim;
        for (int64_t i = 0; i < r.heads + r.kv_heads; ++i, head += r.size) {
            const void* const weight = i < r.heads ? r.query_weight : r.key_weight;
            if (weight != nullptr) {
                scale_row(head, static_cast<const Number*>(weight),
                          inverse_rms(head, r.size, r.epsilon), r.weight_from_one, r.size, head);
            }
            rotate_head(head, cosines, sines, r.rotary_dim / 2);
        }
    }
}

// ---- gate --------------------------------------------------------------------------------------

constexpr float kLog2E = 1.44269504f;

inline Floats magnitude(Floats x) { return bits<Floats>(bits<Words>(x) & 0x7fffffffu); }

inline Floats sigmoid(Floats x) {
    const Floats small = exp2<false>(magnitude(x) * -kLog2E);  // at most 1
    return (x >= 0.0f ? splat(1.0f) : small) / (small + 1.0f);
}

// x times the sigmoid of 2 u is what "gelu_tanh" is, as 1 + tanh(u) is 2 sigmoid(2 u).
inline Floats activate(Floats x, Activation activation) {
    if (activation == Activation::kSilu) return x * sigmoid(x);
    const Floats u = (x + x * x * x * 0.044715f) * 1.59576912f;  // 2 sqrt(2 / pi)
    return x * sigmoid(u);
}

template <class Number>
void gate_as(const Gate& gate, int64_t first, int64_t last) {
    const int64_t size = gate.size;
    for (int64_t row = first; row < last; ++row) {
        const Number* const gates = static_cast<const Number*>(gate.rows) + row * 2 * size;
        const Number* const values = gates + size;
        Number* const output = static_cast<Number*>(gate.output) + row * size;
        int64_t i = 0;
        for (; i + kLanes <= size; i += kLanes) {
            const Floats active = rounded(activate(read(gates + i), gate.activation), gates);
            write(output + i, active * read(values + i));
        }
        for (; i < size; ++i) {
            const float active = activate(splat(to_float(gates[i])), gate.activation)[0];
            put(output + i, rounded_one(active, gates) * to_float(values[i]));
        }
    }
}

// ---- by dtype ----------------------------------------------------------------------------------

void normalise(const Norm& norm, int64_t first, int64_t last) {
    if (norm.format == Format::kFloat32) return normalise_as<float>(norm, first, last);
    normalise_as<uint16_t>(norm, first, last);
}

void rotate(const Rotation& rotation, int64_t first, int64_t last) {
    if (rotation.format == Format::kFloat32) return rotate_as<float>(rotation, first, last);
    rotate_as<uint16_t>(rotation, first, last);
}

void gate(const Gate& gate, int64_t first, int64_t last) {
    if (gate.format == Format::kFloat32) return gate_as<float>(gate, first, last);
    gate_as<uint16_t>(gate, first, last);
}

void add(const Addition& addition, int64_t first, int64_t last) {
    if (addition.format == Format::kFloat32) return add_as<float>(addition, first, last);
    add_as<uint16_t>(addition, first, last);
}

extern const RowKernel kRows = {normalise, rotate, gate, add};

}  // namespace TD_NAMESPACE
