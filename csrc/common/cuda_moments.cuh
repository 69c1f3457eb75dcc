#pragma once

#include "common/cuda_vector.cuh"

namespace fusedres {

// The number of rows, the sum, and the sum of squared deviations from the mean (M2) of a set of values, for each of
// kVector channels. It keeps the sum instead of the mean, so that infinities of one sign average to that infinity. The
// sums are of x − pivot, with a pivot near the channel's values, so that float keeps their differences.
template <class A, int kVector>
struct Moments {
  A rows;
  Lanes<A, kVector> sum;
  Lanes<A, kVector> m2;
};

template <class A, int kVector>
__device__ __forceinline__ Moments<A, kVector> no_moments() {
  Moments<A, kVector> none;
  none.rows = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) none.sum[i] = none.m2[i] = 0;
  return none;
}

// Adds the moments of another set. Either set may be empty. With δ = mean_b − mean_a (Chan, Golub and LeVeque 1983):
//     M2 = M2_a + M2_b + δ²·n_a·n_b / (n_a + n_b)
template <class A, int kVector>
__device__ __forceinline__ void merge(Moments<A, kVector>& into, const Moments<A, kVector>& added) {
  const A one = 1;
  const A rows = into.rows + added.rows;
  const A share = into.rows > 0 ? one / into.rows : 0;
  const A added_share = added.rows > 0 ? one / added.rows : 0;
  const A weight = rows > 0 ? into.rows * (added.rows / rows) : 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const A gap = added.sum[i] * added_share - into.sum[i] * share;
    into.m2[i] += added.m2[i] + gap * weight * gap;
    into.sum[i] += added.sum[i];
  }
  into.rows = rows;
}

// Returns value if it is finite, else 0. A pivot must be finite, as the difference of two infinities is NaN.
template <class A>
__device__ __forceinline__ A finite_or_zero(A value) {
  return value - value == 0 ? value : 0;
}

}  // namespace fusedres
