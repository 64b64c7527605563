// The GRU's loop over time on a CPU; gru.py has the mathematics, the packed layout and the names.
//
// A step multiplies the previous states with the recurrent weights and applies the gates to the sums while those are in
// registers. It is portable C++ (vector extensions of GCC and Clang) that kernels.py compiles for the CPU at hand.
//
// Precision: states, gates and sums are float32. The operands of the products are float32, or rounded to bfloat16: then
// two neighbors along the depth of a product share 32 bits (a Pair), as the CPUs that multiply bfloat16 want them;
// on others, where only tests ask for it, both halves become float32: the same result but for the order of additions.
//
// Panels: the weights are copied, once a call, into panels of three vectors of output columns each, so that a tile of
// rows x 3 vectors of sums stays in registers while one panel is read from front to back.
//
// Threads: each direction has a team of threads. A member owns some panels, and so some hidden units, for the whole
// call; the team meets at a barrier once a step. Sums always have the same order: results are bitwise reproducible.

#include <omp.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <thread>
#include <type_traits>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr long LANES = 16, TILE_ROWS = 8;  // 8 x 3 sums in 32 registers
#elif defined(__AVX2__)
constexpr long LANES = 8, TILE_ROWS = 4;  // 4 x 3 sums in 16 registers
#else
constexpr long LANES = 4, TILE_ROWS = 8;
#endif
constexpr long WIDTH = 3 * LANES;  // columns of a panel
typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(float))));
typedef uint32_t Pairs __attribute__((vector_size(LANES * sizeof(float))));
typedef uint16_t Halves __attribute__((vector_size(LANES * sizeof(uint16_t))));

struct Pair {  // two bfloat16 numbers, the first in the low half
  uint32_t bits;
};
template <class Number>
constexpr long DEPTH = std::is_same_v<Number, Pair> ? 2 : 1;  // numbers along the depth of a product in one element

// The last units of a row may be fewer than LANES; otherwise their number is a constant to the compiler.
constexpr std::integral_constant<long, LANES> ALL;

template <class Work>
inline void with_lanes(long units_left, Work work) {
  if (units_left >= LANES) work(ALL);
  else work(units_left);
}

template <class Lanes>
inline Vector load(const float* from, Lanes lanes) {
  Vector vector = {};
  std::memcpy(&vector, from, lanes * sizeof(float));
  return vector;
}

template <class Lanes>
inline void store(float* to, Vector vector, Lanes lanes) {
  std::memcpy(to, &vector, lanes * sizeof(float));
}

// 2^n e^f, where n is the integer nearest to x / ln 2, and e^f for |f| <= ln(2) / 2 is a Taylor series. NaN stays NaN.
inline Vector exp(Vector x) {
  x = x < -87.f ? Vector{} - 87.f : x;
  x = x > 87.f ? Vector{} + 87.f : x;
  const float round = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  Vector shifted = x * 1.44269504f + round, n = shifted - round;
  Vector f = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact in few bits
  Vector power = 1 + f * (1 + f * (1 / 2.f + f * (1 / 6.f + f * (1 / 24.f + f * (1 / 120.f + f * (1 / 720.f))))));
  return power * (Vector)(((Integers)shifted + 127) << 23);
}

inline Vector sigmoid(Vector x) { return 1 / (1 + exp(-x)); }
inline Vector tanh(Vector x) { return 1 - 2 / (1 + exp(2 * x)); }

// To bfloat16, to nearest and ties to even; in the low half. NaN stays NaN.
inline Pairs to_bfloat16(Vector x) {
  const Pairs bits = (Pairs)x;
  return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : Pairs{} + 0x7fff;
}

template <class Lanes>
inline void store_bfloat16(uint16_t* to, Vector vector, Lanes lanes) {
  const Halves halves = __builtin_convertvector(to_bfloat16(vector), Halves);
  std::memcpy(to, &halves, lanes * sizeof(uint16_t));
}

// sum + a * b, by lane.
inline Vector multiply_add(Vector sum, float a, const float* b) { return sum + a * load(b, ALL); }
inline Vector multiply_add(Vector sum, Pair a, const Pair* b) {
  Pairs pairs;
  std::memcpy(&pairs, b, sizeof pairs);
#ifdef __AVX512BF16__
  return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a.bits), (__m512bh)pairs);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return (Vector)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)vdupq_n_u32(a.bits), (bfloat16x8_t)pairs);
#else
  float low, high;
  const uint32_t low_bits = a.bits << 16, high_bits = a.bits & 0xffff0000;
  std::memcpy(&low, &low_bits, sizeof low);
  std::memcpy(&high, &high_bits, sizeof high);
  return sum + low * (Vector)(pairs << 16) + high * (Vector)(pairs & 0xffff0000);
#endif
}

// sums[ROWS, WIDTH] += rows[ROWS, depth] * panel[depth, WIDTH], depth and stride in elements. Not inline, so that the
// sums have all registers.
template <int ROWS, class Number>
__attribute__((noinline)) void multiply(const Number* rows, long stride, const Number* panel, long depth,
                                        Vector (&sums)[ROWS][3]) {
  constexpr int PARTS = std::max<int>(1, TILE_ROWS / ROWS);  // of a sum: enough to keep the multipliers busy
  Vector parts[PARTS][ROWS][3] = {};
  auto add = [&](long k, int part) {
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 3
      for (int v = 0; v < 3; v++) {
        Vector& sum = parts[part][row][v];
        sum = multiply_add(sum, rows[row * stride + k], panel + k * WIDTH + v * LANES);
      }
  };
  long k = 0;
  for (; k + PARTS <= depth; k += PARTS)
#pragma GCC unroll 8
    for (int part = 0; part < PARTS; part++) add(k + part, part);
  for (; k < depth; k++) add(k, 0);
  for (int part = 0; part < PARTS; part++)
    for (int row = 0; row < ROWS; row++)
      for (int v = 0; v < 3; v++) sums[row][v] += parts[part][row][v];
}

// Call tile(number of rows, first row) for tiles that cover the rows from `first` to `end`, each as high as it can be.
template <int ROWS = TILE_ROWS, class Tile>
inline void for_tiles(long first, long end, Tile tile) {
  for (; first + ROWS <= end; first += ROWS) tile(std::integral_constant<int, ROWS>(), first);
  if constexpr (ROWS > 1) for_tiles<ROWS - 1>(first, end, tile);
}

struct alignas(64) CacheLine {
  float values[16];
};
thread_local std::vector<CacheLine> packed;  // kept between calls, since new memory costs more than the packing

// The panels `first` to `end` of `depth` rows each, filled with the vectors weights(row, panel, place in the panel).
template <class Number, class Weights>
const Number* pack(long first, long end, long depth, Weights weights) {
  const long elements = (depth + DEPTH<Number> - 1) / DEPTH<Number>;
  packed.resize(std::max<size_t>(packed.size(), ((end - first) * elements * WIDTH + 15) / 16));
  float* to = packed.data()->values;
  for (long panel = first; panel < end; panel++)
    for (long k = 0; k < depth; k += DEPTH<Number>)
      for (long v = 0; v < 3; v++, to += LANES) {
        Vector vector = weights(k, panel, v);
        if constexpr (std::is_same_v<Number, Pair>)
          vector = (Vector)(to_bfloat16(vector) | to_bfloat16(k + 1 < depth ? weights(k + 1, panel, v) : Vector{}) << 16);
        store(to, vector, ALL);
      }
  return (const Number*)packed.data()->values;
}

// The rows of a step's product, rounded: by the members of a team in one step, for all of them after the next barrier.
// Two of them in turn, so that a fast member's next step does not overwrite what a slow one reads.
class RoundedRows {
 public:
  RoundedRows(long directions, long rows, long depth)
      : stride_((depth + 1) / 2 * 2), size_(rows * stride_), values_(directions * 2 * size_) {}
  long stride() const { return stride_ / 2; }  // in pairs
  uint16_t* row(long direction, long step, long row) {
    return &values_[(2 * direction + step % 2) * size_ + row * stride_];
  }

 private:
  const long stride_, size_;
  std::vector<uint16_t> values_;
};

struct Step {
  long number;                          // in the order of the loop
  long rows, offset;                    // its rows begin at `offset` of N
  long previous_rows, previous_offset;  // how many of them have a previous state, and where those begin
};

std::vector<Step> in_order(long direction, const int64_t* batch_sizes, long count) {
  std::vector<Step> steps;
  for (long t = 0, offset = 0; t < count; offset += batch_sizes[t++]) steps.push_back({0, batch_sizes[t], offset, 0, 0});
  if (direction) std::reverse(steps.begin(), steps.end());
  for (long s = 1; s < count; s++) {
    steps[s].number = s;
    steps[s].previous_rows = std::min(steps[s].rows, steps[s - 1].rows);
    steps[s].previous_offset = steps[s - 1].offset;
  }
  return steps;
}

// Call work(direction, first, end, meet) for each direction and each share of its panels, in as many threads as there
// are; meet() returns when all of the direction's threads have called it.
template <class Work>
void in_teams(long directions, long panels, long threads, Work work) {
  struct alignas(64) Counter {
    std::atomic<long> value{0};
  };
  std::vector<Counter> counters(directions);
#pragma omp parallel num_threads(std::min(threads, directions * panels))
  {
    const long members = std::max(1L, omp_get_num_threads() / directions), teams = omp_get_num_threads() / members;
    const long team = omp_get_thread_num() / members, member = omp_get_thread_num() % members;
    for (long direction = team; direction < directions && team < teams; direction += teams) {
      std::atomic<long>& arrived = counters[direction].value;
      work(direction, panels * member / members, panels * (member + 1) / members, [&arrived, members] {
        const long all = (arrived.fetch_add(1) / members + 1) * members;
        for (long spins = 0; arrived.load() < all; spins++)
          if (spins > 100000) std::this_thread::yield();
      });
    }
  }
}

template <class Work>
void with_number(bool bfloat16, Work work) {
  if (bfloat16) work(Pair{});
  else work(0.f);
}

}  // namespace

extern "C" {

// gates [D, N, 3H]: the products with x in; r, z, n out. states [D, N, H] out. previous, q [D, N, H] out, or both null
// and the gates not written. weights [3H, H], biases (of q) [H]: one pointer for each direction.
void gru_forward(bool bfloat16, long threads, long directions, long H, long count, const int64_t* batch_sizes,
                 const float* const* weights, const float* const* biases, float* gates, float* states, float* previous,
                 float* q) {
  const long N = std::accumulate(batch_sizes, batch_sizes + count, 0L);
  with_number(bfloat16, [=](auto number) {
    using Number = decltype(number);
    constexpr bool ROUNDED = std::is_same_v<Number, Pair>;
    RoundedRows rounded(directions, ROUNDED ? batch_sizes[0] : 0, H);
    in_teams(directions, (H + LANES - 1) / LANES, threads, [=, &rounded](long direction, long first, long end, auto meet) {
      const Number* panels = pack<Number>(first, end, H, [=](long k, long panel, long gate) {  // 3 gates of LANES units
        const float* column = weights[direction] + (gate * H + panel * LANES) * H + k;
        Vector vector = {};
        for (long lane = 0; lane < std::min(LANES, H - panel * LANES); lane++) vector[lane] = column[lane * H];
        return vector;
      });
      const long depth = (H + DEPTH<Number> - 1) / DEPTH<Number>;
      for (const Step& step : in_order(direction, batch_sizes, count)) {
        for (long panel = first; panel < end; panel++) {
          const long unit = panel * LANES;
          with_lanes(H - unit, [=, &rounded](auto lanes) {
            const Vector bias = load(biases[direction] + unit, lanes);
            const Vector none = {};
            auto finish = [=, &rounded](long row, Vector sum_r, Vector sum_z, Vector sum_q, Vector before) {
              const long index = (direction * N + step.offset + row) * H + unit;
              float* gate = gates + (direction * N + step.offset + row) * 3 * H + unit;
              const Vector r = sigmoid(load(gate, lanes) + sum_r), z = sigmoid(load(gate + H, lanes) + sum_z);
              const Vector q_ = sum_q + bias, n = tanh(load(gate + 2 * H, lanes) + r * q_);
              const Vector state = n + z * (before - n);
              store(states + index, state, lanes);
              if constexpr (ROUNDED) store_bfloat16(rounded.row(direction, step.number, row) + unit, state, lanes);
              if (!q) return;
              store(gate, r, lanes);
              store(gate + H, z, lanes);
              store(gate + 2 * H, n, lanes);
              store(previous + index, before, lanes);
              store(q + index, q_, lanes);
            };
            for_tiles(0, step.previous_rows, [=, &rounded](auto rows, long row) {
              const float* before = states + (direction * N + step.previous_offset + row) * H;
              const Number* weights = panels + (panel - first) * depth * WIDTH;
              Vector sums[rows][3] = {};
              if constexpr (ROUNDED)
                multiply((const Pair*)rounded.row(direction, step.number - 1, row), rounded.stride(), weights, depth, sums);
              else multiply(before, H, weights, depth, sums);
              for (long i = 0; i < rows; i++)
                finish(row + i, sums[i][0], sums[i][1], sums[i][2], load(before + i * H + unit, lanes));
            });
            for (long row = step.previous_rows; row < step.rows; row++) finish(row, none, none, none, none);
          });
        }
        meet();
      }
    });
  });
}

// d_gates [D, N, 3H] out: the gradients of the sums inside r, z, n. d_q [D, N, H] out. Both come from d_outputs [N, H],
// the gradients of the layer's output, and from what forward kept.
void gru_backward(bool bfloat16, long threads, long directions, long H, long count, const int64_t* batch_sizes,
                  const float* const* weights, const float* d_outputs, const float* gates, const float* previous,
                  const float* q, float* d_gates, float* d_q) {
  const long N = std::accumulate(batch_sizes, batch_sizes + count, 0L), panels_count = (H + WIDTH - 1) / WIDTH;
  with_number(bfloat16, [=](auto number) {
    using Number = decltype(number);
    constexpr bool ROUNDED = std::is_same_v<Number, Pair>;
    RoundedRows rounded(directions, ROUNDED ? batch_sizes[0] : 0, 3 * H);
    in_teams(directions, panels_count, threads, [=, &rounded](long direction, long first, long end, auto meet) {
      const Number* panels = pack<Number>(first, end, 3 * H, [=](long k, long panel, long v) {  // a panel: WIDTH units
        const long unit = panel * WIDTH + v * LANES;
        Vector vector = {};
        if (unit < H) with_lanes(H - unit, [&](auto lanes) { vector = load(weights[direction] + k * H + unit, lanes); });
        return vector;
      });
      const long depth = (3 * H + DEPTH<Number> - 1) / DEPTH<Number>;
      // What reaches the states of the step before, in the order of time: this member's units of each row.
      const long owned = (end - first) * WIDTH;
      std::vector<float> d_before(batch_sizes[0] * owned);
      const auto steps = in_order(direction, batch_sizes, count);
      for (auto step = steps.rbegin(); step != steps.rend(); step++) {
        const long offset = direction * N + step->offset;
        for (long row = 0; row < step->rows; row++)
          for (long unit = first * WIDTH; unit < std::min(H, end * WIDTH); unit += LANES)
            with_lanes(H - unit, [&](auto lanes) {
              const long index = (offset + row) * H + unit, gate = (offset + row) * 3 * H + unit;
              const Vector r = load(gates + gate, lanes), z = load(gates + gate + H, lanes);
              const Vector n = load(gates + gate + 2 * H, lanes), before = load(previous + index, lanes);
              float* carry = &d_before[row * owned + unit - first * WIDTH];
              const Vector d_state = load(d_outputs + (step->offset + row) * H + unit, lanes) + load(carry, ALL);
              const Vector d_n = d_state * (1 - z) * (1 - n * n);
              const Vector by_gate[3] = {d_n * load(q + index, lanes) * r * (1 - r),
                                         d_state * (before - n) * z * (1 - z), d_n * r};
              store(d_gates + gate, by_gate[0], lanes);
              store(d_gates + gate + H, by_gate[1], lanes);
              store(d_gates + gate + 2 * H, d_n, lanes);
              store(d_q + index, by_gate[2], lanes);
              store(carry, d_state * z, ALL);
              if constexpr (ROUNDED)
                for (long kind = 0; kind < 3; kind++)
                  store_bfloat16(rounded.row(direction, step->number, row) + kind * H + unit, by_gate[kind], lanes);
            });
        meet();
        for (long panel = 0; panel < end - first; panel++)
          for_tiles(0, step->previous_rows, [&](auto rows, long row) {
            const Number* weights = panels + panel * depth * WIDTH;
            Vector sums[rows][3] = {};
            if constexpr (ROUNDED) {
              multiply((const Pair*)rounded.row(direction, step->number, row), rounded.stride(), weights, depth, sums);
            } else {
              multiply(d_gates + (offset + row) * 3 * H, 3 * H, weights, 2 * H, sums);
              multiply(d_q + (offset + row) * H, H, weights + 2 * H * WIDTH, H, sums);
            }
            for (long i = 0; i < rows; i++)
              for (long v = 0; v < 3; v++) {
                float* carry = &d_before[(row + i) * owned + panel * WIDTH + v * LANES];
                store(carry, load(carry, ALL) + sums[i][v], ALL);
              }
          });
      }
    });
  });
}

}  // extern "C"
