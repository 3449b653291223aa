// Stands in for the C library's header, which NVRTC does not have. The 64-bit types are `long`, as the host's 64-bit
// Linux compilers have them, so that names mangle alike on both sides and in libraries linked to device code.
#pragma once

typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef unsigned long uintptr_t;
