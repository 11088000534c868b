// The vector operations of kernels.inc in the compiler's own vector types: SSE2 on x86-64, NEON on aarch64.
#include <cstdint>
#include <cstring>

namespace megatron_fipo {
namespace {

constexpr int kLanes = 4;
constexpr int kVectorRegisters = 16;
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Mask __attribute__((vector_size(kLanes * sizeof(float))));   // -1 or 0 in each lane

inline Vector broadcast(float x) { return Vector{x, x, x, x}; }
inline Vector load(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(float* p, Vector v) { std::memcpy(p, &v, sizeof(v)); }
inline void stream(float* p, Vector v) { store(p, v); }
inline void finish_streams() {}

// Lanes [low, high) of a register: others are neither read nor written.
inline Vector load(const float* p, int low, int high) {
  Vector v = {};
  for (int lane = low; lane < high; ++lane) v[lane] = p[lane];
  return v;
}
inline void store(float* p, Vector v, int low, int high) {
  for (int lane = low; lane < high; ++lane) p[lane] = v[lane];
}
inline Mask load_mask(const uint8_t* p) { return Mask{p[0], p[1], p[2], p[3]} != 0; }
inline Mask load_mask(const uint8_t* p, int low, int high) {
  Mask m = {};
  for (int lane = low; lane < high; ++lane) m[lane] = p[lane] ? -1 : 0;
  return m;
}
// Torch's bool is 0 or 1.
inline uint32_t bytes_of(const uint8_t* p) {
  uint32_t bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return bytes;
}
inline bool all_response(const uint8_t* p) { return bytes_of(p) == 0x01010101u; }
inline bool no_response(const uint8_t* p) { return bytes_of(p) == 0; }
inline bool every(Mask m) {
  typedef int64_t Half __attribute__((vector_size(sizeof(Mask))));
  const Half halves = reinterpret_cast<Half>(m);
  return (halves[0] & halves[1]) == -1;
}
inline Mask both(Mask a, Mask b) { return a & b; }
inline Mask without(Mask a, Mask b) { return a & ~b; }

inline int64_t number(Mask m) { return -(int64_t{m[0]} + m[1] + m[2] + m[3]); }
using Count = Mask;   // of each lane
inline void count(Count& total, Mask m) { total -= m; }
inline int64_t lane_total(Count total) { return int64_t{total[0]} + total[1] + total[2] + total[3]; }

inline Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
// A NaN in the second argument is returned.
inline Vector minimum(Vector bound, Vector x) { return x > bound ? bound : x; }
inline Vector maximum(Vector bound, Vector x) { return x < bound ? bound : x; }
inline Mask less(Vector a, Vector b) { return a < b; }
inline Mask at_most(Vector a, Vector b) { return a <= b; }
inline Mask differ(Vector a, Vector b) { return a != b; }
inline Mask same_or_nan(Vector a, Vector b) { return ~((a < b) | (a > b)); }
inline Vector masked(Mask m, Vector v) { return m ? v : Vector{}; }
inline Vector select(Mask m, Vector yes, Vector no) { return m ? yes : no; }

inline Vector absolute(Vector v) { return v < 0 ? -v : v; }
inline Vector add_where(Mask m, Vector total, Vector v) { return total + masked(m, v); }
inline Vector minimum_where(Mask m, Vector total, Vector v) { return select(m & (v < total), v, total); }
inline Vector maximum_where(Mask m, Vector total, Vector v) { return select(m & (v > total), v, total); }

// The scan inside one register, by doubling; power[k] = gamma^(2^k) in every lane.
template <bool Reverse>
inline Vector scan_register(Vector v, const Vector* power) {
  const Vector one = Reverse ? Vector{v[1], v[2], v[3], 0} : Vector{0, v[0], v[1], v[2]};
  v = fma(power[0], one, v);
  const Vector two = Reverse ? Vector{v[2], v[3], 0, 0} : Vector{0, 0, v[0], v[1]};
  return fma(power[1], two, v);
}

template <bool Reverse>
inline Vector scan_register(const float* p, const Vector* power) {
  return scan_register<Reverse>(load(p), power);
}

// The sum of as many tokens as a register has lanes, from each lane on, reaching into the register behind. power[k] =
// gamma^(2^k); behind[k]: the sums over 2^k tokens of the register behind, replaced by this one's.
inline Vector window_sum(Vector v, Vector* behind, const Vector* power) {
  const Vector two = fma(power[0], Vector{v[1], v[2], v[3], behind[0][0]}, v);
  const Vector four = fma(power[1], Vector{two[2], two[3], behind[1][0], behind[1][1]}, two);
  behind[0] = v, behind[1] = two;
  return four;
}

template <int... From>   // lanes of a, then of b
inline Vector shuffled(Vector a, Vector b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, From...);
#else   // which has the other builtin only since version 12
  return __builtin_shuffle(a, b, Mask{From...});
#endif
}
// Lane j of register i becomes lane i of register j.
inline void transpose(Vector (&r)[4]) {
  const Vector low01 = shuffled<0, 4, 1, 5>(r[0], r[1]), low23 = shuffled<0, 4, 1, 5>(r[2], r[3]);
  const Vector high01 = shuffled<2, 6, 3, 7>(r[0], r[1]), high23 = shuffled<2, 6, 3, 7>(r[2], r[3]);
  r[0] = shuffled<0, 1, 4, 5>(low01, low23);
  r[1] = shuffled<2, 3, 6, 7>(low01, low23);
  r[2] = shuffled<0, 1, 4, 5>(high01, high23);
  r[3] = shuffled<2, 3, 6, 7>(high01, high23);
}
// Lane i is lane from[i] of v, 0 where from[i] is negative.
inline Vector permuted(Vector v, const int32_t* from) {
  Mask index;
  std::memcpy(&index, from, sizeof(index));
  const Vector moved = {v[from[0] & 3], v[from[1] & 3], v[from[2] & 3], v[from[3] & 3]};
  return masked(index >= 0, moved);
}

constexpr int kExpBits = 0;   // exponential() in kernels_loss.inc uses no table

inline void add_to(double* sums, Vector v) {
  for (int lane = 0; lane < kLanes; ++lane) sums[lane] += v[lane];
}

}  // namespace
}  // namespace megatron_fipo
