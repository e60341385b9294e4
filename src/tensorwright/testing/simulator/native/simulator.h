// The simulator's C interface: a kernel from instructions that name their handlers, and its launches.
#pragma once
#include "schedule.h"

namespace sim {

inline const Table& handlers() {
  static const Table made = [] {
    Table table;
    scalar_table(table), convert_table(table), memory_table(table), tensor_table(table);
    return table;
  }();
  return made;
}

inline void answer(char* to, int size, const std::string& text) { std::snprintf(to, size, "%s", text.c_str()); }

}  // namespace sim

#define SIM_EXPORT extern "C" __attribute__((visibility("default")))

// codes: 12 numbers an instruction: name, flow, guard, is negated, first operand, operands, space, vector, mode, width,
// immediate's lower and upper half.
SIM_EXPORT void* sim_kernel(const char* const* names, const char* const* text, const int32_t* codes, int64_t count, const int32_t* operands,
                            int64_t num_operands, const uint8_t* rows, int64_t row_bytes, const int32_t* sizes, char* error, int error_size) {
  auto* kernel = new sim::Kernel;
  kernel->operands.assign(operands, operands + num_operands);
  kernel->first_rows.assign(rows, rows + row_bytes);
  kernel->special_row = sizes[0], kernel->num_predicates = sizes[1], kernel->shared_bytes = sizes[2], kernel->local_bytes = sizes[3];
  for (int64_t i = 0; i < count; i++) {
    const int32_t* c = codes + 12 * i;
    const auto found = sim::handlers().find(names[c[0]]);
    if (found == sim::handlers().end()) {
      sim::answer(error, error_size, std::string("the simulator does not know ") + names[c[0]] + ": " + text[i]);
      delete kernel;
      return nullptr;
    }
    const int64_t immediate = int64_t(uint32_t(c[10])) | int64_t(c[11]) << 32;
    kernel->code.push_back({found->second, c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], c[9], immediate});
    kernel->text.push_back(text[i]);
  }
  return kernel;
}

SIM_EXPORT void sim_free(void* kernel) { delete static_cast<sim::Kernel*>(kernel); }

// shapes: grid, block; ranges: pairs of first and last byte + 1 in rising order. Returns the number of instructions run.
SIM_EXPORT uint64_t sim_launch(void* kernel, const int32_t* shapes, int32_t dynamic_bytes, const uint8_t* parameters, int64_t parameter_bytes,
                               const uint64_t* ranges, int64_t num_ranges, int64_t resident, uint64_t seed, uint64_t limit, int32_t finds_races, char* error,
                               int error_size) {
  sim::Machine machine;
  machine.kernel = static_cast<sim::Kernel*>(kernel);
  machine.random = seed * 2 + 1, machine.finds_races = finds_races;
  machine.parameters.assign(parameters, parameters + parameter_bytes);
  for (int64_t i = 0; i < num_ranges; i++) machine.ranges.push_back({ranges[2 * i], ranges[2 * i + 1]});
  uint64_t left = limit;
  sim::run_blocks(machine, resident, shapes, shapes + 3, dynamic_bytes, left);
  sim::answer(error, error_size, machine.error);
  return limit - left;
}
