#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace fusedres {

// Returns room for `count` values on a cache line of their own. It belongs to the calling thread, and the thread's next
// call may take it away: fresh memory for each task would be mapped page by page.
template <class T>
T* scratch(size_t count) {
  constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(void* data) const { ::operator delete(data, kLine); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local size_t bytes = 0;
  if (count * sizeof(T) > bytes) {
    memory.reset();
    bytes = 0;
    memory.reset(::operator new(count * sizeof(T), kLine));
    bytes = count * sizeof(T);
  }
  return static_cast<T*>(memory.get());
}

}  // namespace fusedres
