#pragma once

#include <cstddef>

namespace fusedres {

// From this size on the C library maps fresh memory page by page at each allocation; smaller buffers come from its
// heap, touched before.
constexpr size_t kLargeBytes = size_t{4} << 20;

// Asks for huge pages behind a fresh, large buffer that is about to be written: its first touch then costs one fault
// for 2 MiB instead of one for 4 KiB. Does nothing where the system has no such advice.
void advise_huge_pages(void* data, size_t bytes);

}  // namespace fusedres
