// Products of rows and weights. Compiled once for each instruction set: see simd.h.
//
// Some rows are multiplied with a panel at once: what is loaded of the panel serves all of them, and
// their sums stay in registers for as long as the inputs go on. In bfloat16 sums are of float32. In
// bytes those of a block are integers, exact; then they are scaled and added as float32.

#include "products.h"

#include "simd.h"

namespace TD_NAMESPACE {

using tokendance::ByteRows;
using tokendance::Format;
using tokendance::kBlock;
using tokendance::Product;
using tokendance::ProductKernel;
using tokendance::WeightKind;

constexpr int kVectors = 2;  // of a panel
constexpr int kPanel = kVectors * kLanes;
// Sums of pairs, and of bytes, which have two kinds of sums: as many as the registers hold.
constexpr int kPairRows = kLanes == 16 ? 12 : 4;
constexpr int kByteRows = kLanes == 16 ? 8 : 2;

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

// ---- results -----------------------------------------------------------------------------------

template <class Number>
inline void put_sums(Floats sums, const float* bias, Number* output, int64_t count) {
    if (count >= kLanes) {
        write(output, bias == nullptr ? sums : sums + load<Floats>(bias));
        return;
    }
    float numbers[kLanes];
    store(numbers, sums);
    for (int64_t i = 0; i < count; ++i) put(output + i, numbers[i] + (bias ? bias[i] : 0.0f));
}

template <int kRows>
inline void put_panel(const Product& p, int64_t row, int64_t panel,
                      const Floats (&sums)[kRows][kVectors]) {
    for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kVectors; ++j) {
            const int64_t first = panel * kPanel + j * kLanes;
            const int64_t count = p.weights.outputs - first;
            if (count <= 0) break;
            const float* const bias = p.bias == nullptr ? nullptr : p.bias + first;
            const int64_t at = (row + i) * p.weights.outputs + first;
            if (p.format == Format::kFloat32) {
                put_sums(sums[i][j], bias, static_cast<float*>(p.output) + at, count);
            } else {
                put_sums(sums[i][j], bias, static_cast<uint16_t*>(p.output) + at, count);
            }
        }
    }
}

// ---- bfloat16 ----------------------------------------------------------------------------------

#if defined(__AVX512BF16__)
template <int kRows>
void multiply_pairs(const Product& p, int64_t row, int64_t panel) {
    const int64_t pairs = p.weights.inputs / 2;
    const uint32_t* weights =
        static_cast<const uint32_t*>(p.weights.panels) + panel * pairs * kPanel;
    const uint16_t* const rows = static_cast<const uint16_t*>(p.rows) + row * p.weights.inputs;
    __m512 sums[kRows][kVectors];
    for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kVectors; ++j) sums[i][j] = _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < pairs; ++k, weights += kPanel) {
        const __m512bh left = bits<__m512bh>(load<Words>(weights));
        const __m512bh right = bits<__m512bh>(load<Words>(weights + kLanes));
#pragma GCC unroll 12
        for (int i = 0; i < kRows; ++i) {
            uint32_t pair;
            std::memcpy(&pair, rows + i * p.weights.inputs + 2 * k, sizeof(pair));
            const __m512bh numbers = bits<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair)));
            sums[i][0] = _mm512_dpbf16_ps(sums[i][0], left, numbers);
            sums[i][1] = _mm512_dpbf16_ps(sums[i][1], right, numbers);
        }
    }
    Floats results[kRows][kVectors];
    for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kVectors; ++j) results[i][j] = bits<Floats>(sums[i][j]);
    }
    put_panel<kRows>(p, row, panel, results);
}
#else
template <int kRows>
void multiply_pairs(const Product&, int64_t, int64_t) {}
#endif

// ---- bytes -------------------------------------------------------------------------------------

// To each lane: the sum of four products of its unsigned bytes of weights and its signed ones.
inline Ints add_products(Ints sum, Words weights, Ints numbers) {
#if defined(__AVX512VNNI__)
    return bits<Ints>(_mm512_dpbusd_epi32(bits<__m512i>(sum), bits<__m512i>(weights),
                                          bits<__m512i>(numbers)));
#elif defined(__AVX512BW__)
    // Bytes 0 and 2, then 1 and 3, as numbers of 16 bits, whose products are added in pairs.
    const __m512i w = bits<__m512i>(weights), n = bits<__m512i>(numbers);
    const __m512i even = _mm512_madd_epi16(_mm512_and_si512(w, _mm512_set1_epi16(255)),
                                           _mm512_srai_epi16(_mm512_slli_epi16(n, 8), 8));
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(n, 8));
    return sum + bits<Ints>(_mm512_add_epi32(even, odd));
#elif defined(__AVX2__)
    const __m256i w = bits<__m256i>(weights), n = bits<__m256i>(numbers);
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(n, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(n, 8));
    return sum + bits<Ints>(_mm256_add_epi32(even, odd));
#else
    for (int byte = 0; byte < 4; ++byte) {
        const Words weight = (weights >> (8 * byte)) & 255u;
        sum += bits<Ints>(weight) * ((numbers << (24 - 8 * byte)) >> 24);
    }
    return sum;
#endif
}

template <int kRows>
void multiply_bytes(const Product& p, int64_t row, int64_t panel) {
    const ByteRows& rows = p.bytes;
    const int64_t size = rows.blocks * kBlock;
    const uint8_t* weights = static_cast<const uint8_t*>(p.weights.panels) + panel * size * kPanel;
    const float* scales = p.weights.scales + panel * rows.blocks * kPanel;
    const int8_t* const numbers = rows.numbers + row * size;
    Floats totals[kRows][kVectors] = {};
    for (int64_t block = 0; block < rows.blocks; ++block, scales += kPanel) {
        Ints sums[kRows][kVectors];
        for (int i = 0; i < kRows; ++i) {
            const int32_t offset = rows.offsets[(row + i) * rows.blocks + block];
            for (int j = 0; j < kVectors; ++j) sums[i][j] = Ints{} + offset;
        }
        for (int64_t k = 0; k < kBlock; k += 4, weights += 4 * kPanel) {
            const Words left = load<Words>(weights), right = load<Words>(weights + kVectorBytes);
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i) {
                int32_t four;
                std::memcpy(&four, numbers + i * size + block * kBlock + k, sizeof(four));
                const Ints splat = Ints{} + four;
                sums[i][0] = add_products(sums[i][0], left, splat);
                sums[i][1] = add_products(sums[i][1], right, splat);
            }
        }
        for (int j = 0; j < kVectors; ++j) {
            const Floats scale = load<Floats>(scales + j * kLanes);
            for (int i = 0; i < kRows; ++i) {
                totals[i][j] += __builtin_convertvector(sums[i][j], Floats) *
                                (scale * rows.scales[(row + i) * rows.blocks + block]);
            }
        }
    }
    put_panel<kRows>(p, row, panel, totals);
}

// A block of a row, of which `count` numbers are there.
template <class Number>
inline void block_to_bytes(const Number* from, int64_t count, int8_t* to, float* scale,
                           int32_t* offset) {
    Number padded[kBlock] = {};
    if (count < kBlock) {
        std::memcpy(padded, from, count * sizeof(Number));
        from = padded;
    }
    Floats most{}, none{};  // 0 where all numbers are finite, else no number
    for (int64_t i = 0; i < kBlock; i += kLanes) {
        const Floats numbers = read(from + i);
        most = larger(bits<Floats>(bits<Words>(numbers) & 0x7fffffffu), most);
        none += numbers * 0.0f;
    }
    const float extent = largest(most), finite = sum(none);
    *scale = extent / 127.0f + finite;
    if (finite != 0.0f) {  // it is no number, as all that comes of this row is to be
        *offset = 0;
        std::memset(to, 0, kBlock);
        return;
    }
    // Numbers whose inverse is infinite are as good as zero.
    const float inverse = extent < 1e-30f ? 0.0f : 127.0f / extent;
    const Floats magic = splat(12582912.0f);  // adding it rounds to an integer
    Ints total{};
    for (int64_t i = 0; i < kBlock; i += kLanes) {
        const Floats scaled = read(from + i) * inverse;
        const Ints whole = bits<Ints>(scaled + magic) - bits<Ints>(magic);
        total += whole;
        store(to + i, __builtin_convertvector(whole, Bytes));
    }
    int32_t lanes[kLanes], all = 0;
    store(lanes, total);
    for (const int32_t lane : lanes) all += lane;
    *offset = -128 * all;
}

template <class Number>
void row_to_bytes(const Product& p, int64_t row) {
    const ByteRows& bytes = p.bytes;
    const Number* const from = static_cast<const Number*>(p.rows) + row * p.weights.inputs;
    for (int64_t block = 0; block < bytes.blocks; ++block) {
        const int64_t at = row * bytes.blocks + block, first = block * kBlock;
        const int64_t left = p.weights.inputs - first;
        block_to_bytes(from + first, left < kBlock ? left : kBlock, bytes.numbers + at * kBlock,
                       bytes.scales + at, bytes.offsets + at);
    }
}

void to_bytes(const Product& p, int64_t first_row, int64_t last_row) {
    for (int64_t row = first_row; row < last_row; ++row) {
        if (p.format == Format::kFloat32) {
            row_to_bytes<float>(p, row);
        } else {
            row_to_bytes<uint16_t>(p, row);
        }
    }
}

// ---- all rows ----------------------------------------------------------------------------------

using Multiply = void (*)(const Product&, int64_t row, int64_t panel);

// Entry i multiplies i + 1 rows.
inline void multiply_with(const Multiply* table, int most_rows, const Product& p, int64_t first_row,
                          int64_t last_row, int64_t first_panel, int64_t last_panel) {
    // As even as can be: 13 rows are 7 and 6 rather than 12 and 1.
    const int64_t count = last_row - first_row, parts = (count + most_rows - 1) / most_rows;
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t begin = count * part / parts, end = count * (part + 1) / parts;
            table[end - begin - 1](p, first_row + begin, panel);
        }
    }
}

template <int... kIndex>
inline const Multiply* pair_table(std::integer_sequence<int, kIndex...>) {
    static constexpr Multiply table[] = {multiply_pairs<kIndex + 1>...};
    return table;
}

template <int... kIndex>
inline const Multiply* byte_table(std::integer_sequence<int, kIndex...>) {
    static constexpr Multiply table[] = {multiply_bytes<kIndex + 1>...};
    return table;
}

void multiply(const Product& p, int64_t first_row, int64_t last_row, int64_t first_panel,
              int64_t last_panel) {
    if (p.weights.kind == WeightKind::kBytes) {
        static const Multiply* const table =
            byte_table(std::make_integer_sequence<int, kByteRows>());
        multiply_with(table, kByteRows, p, first_row, last_row, first_panel, last_panel);
    } else {
        static const Multiply* const table =
            pair_table(std::make_integer_sequence<int, kPairRows>());
        multiply_with(table, kPairRows, p, first_row, last_row, first_panel, last_panel);
    }
}

extern const ProductKernel kProducts = {kPanel, kHasPairs, to_bytes, multiply};

}  // namespace TD_NAMESPACE
