// The kernels, once for each instruction set, and which of them this machine can run.
#pragma once

#include <string>
#include <vector>

#include "kernel.h"
#include "products.h"
#include "rows.h"

namespace tokendance {

struct InstructionSet {
    const char* name;
    const Kernel* attention;
    const RowKernel* rows;
    const ProductKernel* products;
};

// Those that this machine can run, the fastest first.
const std::vector<InstructionSet>& usable_sets();

// The one of them that has a name; std::invalid_argument if there is none.
const InstructionSet& set_named(const std::string& name);

}  // namespace tokendance
