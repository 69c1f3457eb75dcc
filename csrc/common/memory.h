#pragma once

#include <cstddef>

namespace fusedres {

// The C library maps fresh pages for each buffer of at least this size. Smaller buffers come from its heap, which was
// touched before.
constexpr size_t kLargeBytes = size_t{4} << 20;

// Asks for huge pages for a fresh, large buffer that is about to be written. The first write then causes one page fault
// per 2 MiB instead of one per 4 KiB. Does nothing if the system has no madvise(MADV_HUGEPAGE).
void advise_huge_pages(void* data, size_t bytes);

}  // namespace fusedres
