// The CUDA driver's entry points that a launch needs, found at run time: no CUDA header, nothing to link against.
#pragma once

namespace deepep::driver {

// The driver's own types and numbers, from its documented binary interface (cuda.h). They have not moved since
// CUDA 12.0.
using Function = void*;
using Stream = void*;
using Result = int;

enum LaunchAttributeId : int {
    kLaunchAttributeCooperative = 2,
    kLaunchAttributeProgrammaticStreamSerialization = 6,
};

struct LaunchAttribute {
    LaunchAttributeId id;
    char pad[4];
    union {
        char bytes[64];
        int flag;
    } value;
};

struct LaunchConfig {
    unsigned grid_x, grid_y, grid_z;
    unsigned block_x, block_y, block_z;
    unsigned shared_bytes;
    Stream stream;
    LaunchAttribute* attributes;
    unsigned num_attributes;
};

static_assert(sizeof(LaunchAttribute) == 72 && sizeof(LaunchConfig) == 56, "must match the driver's structures");

// Start a kernel. Throws std::runtime_error with the driver's text.
void launch(const LaunchConfig& config, Function function, void* argument_struct);

}  // namespace deepep::driver
