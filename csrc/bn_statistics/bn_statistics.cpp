#include "bn_statistics/bn_statistics.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "common/bits.h"
#include "common/check.h"
#include "common/fold.h"
#include "common/gate.h"
#include "common/isa.h"
#include "common/parallel.h"

#define FUSEDRES_KERNEL_FILE "bn_statistics/kernel.inc"
#include "common/for_each_isa.h"

namespace fusedres {
namespace {

double value_or(const ChannelVector& vector, int64_t c, double otherwise) {
  return vector.data == nullptr ? otherwise : load_scalar(vector.data, c, vector.dtype);
}

void average_in(const ChannelVector& running, int64_t c, double value, double factor) {
  if (running.data == nullptr) return;
  const double old = load_scalar(running.data, c, running.dtype);
  store_scalar(running.data, c, running.dtype, (1.0 - factor) * old + factor * value);
}

template <class A>
void write_state(const BnStatisticsParams& p, int64_t c, double mean, double var) {
  A* state = static_cast<A*>(p.state);
  const double invstd = 1.0 / std::sqrt(var + p.norm.eps);
  const double scale = value_or(p.norm.weight, c, 1.0) * invstd;
  state[c] = static_cast<A>(mean);
  state[p.channels + c] = static_cast<A>(invstd);
  state[2 * p.channels + c] = static_cast<A>(scale);
  state[3 * p.channels + c] = static_cast<A>(value_or(p.norm.bias, c, 0.0) - scale * mean);
}

template <class A>
void finalize(const BnStatisticsParams& p, const double* mean, const double* m2, const double* running_offset) {
  double factor = p.norm.momentum;
  if (p.norm.num_batches_tracked != nullptr) {
    const int64_t batches = ++*p.norm.num_batches_tracked;
    if (p.norm.cumulative) factor = 1.0 / static_cast<double>(batches);
  }
  const double count = static_cast<double>(p.rows);
  for (int64_t c = 0; c < p.channels; ++c) {
    write_state<A>(p, c, mean[c], m2[c] / count);
    average_in(p.norm.running_mean, c, running_offset == nullptr ? mean[c] : mean[c] + running_offset[c], factor);
    average_in(p.norm.running_var, c, m2[c] / (count - 1.0), factor);
  }
}

// The moments of rows that are taken `parts` at a time for one row, and of each channel from those of its parts.
void moments_of_parts(const BnStatisticsParams& p, int64_t parts, double* mean, double* m2, double* sample_means) {
  BnStatisticsParams wide = p;
  wide.rows = p.rows / parts;
  wide.channels = p.channels * parts;
  std::vector<double> buffer((2 + (sample_means == nullptr ? 0 : p.samples)) * wide.channels);
  double* part_mean = buffer.data();
  double* part_m2 = part_mean + wide.channels;
  double* part_sample_means = sample_means == nullptr ? nullptr : part_m2 + wide.channels;
  FUSEDRES_SELECT_ISA(moments_of)(wide, part_mean, part_m2, part_sample_means);
  const auto average = [&](const double* of_parts, double* target) {
    for (int64_t c = 0; c < p.channels; ++c) {
      double total = 0.0;
      for (int64_t i = c; i < wide.channels; i += p.channels) total += of_parts[i];
      target[c] = total / static_cast<double>(parts);
    }
  };
  average(part_mean, mean);
  for (int64_t sample = 0; sample_means != nullptr && sample < p.samples; ++sample)
    average(part_sample_means + sample * wide.channels, sample_means + sample * p.channels);
  const double count = static_cast<double>(wide.rows);
  for (int64_t c = 0; c < p.channels; ++c) {
    m2[c] = 0.0;
    for (int64_t i = c; i < wide.channels; i += p.channels) {
      const double delta = part_mean[i] - mean[c];
      m2[c] += part_m2[i] + count * delta * delta;
    }
  }
}

}  // namespace

void bn_statistics(const BnStatisticsParams& p) {
  require(p.x != nullptr && p.state != nullptr, "bn_statistics", "null pointer");
  require(p.rows > 0 && p.channels > 0, "bn_statistics", "rows and channels must be positive");
  require(p.samples > 0 && p.rows % p.samples == 0, "bn_statistics", "samples must have as many rows each");
  const int64_t of_samples = p.means == nullptr ? 0 : p.samples * p.channels;
  std::vector<double> buffer(2 * p.channels + of_samples);
  double* mean = buffer.data();
  double* m2 = mean + p.channels;
  double* sample_means = p.means == nullptr ? nullptr : m2 + p.channels;
  const int64_t parts = rows_at_once(p.rows / p.samples, p.channels, kBlockChannels);
  if (parts == 1)
    FUSEDRES_SELECT_ISA(moments_of)(p, mean, m2, sample_means);
  else
    moments_of_parts(p, parts, mean, m2, sample_means);
  bn_finalize(p, mean, m2, nullptr);
  const DType dtype = p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  for (int64_t i = 0; i < of_samples; ++i) store_scalar(p.means, i, dtype, sample_means[i]);
}

void bn_finalize(const BnStatisticsParams& p, const double* mean, const double* m2, const double* running_offset) {
  require(p.state != nullptr && p.rows > 0, "bn_finalize", "null pointer or no rows");
  if (p.dtype == DType::kFloat64)
    finalize<double>(p, mean, m2, running_offset);
  else
    finalize<float>(p, mean, m2, running_offset);
}

void bn_frozen(const BnStatisticsParams& p) {
  require(p.state != nullptr && p.norm.running_mean.data != nullptr && p.norm.running_var.data != nullptr, "bn_frozen",
          "null pointer");
  for (int64_t c = 0; c < p.channels; ++c) {
    const double mean = load_scalar(p.norm.running_mean.data, c, p.norm.running_mean.dtype);
    const double var = load_scalar(p.norm.running_var.data, c, p.norm.running_var.dtype);
    if (p.dtype == DType::kFloat64)
      write_state<double>(p, c, mean, var);
    else
      write_state<float>(p, c, mean, var);
  }
}

}  // namespace fusedres
