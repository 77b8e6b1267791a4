#include "instruction_sets.h"

#include <algorithm>
#include <stdexcept>

// Each set is compiled in a namespace of its own: see CMakeLists.txt.
#define TD_DECLARE(space)                          \
    namespace space {                              \
    extern const tokendance::Kernel kAttention;    \
    extern const tokendance::RowKernel kRows;      \
    extern const tokendance::ProductKernel kProducts; \
    }
#define TD_SET(name, space) {name, &space::kAttention, &space::kRows, &space::kProducts}

TD_DECLARE(td_portable)
#if defined(TD_X86)
TD_DECLARE(td_avx2)
TD_DECLARE(td_avx512)
TD_DECLARE(td_avx512_bf16)
#endif

namespace tokendance {

const std::vector<InstructionSet>& usable_sets() {
    static const std::vector<InstructionSet> sets = [] {
        std::vector<InstructionSet> found;
#if defined(TD_X86)
        __builtin_cpu_init();
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool avx512 =
            avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        // Whatever has the first of these has the second, too.
        if (avx512 && __builtin_cpu_supports("avx512bf16") &&
            __builtin_cpu_supports("avx512vnni")) {
            found.push_back(TD_SET("avx512-bf16", td_avx512_bf16));
        }
        if (avx512) found.push_back(TD_SET("avx512", td_avx512));
        if (avx2) found.push_back(TD_SET("avx2", td_avx2));
#endif
        found.push_back(TD_SET("portable", td_portable));
        return found;
    }();
    return sets;
}

const InstructionSet& set_named(const std::string& name) {
    const std::vector<InstructionSet>& sets = usable_sets();
    const auto found = std::find_if(sets.begin(), sets.end(), [&](const InstructionSet& set) {
        return name == set.name;
    });
    if (found == sets.end()) {
        throw std::invalid_argument("there is no kernel of this name for this machine");
    }
    return *found;
}

}  // namespace tokendance
