// The GRU's loop over time, for CPUs, in float32: gru.py has the mathematics, the packed layout and the axes.
//
// Each step multiplies the previous states with the recurrent weights and applies the gates to the sums while they are
// still in registers. Portable C++ with the vector extensions of GCC and Clang; compiled for the CPU at hand by gru.py.
//
// Panels. The weights are copied once per call into panels of a few output columns that are vectors side by side, so
// that a tile of rows x vectors of sums stays in registers while one panel is read from front to back.
//
// Threads. Each direction has a team of threads. A member owns some panels, hence some hidden units, for the whole
// call; members meet at a barrier once a step. Sums are always added in the same order, so results repeat to the bit.

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <type_traits>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr long LANES = 16, TILE_ROWS = 8;  // 8 rows x 3 vectors of sums, of 32 registers
#elif defined(__AVX2__)
constexpr long LANES = 8, TILE_ROWS = 4;  // 4 rows x 3 vectors of sums, of 16 registers
#else
constexpr long LANES = 4, TILE_ROWS = 8;
#endif
typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(float))));

// The last `lanes` of a row may be fewer than a vector has. Where they are not, the count is a constant to the compiler.
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

constexpr std::integral_constant<long, LANES> ALL_LANES;

template <class Work>
inline void with_lanes(long lanes, Work work) {
  if (lanes >= LANES) work(ALL_LANES);
  else work(lanes);
}

// 2^n e^f with n the nearest integer to x / ln 2; the Taylor series of e^f to degree 7 for |f| <= ln(2) / 2. NaN stays NaN.
inline Vector exp(Vector x) {
  x = x < -87.f ? Vector{} - 87.f : x;
  x = x > 87.f ? Vector{} + 87.f : x;
  const float round = 12582912.f;  // 1.5 * 2^23: adding it leaves the integer part in the low bits
  Vector shifted = x * 1.44269504f + round, n = shifted - round;
  Vector f = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector power = 1.f + f * (1.f + f * (1 / 2.f + f * (1 / 6.f + f * (1 / 24.f + f * (1 / 120.f + f * (1 / 720.f))))));
  Integers exponent = ((Integers)shifted + 127) << 23;
  return power * (Vector)exponent;
}

inline Vector sigmoid(Vector x) { return 1.f / (1.f + exp(-x)); }
inline Vector tanh(Vector x) { return 1.f - 2.f / (1.f + exp(2.f * x)); }

// sums[ROWS][VECTORS] += rows[ROWS, depth] * panel[depth, VECTORS * LANES]
template <int ROWS, int VECTORS>
inline void multiply(const float* rows, long stride, const float* panel, long depth, Vector (&sums)[ROWS][VECTORS]) {
  constexpr int PARTS = std::max<int>(1, TILE_ROWS / ROWS);  // independent sums enough to keep the multipliers busy
  Vector parts[PARTS][ROWS][VECTORS] = {};
  auto add = [&](long k, int part) {
    Vector weights[VECTORS];
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; v++) weights[v] = load(panel + (k * VECTORS + v) * LANES, ALL_LANES);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; v++) parts[part][r][v] += rows[r * stride + k] * weights[v];
  };
  long k = 0;
  for (; k + PARTS <= depth; k += PARTS)
#pragma GCC unroll 16
    for (int part = 0; part < PARTS; part++) add(k + part, part);
  for (; k < depth; k++) add(k, 0);
  for (int part = 0; part < PARTS; part++)
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < VECTORS; v++) sums[r][v] += parts[part][r][v];
}

// Call tile(rows, first) for tiles that cover the rows from `first` to `end`, as high as possible.
template <int ROWS = TILE_ROWS, class Tile>
inline void for_tiles(long first, long end, Tile tile) {
  for (; first + ROWS <= end; first += ROWS) tile(std::integral_constant<int, ROWS>(), first);
  if constexpr (ROWS > 1) for_tiles<ROWS - 1>(first, end, tile);
}

struct alignas(64) Line {
  float values[16];
};

// One member's panels of a team, packed from weight(k, panel, column), which is called for panels [first, end).
class Panels {
 public:
  static constexpr long WIDTH = 3 * LANES;
  long first, end;

  template <class Weight>
  Panels(long panels, long depth, long member, long members, Weight weight)
      : first(panels * member / members), end(panels * (member + 1) / members), size(depth * WIDTH) {
    if (long(lines.size()) * 16 < (end - first) * size) lines.resize(((end - first) * size + 15) / 16);
    for (long panel = first; panel < end; panel++)
      for (long k = 0; k < depth; k++)
        for (long column = 0; column < WIDTH; column++) (*this)[panel][k * WIDTH + column] = weight(k, panel, column);
  }
  float* operator[](long panel) const { return lines.data()->values + (panel - first) * size; }

 private:
  long size;
  static thread_local std::vector<Line> lines;  // kept from call to call: fresh memory costs more than the packing
};
thread_local std::vector<Line> Panels::lines;

// Where the rows of the steps lie, and which rows have a previous state.
struct Steps {
  const int64_t* batch_sizes;
  std::vector<long> offsets{0};
  long count;

  Steps(const int64_t* batch_sizes, long count) : batch_sizes(batch_sizes), count(count) {
    for (long t = 0; t < count; t++) offsets.push_back(offsets.back() + batch_sizes[t]);
  }
  struct Step {
    long rows, offset, previous_rows, previous_offset;
  };
  // The s-th step in the order of time of a direction (1: reverse).
  Step at(long s, long direction) const {
    long t = direction ? count - 1 - s : s, previous = direction ? t + 1 : t - 1;
    if (s == 0) return {batch_sizes[t], offsets[t], 0, 0};
    return {batch_sizes[t], offsets[t], std::min(batch_sizes[t], batch_sizes[previous]), offsets[previous]};
  }
};

class Barrier {
 public:
  void wait(long members) {
    if (members == 1) return;
    long all = arrived.fetch_add(1) / members * members + members;
    for (int spins = 0; arrived.load() < all;)
      if (++spins > 10000) std::this_thread::yield();
  }

 private:
  alignas(64) std::atomic<long> arrived{0};
};

// Call work(direction, member, members, barrier) with as many threads as there are, up to `panels` for each direction.
template <class Work>
void run_teams(long directions, long panels, long threads, Work work) {
  std::vector<Barrier> barriers(directions);
#pragma omp parallel num_threads(std::min(threads, directions * panels))
  {
    long members = std::max(1L, omp_get_num_threads() / directions), teams = omp_get_num_threads() / members;
    long team = omp_get_thread_num() / members, member = omp_get_thread_num() % members;
    if (team < teams)
      for (long direction = team; direction < directions; direction += teams)
        work(direction, member, members, barriers[direction]);
  }
}

}  // namespace

extern "C" {

// Gates [D, N, 3H]: the products with x in, and the gates out. States [D, N, H] out; previous states and q [D, N, H] out,
// unless null. Recurrent weights [3H, H] and biases of q [H], one pointer for each direction.
void gru_forward(long directions, long hidden, long steps_count, const int64_t* batch_sizes, const float* const* weights,
                 const float* const* biases, float* gates, float* states, float* previous, float* q, long threads) {
  const Vector zero = {};
  const Steps steps(batch_sizes, steps_count);
  const long rows = steps.offsets.back(), panels = (hidden + LANES - 1) / LANES;
  run_teams(directions, panels, threads, [&](long direction, long member, long members, Barrier& barrier) {
    // A panel: the three gates of LANES units.
    Panels mine(panels, hidden, member, members, [&](long k, long panel, long column) {
      long gate = column / LANES, unit = panel * LANES + column % LANES;
      return unit < hidden ? weights[direction][(gate * hidden + unit) * hidden + k] : 0.f;
    });
    float *gates_NG = gates + direction * rows * 3 * hidden, *states_NH = states + direction * rows * hidden;
    float* previous_NH = previous ? previous + direction * rows * hidden : nullptr;
    float* q_NH = q ? q + direction * rows * hidden : nullptr;
    for (long s = 0; s < steps_count; s++) {
      const auto step = steps.at(s, direction);
      for (long panel = mine.first; panel < mine.end; panel++) {
        const long unit = panel * LANES;
        with_lanes(hidden - unit, [&](auto lanes) {
        const Vector bias = load(biases[direction] + unit, lanes);
        auto gate = [&](long row, Vector sum_r, Vector sum_z, Vector sum_n, Vector before) __attribute__((always_inline)) {
          float* gates_G = gates_NG + (step.offset + row) * 3 * hidden + unit;
          const long index = (step.offset + row) * hidden + unit;
          Vector r = sigmoid(load(gates_G, lanes) + sum_r), z = sigmoid(load(gates_G + hidden, lanes) + sum_z);
          Vector q = sum_n + bias, n = tanh(load(gates_G + 2 * hidden, lanes) + r * q);
          store(states_NH + index, n + z * (before - n), lanes);
          if (!previous_NH) return;
          store(gates_G, r, lanes);
          store(gates_G + hidden, z, lanes);
          store(gates_G + 2 * hidden, n, lanes);
          store(previous_NH + index, before, lanes);
          store(q_NH + index, q, lanes);
        };
        for_tiles(0, step.previous_rows, [&](auto tile_rows, long row) {
          Vector sums[tile_rows][3] = {};
          const float* before = states_NH + (step.previous_offset + row) * hidden;
          multiply(before, hidden, mine[panel], hidden, sums);
          for (long i = 0; i < tile_rows; i++)
            gate(row + i, sums[i][0], sums[i][1], sums[i][2], load(before + i * hidden + unit, lanes));
        });
        for (long row = step.previous_rows; row < step.rows; row++) gate(row, zero, zero, zero, zero);
        });
      }
      barrier.wait(members);
    }
  });
}

// The gradients of the gates' sums r, z, n (d_gates [D, N, 3H]) and of q (d_q [D, N, H]), from those of the layer's output
// [N, H] and what forward kept.
void gru_backward(long directions, long hidden, long steps_count, const int64_t* batch_sizes,
                  const float* const* weights, const float* d_outputs, const float* gates, const float* previous,
                  const float* q, float* d_gates, float* d_q, long threads) {
  const Steps steps(batch_sizes, steps_count);
  const long rows = steps.offsets.back(), panels = (hidden + Panels::WIDTH - 1) / Panels::WIDTH;
  const long width = panels * Panels::WIDTH;
  run_teams(directions, panels, threads, [&](long direction, long member, long members, Barrier& barrier) {
    // A panel: WIDTH units.
    Panels mine(panels, 3 * hidden, member, members, [&](long k, long panel, long column) {
      long unit = panel * Panels::WIDTH + column;
      return unit < hidden ? weights[direction][k * hidden + unit] : 0.f;
    });
    // The state's gradient that the next step in this order adds to; each member reads and writes its own units of it.
    std::vector<float> carry(batch_sizes[0] * width);
    for (long s = steps_count - 1; s >= 0; s--) {
      const auto step = steps.at(s, direction);
      const long first = direction * rows + step.offset;  // row in [D, N]
      for (long row = 0; row < step.rows; row++)
        for (long unit = mine.first * Panels::WIDTH; unit < std::min(hidden, mine.end * Panels::WIDTH); unit += LANES)
          with_lanes(hidden - unit, [&](auto lanes) {
            const long index = (first + row) * hidden + unit, gate_index = (first + row) * 3 * hidden + unit;
            Vector r = load(gates + gate_index, lanes), z = load(gates + gate_index + hidden, lanes);
            Vector n = load(gates + gate_index + 2 * hidden, lanes);
            float* d_before = carry.data() + row * width + unit;
            Vector d_state = load(d_outputs + (step.offset + row) * hidden + unit, lanes) + load(d_before, ALL_LANES);
            Vector d_n = d_state * (1.f - z) * (1.f - n * n);
            store(d_gates + gate_index, d_n * load(q + index, lanes) * r * (1.f - r), lanes);
            store(d_gates + gate_index + hidden, d_state * (load(previous + index, lanes) - n) * z * (1.f - z), lanes);
            store(d_gates + gate_index + 2 * hidden, d_n, lanes);
            store(d_q + index, d_n * r, lanes);
            store(d_before, d_state * z, ALL_LANES);
          });
      barrier.wait(members);
      for (long panel = mine.first; panel < mine.end; panel++)
        for (long gate = 0; gate < 3; gate++)  // a third of a panel at a time stays in the nearest cache for all tiles
          for_tiles(0, step.previous_rows, [&](auto tile_rows, long row) {
            const long stride = gate < 2 ? 3 * hidden : hidden;
            const float* d_sums = (gate < 2 ? d_gates + gate * hidden : d_q) + (first + row) * stride;
            Vector sums[tile_rows][3] = {};
            multiply(d_sums, stride, mine[panel] + gate * hidden * Panels::WIDTH, hidden, sums);
            for (long i = 0; i < tile_rows; i++)
              for (long v = 0; v < 3; v++) {
                float* d_before = carry.data() + (row + i) * width + panel * Panels::WIDTH + v * LANES;
                store(d_before, load(d_before, ALL_LANES) + sums[i][v], ALL_LANES);
              }
          });
    }
  });
}

}  // extern "C"
