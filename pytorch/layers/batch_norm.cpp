// Batch norm of rows [N, C] and the clipping after it, on a CPU, in as few passes over the rows as there can be: two
// forward (moments; output) and two backward (sums; gradient). batch_norm.py has the mathematics and the names.
//
// Rows are float32 or bfloat16, arithmetic on them is float32; what is added up over threads, mean and variance are
// double. With few channels a row is shorter than a vector, so several rows are one block, and the channels' values are
// repeated along it.
//
// Each thread has a run of neighboring rows, and their sums are added in the order of the threads: for a
// given number of threads, results are bitwise reproducible.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

// bfloat16 is a uint16_t here.
inline float widen(float x) { return x; }
inline float widen(uint16_t x) { return __builtin_bit_cast(float, uint32_t(x) << 16); }

template <class Number>
inline Number narrow(float x) {
  if constexpr (sizeof(Number) == sizeof(float)) return x;
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);  // to nearest, ties to even; NaN stays NaN
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return x == x ? rounded : 0x7fff;
}

constexpr long SHORTEST_BLOCK = 64, BLOCKS_OF_A_SUM = 256;  // sums in float32 of so few lose little

long rows_of_block(long channels) { return (SHORTEST_BLOCK + channels - 1) / channels; }

std::vector<float> repeated(const float* values, long channels) {
  std::vector<float> block(rows_of_block(channels) * channels);
  for (size_t i = 0; i < block.size(); i++) block[i] = values[i % channels];
  return block;
}

// Batch norm of one element: its place among the channel's others, and the result before it is clipped.
struct Normal {
  const float *mean, *scale, *shift;  // [elements of a block]
  float low, high;
  template <class Number>
  float deviation(const Number* x, long i) const { return widen(x[i]) - mean[i]; }
  float output(float deviation, long i) const { return deviation * scale[i] + shift[i]; }
  float gradient(float d, float output) const { return (low < output) & (output < high) ? d : 0.f; }
};

// What a Normal points to.
class OfBlock {
 public:
  OfBlock(const float* mean, const float* scale, const float* shift, long channels)
      : mean_(repeated(mean, channels)), scale_(repeated(scale, channels)), shift_(repeated(shift, channels)) {}
  Normal normal(float low, float high) const { return {mean_.data(), scale_.data(), shift_.data(), low, high}; }

 private:
  const std::vector<float> mean_, scale_, shift_;
};

// The loops over a block, which the compiler makes vectors of.
template <class Number>
void add_moments(const Number* x, const float* origin, long count, float* sum, float* square) {
#pragma omp simd
  for (long i = 0; i < count; i++) {
    const float deviation = widen(x[i]) - origin[i];
    sum[i] += deviation;
    square[i] += deviation * deviation;
  }
}

template <class Number>
void clip_output(const Number* x, const Normal normal, long count, Number* y) {
#pragma omp simd
  for (long i = 0; i < count; i++) {
    const float output = normal.output(normal.deviation(x, i), i);
    const float above = output < normal.low ? normal.low : output;
    y[i] = narrow<Number>(above > normal.high ? normal.high : above);
  }
}

template <class Number>
void add_gradients(const Number* x, const Number* d_y, const Normal normal, long count, float* sum, float* product) {
#pragma omp simd
  for (long i = 0; i < count; i++) {
    const float deviation = normal.deviation(x, i);
    const float d = normal.gradient(widen(d_y[i]), normal.output(deviation, i));
    sum[i] += d;
    product[i] += d * deviation;
  }
}

template <class Number>
void pass_back(const Number* x, const Number* d_y, const Normal normal, const float* offset, const float* slope,
               long count, Number* d_x) {
#pragma omp simd
  for (long i = 0; i < count; i++) {
    const float deviation = normal.deviation(x, i);
    const float d = normal.gradient(widen(d_y[i]), normal.output(deviation, i));
    d_x[i] = narrow<Number>(normal.scale[i] * (d - offset[i] - slope[i] * deviation));
  }
}

// Call work(first element, number of elements) for each block of each thread's rows.
template <class Work>
void for_blocks(long rows, long channels, long threads, Work work) {
  const long step = rows_of_block(channels);
#pragma omp parallel num_threads(threads)
  {
    const long thread = omp_get_thread_num(), team = omp_get_num_threads(), last = rows * (thread + 1) / team;
    for (long row = rows * thread / team; row < last; row += step)
      work(row * channels, std::min(step, last - row) * channels);
  }
}

// Two sums over all rows for each channel: work(first element, number of elements, sums, other sums) adds a block's.
template <class Work>
void sum_up(long rows, long channels, long threads, double* first, double* second, Work work) {
  struct Sums {
    std::vector<float> some;  // of the newest blocks, and for each element of a block
    std::vector<double> all;
    long blocks = 0;
  };
  const long half = rows_of_block(channels) * channels;
  std::vector<Sums> of_threads(threads);
  auto put_away = [=](Sums& sums) {
    for (long i = 0; i < 2 * half; i++) sums.all[i / half * channels + i % half % channels] += sums.some[i];
    std::fill(sums.some.begin(), sums.some.end(), 0.f);
  };
  for (Sums& sums : of_threads) sums.some.resize(2 * half), sums.all.resize(2 * channels);
  for_blocks(rows, channels, threads, [&](long start, long count) {
    Sums& sums = of_threads[omp_get_thread_num()];
    work(start, count, sums.some.data(), sums.some.data() + half);
    if (++sums.blocks % BLOCKS_OF_A_SUM == 0) put_away(sums);
  });
  std::fill(first, first + channels, 0.);
  std::fill(second, second + channels, 0.);
  for (Sums& sums : of_threads) {
    put_away(sums);
    for (long channel = 0; channel < channels; channel++) {
      first[channel] += sums.all[channel];
      second[channel] += sums.all[channels + channel];
    }
  }
}

template <class Work>
void with_number(bool bfloat16, Work work) {
  if (bfloat16) work(uint16_t{});
  else work(float{});
}

}  // namespace

extern "C" {

// mean [C] and variance [C] (the mean square of the deviations) of rows [N, C].
void batch_norm_moments(bool bfloat16, long rows, long channels, long threads, const void* input, double* mean,
                        double* variance) {
  with_number(bfloat16, [=](auto number) {
    const auto* x = (const decltype(number)*)input;
    // Deviations from the first row, since squares of the numbers themselves would lose digits of the variance.
    std::vector<float> origin(channels);
    for (long channel = 0; channel < channels; channel++) origin[channel] = widen(x[channel]);
    const std::vector<float> origins = repeated(origin.data(), channels);
    sum_up(rows, channels, threads, mean, variance, [&](long start, long count, float* sum, float* square) {
      add_moments(x + start, origins.data(), count, sum, square);
    });
    for (long channel = 0; channel < channels; channel++) {
      const double average = mean[channel] / rows;
      mean[channel] = origin[channel] + average;
      variance[channel] = std::max(0., variance[channel] / rows - average * average);
    }
  });
}

// output = (input - mean) * scale + shift, within the limits.
void batch_norm_output(bool bfloat16, long rows, long channels, long threads, const void* input, const float* mean,
                       const float* scale, const float* shift, float low, float high, void* output) {
  with_number(bfloat16, [=](auto number) {
    using Number = decltype(number);
    const OfBlock block(mean, scale, shift, channels);
    const Normal normal = block.normal(low, high);
    for_blocks(rows, channels, threads, [=](long start, long count) {
      clip_output((const Number*)input + start, normal, count, (Number*)output + start);
    });
  });
}

// Sums over rows of the gradient, of what lies within the limits, and of its product with (input - mean).
void batch_norm_sums(bool bfloat16, long rows, long channels, long threads, const void* input, const float* mean,
                     const float* scale, const float* shift, float low, float high, const void* d_output, double* sum,
                     double* product) {
  with_number(bfloat16, [=](auto number) {
    using Number = decltype(number);
    const OfBlock block(mean, scale, shift, channels);
    const Normal normal = block.normal(low, high);
    sum_up(rows, channels, threads, sum, product, [=](long start, long count, float* sum, float* product) {
      add_gradients((const Number*)input + start, (const Number*)d_output + start, normal, count, sum, product);
    });
  });
}

// d_input = scale * (the gradient within the limits - offset - slope * (input - mean)).
void batch_norm_gradient(bool bfloat16, long rows, long channels, long threads, const void* input, const float* mean,
                         const float* scale, const float* shift, float low, float high, const void* d_output,
                         const float* offset, const float* slope, void* d_input) {
  with_number(bfloat16, [=](auto number) {
    using Number = decltype(number);
    const OfBlock block(mean, scale, shift, channels);
    const auto offsets = repeated(offset, channels), slopes = repeated(slope, channels);
    const Normal normal = block.normal(low, high);
    for_blocks(rows, channels, threads, [=, &offsets, &slopes](long start, long count) {
      pass_back((const Number*)input + start, (const Number*)d_output + start, normal, offsets.data(), slopes.data(),
                count, (Number*)d_input + start);
    });
  });
}

}  // extern "C"
