#pragma once

// Gram matrix and column sums of an activation, centred on a pivot t per channel:
//
//     z' = relu(scale·x + shift) − t, rounded to x's dtype        s = Σ z'        G = z'ᵀz'
//
// t is the average of the first rows of z, so that variances that are computed from s and G later do not lose accuracy.
//
// gram_tiles_kernel: a block owns the rows of a split and a kTile×kTile tile of G on or above the diagonal. It computes
// z' of the tile's columns (one panel on the diagonal, else two) in shared memory, one step of rows at a time, while
// the next step is being loaded, and multiplies there. A warp owns 32 × kTile / 2 of the tile. Blocks on the diagonal
// also sum z' and write it if wanted; those of the first split write t. Reads x once for each tile of a row of tiles.
// Only the first read is from memory, the others are from the L2 cache, as the tiles of the same rows run at the same
// time. Writes s and G of each split.
//
// gram_finalize_kernel: a block owns blockDim.x·kVector elements of s, and of G on and above the diagonal. Thread row y
// sums splits y, y + blockDim.y, … in float64, then the block sums its thread rows as a tree, so that the order is
// fixed. Writes s and both halves of G.

#include <type_traits>

#include "common/cuda_index.cuh"
#include "common/cuda_mma.cuh"
#include "common/cuda_reduce.cuh"
#include "common/cuda_rows.cuh"
#include "common/cuda_shared.cuh"
#include "gram/gram_cuda.h"

namespace fusedres {

constexpr int kGramPivotRows = 8;

// kTensorCores: mma.sync on words of 32 bits, which hold 16-bit values of two rows or one tf32 value. Else a word is a
// value of A.
template <class T_, int kVector_, int kTile_, bool kTensorCores_>
struct GramTraits {
  using T = T_;
  using A = Arithmetic<T>;
  using Word = std::conditional_t<kTensorCores_, uint32_t, A>;
  using Raw = std::conditional_t<kVector_ == 1, T, uint4>;  // kVector values of a row
  static constexpr int kVector = kVector_;
  static constexpr int kTile = kTile_;
  static constexpr bool kTensorCores = kTensorCores_;
  static constexpr int kPack = sizeof(Word) / sizeof(T);                // rows of a word
  static constexpr int kWords = kVector == 1 ? 8 : 128 / sizeof(Word);  // words along the rows of a step
  static constexpr int kRows = kWords * kPack;
  static constexpr int kThreads = 2 * kTile;
  static constexpr int kStride = kTile + 8;  // words of a panel's row; the fragments of a warp are in 32 banks
  static constexpr int kPanel = kWords * kStride;
  static constexpr int kFragmentRows = 32 / kMmaRows;               // of a warp
  static constexpr int kFragmentColumns = kTile / 2 / kMmaColumns;  // of a warp
  static_assert(kTensorCores || sizeof(T) > 2, "16-bit values need tensor cores");

  static_assert(kRows >= kGramPivotRows && kRows <= kThreads, "one thread per row fills the table of rows");

  // The panels of two steps, and two tables of rows.
  static constexpr size_t shared_bytes(int panels) {
    return sizeof(Word) * 2 * panels * kPanel + sizeof(int64_t) * 2 * kRows;
  }
};

// Fills panels. A thread fills the same kVector columns of every kGroups-th word.
template <class Traits, int kPanels>
class GramLoader {
  using T = typename Traits::T;
  using A = typename Traits::A;
  using Raw = typename Traits::Raw;
  using Word = typename Traits::Word;
  static constexpr int kVector = Traits::kVector;
  static constexpr int kPanelVectors = Traits::kTile / kVector;
  static constexpr int kAcross = kPanels * kPanelVectors;
  static constexpr int kGroups = Traits::kThreads / kAcross;
  static constexpr int kEach = Traits::kWords / kGroups;

 public:
  // table: the rows that give the pivot.
  __device__ GramLoader(const GramCudaParams& p, int64_t column_a, int64_t column_b, const int64_t* table)
      : p_(p), group_(threadIdx.x / kAcross), affine_{}, pivot_{}, sum_{} {
    const int across = threadIdx.x % kAcross, panel = across / kPanelVectors;
    column_ = across % kPanelVectors * kVector;
    shared_ = panel * Traits::kPanel + column_;
    c_ = (panel == 0 ? column_a : column_b) + column_;
    inside_ = c_ < p.channels;
    if (!inside_) return;
    if (p.state != nullptr) affine_ = load_affine<kVector>(static_cast<const A*>(p.state), p.channels, c_);
    A rows = 0;
#pragma unroll
    for (int row = 0; row < kGramPivotRows; ++row) {
      if (table[row] < 0) continue;
      const auto z = activated(fetch_row(table[row]));
#pragma unroll
      for (int i = 0; i < kVector; ++i) pivot_[i] += z[i];
      ++rows;
    }
    const A share = 1 / rows;
#pragma unroll
    for (int i = 0; i < kVector; ++i) pivot_[i] *= share;
  }

  // Starts the loads of a step's rows.
  __device__ void fetch(const int64_t* table) {
#pragma unroll
    for (int each = 0; each < kEach; ++each) {
#pragma unroll
      for (int r = 0; r < Traits::kPack; ++r) {
        const int64_t start = table[row_of(each, r)];
        raw_[each][r] = inside_ && start >= 0 ? fetch_row(start) : Raw{};
      }
    }
  }

  // Writes z' of the fetched rows to shared memory, and 0 outside. On the diagonal it also writes z' to p.out and adds
  // it to the sums.
  __device__ void put(Word* panels, int64_t first, int64_t last) {
#pragma unroll
    for (int each = 0; each < kEach; ++each) {
      T values[Traits::kPack][kVector];
#pragma unroll
      for (int r = 0; r < Traits::kPack; ++r) {
        const int64_t row = first + row_of(each, r);
        Lanes<A, kVector> z{};
        if (row < last) {
          z = activated(raw_[each][r]);
#pragma unroll
          for (int i = 0; i < kVector; ++i) z[i] -= pivot_[i];
        }
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[r][i] = to_storage<T>(z[i]);
        if (kPanels == 1 && p_.out != nullptr && inside_ && row < last)
          store(static_cast<T*>(p_.out) + element(row, p_.channels, c_), z);
        if (kPanels == 1) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) sum_[i] += to_arithmetic(values[r][i]);
        }
      }
      Word words[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) words[i] = to_word(values, i);
      put_words(panels + shared_ + (group_ + each * kGroups) * Traits::kStride, words);
    }
  }

  // Stores the sums of all threads of the block, added in the order of the groups, and the pivot if wanted.
  __device__ void store_sums(A* shared, A* target, bool with_pivot) {
    static_assert(kGroups * Traits::kTile * sizeof(A) <= 2 * Traits::kPanel * sizeof(Word), "the sums fit");
    __syncthreads();  // the products no longer read shared memory
#pragma unroll
    for (int i = 0; i < kVector; ++i) shared[group_ * Traits::kTile + column_ + i] = sum_[i];
    __syncthreads();
    if (group_ != 0 || !inside_) return;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      A sum = 0;
      for (int group = 0; group < kGroups; ++group) sum += shared[group * Traits::kTile + column_ + i];
      target[c_ + i] = sum;
      if (with_pivot) static_cast<A*>(p_.pivot)[c_ + i] = pivot_[i];
    }
  }

 private:
  __device__ int row_of(int each, int r) const { return (group_ + each * kGroups) * Traits::kPack + r; }

  __device__ Raw fetch_row(int64_t start) const {
    return *reinterpret_cast<const Raw*>(static_cast<const T*>(p_.x) + start + c_);
  }

  __device__ Lanes<A, kVector> activated(const Raw& raw) const {
    T values[kVector];
    __builtin_memcpy(values, &raw, sizeof(raw));
    Lanes<A, kVector> x;
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = to_arithmetic(values[i]);
    return p_.state == nullptr ? x : relu(apply(affine_, x));
  }

  __device__ static Word to_word(const T (&values)[Traits::kPack][kVector], int i) {
    if constexpr (Traits::kPack == 2)
      return values[0][i].bits | static_cast<uint32_t>(values[1][i].bits) << 16;
    else if constexpr (Traits::kTensorCores)
      return to_tf32(values[0][i]);
    else
      return values[0][i];
  }

  __device__ static void put_words(Word* target, const Word (&words)[kVector]) {
    if constexpr (kVector == 1) {
      *target = words[0];
    } else {
#pragma unroll
      for (int i = 0; i < kVector; i += 16 / sizeof(Word)) {
        uint4 bits;
        __builtin_memcpy(&bits, words + i, sizeof(bits));
        *reinterpret_cast<uint4*>(target + i) = bits;
      }
    }
  }

  const GramCudaParams& p_;
  int group_;
  int column_;  // in the panel
  int shared_;  // in the panels
  int64_t c_;
  bool inside_;
  Affine<A, kVector> affine_;
  Lanes<A, kVector> pivot_;
  Lanes<A, kVector> sum_;
  Raw raw_[kEach][Traits::kPack];
};

// The part of a tile that a warp computes. sums[i][j] are fragments as in cuda_mma.cuh, also without tensor cores.
template <class Traits>
class GramProducts {
  using A = typename Traits::A;
  using Word = typename Traits::Word;

 public:
  __device__ GramProducts()
      : row_(threadIdx.x / 32 / 2 * 32), column_(threadIdx.x / 32 % 2 * (Traits::kTile / 2)), sums_{} {}

  // Adds the products of the columns of two panels, which may be the same panel.
  __device__ void add(const Word* a, const Word* b) {
    a += row_ + group();
    if constexpr (Traits::kTensorCores) {
      b += column_ + group();
#pragma unroll
      for (int first = 0; first < Traits::kWords; first += kMmaWords) {
        uint32_t left[Traits::kFragmentRows][4], right[Traits::kFragmentColumns][2];
#pragma unroll
        for (int i = 0; i < Traits::kFragmentRows; ++i) {
#pragma unroll
          for (int r = 0; r < 4; ++r)
            left[i][r] = a[(first + thread() + r / 2 * 4) * Traits::kStride + i * kMmaRows + r % 2 * 8];
        }
#pragma unroll
        for (int j = 0; j < Traits::kFragmentColumns; ++j) {
#pragma unroll
          for (int r = 0; r < 2; ++r) right[j][r] = b[(first + thread() + r * 4) * Traits::kStride + j * kMmaColumns];
        }
        mma_tile<typename Traits::T>(sums_, left, right);
      }
    } else {
      b += column_ + 2 * thread();
#pragma unroll 4
      for (int word = 0; word < Traits::kWords; ++word) {
#pragma unroll
        for (int j = 0; j < Traits::kFragmentColumns; ++j) {
#pragma unroll
          for (int i = 0; i < Traits::kFragmentRows; ++i) {
#pragma unroll
            for (int r = 0; r < 4; ++r)
              sums_[i][j][r] = fma(a[word * Traits::kStride + i * kMmaRows + r / 2 * 8],
                                   b[word * Traits::kStride + j * kMmaColumns + r % 2], sums_[i][j][r]);
          }
        }
      }
    }
  }

  // Stores the products into [channels, channels], where the tile starts at (column_a, column_b).
  __device__ void store(A* target, int64_t channels, int64_t column_a, int64_t column_b) const {
#pragma unroll
    for (int i = 0; i < Traits::kFragmentRows; ++i) {
#pragma unroll
      for (int j = 0; j < Traits::kFragmentColumns; ++j) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int64_t row = column_a + row_ + i * kMmaRows + group() + r / 2 * 8;
          const int64_t column = column_b + column_ + j * kMmaColumns + 2 * thread() + r % 2;
          if (row < channels && column < channels) target[row * channels + column] = sums_[i][j][r];
        }
      }
    }
  }

 private:
  __device__ static int group() { return threadIdx.x % 32 / 4; }
  __device__ static int thread() { return threadIdx.x % 4; }

  int row_;  // of the tile
  int column_;
  A sums_[Traits::kFragmentRows][Traits::kFragmentColumns][4];
};

// Writes where rows first to first + Traits::kRows start in x, and −1 for rows from `last` on. This takes one division
// per row instead of one per load.
template <class Traits>
__device__ __forceinline__ void fill_table(int64_t* table, const SourceRows& source, int64_t channels, int64_t first,
                                           int64_t last) {
  if (threadIdx.x >= Traits::kRows) return;
  const int64_t row = first + threadIdx.x;
  table[threadIdx.x] = row < last ? source(row) * channels : -1;
}

template <class Traits, int kPanels>
__device__ __forceinline__ void gram_tile(const GramCudaParams& p, const SourceRows& source, int64_t rows,
                                          int64_t split, int64_t column_a, int64_t column_b) {
  using A = typename Traits::A;
  using Word = typename Traits::Word;
  int64_t* tables = dynamic_shared<int64_t>();
  Word* shared = reinterpret_cast<Word*>(tables + 2 * Traits::kRows);
  const int64_t begin = split * p.split_rows, last = min(rows, begin + p.split_rows);
  fill_table<Traits>(tables, source, p.channels, begin, last);
  fill_table<Traits>(tables + Traits::kRows, source, p.channels, 0, min(rows, int64_t{kGramPivotRows}));
  __syncthreads();  // the tables are written
  GramLoader<Traits, kPanels> loader(p, column_a, column_b, tables + Traits::kRows);
  GramProducts<Traits> products;
  loader.fetch(tables);
  __syncthreads();  // the tables are read

  int buffer = 0;
  for (int64_t first = begin; first < last; first += Traits::kRows) {
    Word* panels = shared + buffer * kPanels * Traits::kPanel;
    int64_t* table = tables + buffer * Traits::kRows;
    fill_table<Traits>(table, source, p.channels, first + Traits::kRows, last);
    loader.put(panels, first, last);
    __syncthreads();  // panels and table are written, and the other ones are no longer read
    loader.fetch(table);
    products.add(panels, panels + (kPanels - 1) * Traits::kPanel);
    buffer ^= 1;
  }

  A* partial = static_cast<A*>(p.partials) + split * (p.channels + 1) * p.channels;
  products.store(partial, p.channels, column_a, column_b);
  if constexpr (kPanels == 1)
    loader.store_sums(reinterpret_cast<A*>(shared), partial + p.channels * p.channels, split == 0);
}

// The blocks are the tiles of the first split, row by row, then those of the next split, and so on.
template <class T, int kVector, int kTile, bool kTensorCores>
__global__ void __launch_bounds__(2 * kTile)
    gram_tiles_kernel(const GramCudaParams p, const SourceRows source, const int64_t rows, const int pairs) {
  using Traits = GramTraits<T, kVector, kTile, kTensorCores>;
  const int across = static_cast<int>((p.channels + kTile - 1) / kTile);
  const int64_t split = blockIdx.x / pairs;
  int a = 0, b = blockIdx.x % pairs;
  for (; b >= across - a; ++a) b -= across - a;
  b += a;
  if (a == b)
    gram_tile<Traits, 1>(p, source, rows, split, int64_t{a} * kTile, int64_t{a} * kTile);
  else
    gram_tile<Traits, 2>(p, source, rows, split, int64_t{a} * kTile, int64_t{b} * kTile);
}

template <int kVector>
__device__ __forceinline__ void add_lanes(Lanes<double, kVector>& into, const Lanes<double, kVector>& added) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) into[i] += added[i];
}

template <class A, int kVector>
__global__ void gram_finalize_kernel(const GramCudaParams p) {
  const int64_t index = thread_index() * kVector, elements = (p.channels + 1) * p.channels;
  const int64_t row = index / p.channels, column = index % p.channels;
  const bool inside = index < elements && (row == p.channels || row < column + kVector);
  Lanes<double, kVector> sum{};
  if (inside) {
    const A* partials = static_cast<const A*>(p.partials) + index;
#pragma unroll 4
    for (int64_t split = threadIdx.y; split < p.splits; split += blockDim.y) {
      const auto of_split = load<kVector>(partials + split * elements);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum[i] += of_split[i];
    }
  }
  reduce_rows(sum, dynamic_shared<Lanes<double, kVector>>(), add_lanes<kVector>);

  if (!inside || threadIdx.y != 0) return;
  if (row == p.channels) {
    store(p.total + column, sum);
    return;
  }
  if (row <= column) store(p.matrix + index, sum);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (row > column + i) continue;
    p.matrix[index + i] = sum[i];
    p.matrix[(column + i) * p.channels + row] = sum[i];
  }
}

}  // namespace fusedres
