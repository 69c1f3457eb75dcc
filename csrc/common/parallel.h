#pragma once

#include <algorithm>
#include <cstdint>

namespace fusedres {

// Splits rows into chunks. The size of a chunk depends only on the problem, never on the number of threads. So partial
// sums are merged in the same order for any number of threads, and results are bitwise reproducible.
struct Chunks {
  int64_t rows;   // number of all rows
  int64_t size;   // rows of a chunk
  int64_t count;  // number of chunks

  Chunks(int64_t rows, int64_t row_bytes)
      : rows(rows),
        size(std::clamp<int64_t>(65536 / std::max<int64_t>(row_bytes, 1), 64, 256)),
        count((rows + size - 1) / size) {}

  // Larger chunks (up to 256 rows) if there are many rows. Kernels that write several values per channel and chunk use
  // them: fewer chunks leave fewer values to merge.
  static Chunks tall(int64_t rows, int64_t row_bytes) { return tall(rows, row_bytes, rows); }

  // Those of one of several groups that have `all_rows` together.
  static Chunks tall(int64_t rows, int64_t row_bytes, int64_t all_rows) {
    return Chunks(rows, std::min(row_bytes, 65536 / std::clamp<int64_t>(all_rows / 64, 64, 256)));
  }

  int64_t begin(int64_t chunk) const { return chunk * size; }
  int64_t end(int64_t chunk) const { return std::min(rows, (chunk + 1) * size); }
};

// The chunks of several groups of as many rows: those of one group follow each other.
struct GroupChunks {
  Chunks of_group;
  int64_t count;

  GroupChunks(int64_t groups, const Chunks& of_group) : of_group(of_group), count(groups * of_group.count) {}

  // Calls body(group, first row, row after the last) for a chunk.
  template <class Body>
  void with(int64_t index, const Body& body) const {
    const int64_t group = index / of_group.count, chunk = index % of_group.count;
    body(group, group * of_group.rows + of_group.begin(chunk), group * of_group.rows + of_group.end(chunk));
  }
};

// Work below this many bytes runs on the calling thread: waking the others costs more.
constexpr int64_t kSerialBytes = 1 << 16;

inline int threads_for(int64_t bytes, int threads) {
  return bytes < kSerialBytes ? 1 : std::max(threads, 1);
}

// Calls body(index) for every index in [0, count). Each thread takes a contiguous range.
template <class Body>
void parallel_for(int threads, int64_t count, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && count > 1) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t index = 0; index < count; ++index) body(index);
    return;
  }
#endif
  (void)threads;
  for (int64_t index = 0; index < count; ++index) body(index);
}

// The same for tasks that take long. A thread takes the next task when it has finished one: where other work slowed
// one of two cores down, convolutions with fixed ranges took 1.2 of the time.
template <class Body>
void parallel_tasks(int threads, int64_t count, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && count > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t index = 0; index < count; ++index) body(index);
    return;
  }
#endif
  (void)threads;
  for (int64_t index = 0; index < count; ++index) body(index);
}

}  // namespace fusedres
