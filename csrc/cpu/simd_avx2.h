// The vector operations of kernels.inc on AVX2 and FMA.
#include <immintrin.h>

namespace megatron_fipo {
namespace {

constexpr int kLanes = 8;
constexpr int kVectorRegisters = 16;
using Vector = __m256;
struct Mask {
  __m256 bits;
};

inline Vector broadcast(float x) { return _mm256_set1_ps(x); }
inline Vector load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
inline void stream(float* p, Vector v) { _mm256_stream_ps(p, v); }
inline void finish_streams() { _mm_sfence(); }

// Lanes [low, high) of a register: others are neither read nor written.
inline __m256i lanes(int low, int high) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(low), lane),
                             _mm256_cmpgt_epi32(_mm256_set1_epi32(high), lane));
}
inline Vector load(const float* p, int low, int high) { return _mm256_maskload_ps(p, lanes(low, high)); }
inline void store(float* p, Vector v, int low, int high) { _mm256_maskstore_ps(p, lanes(low, high), v); }

inline Mask load_mask(const uint8_t* p) {
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(wide, _mm256_setzero_si256()))};
}
inline Mask load_mask(const uint8_t* p, int low, int high) {
  uint8_t bytes[kLanes] = {};
  for (int lane = low; lane < high; ++lane) bytes[lane] = p[lane];
  return load_mask(bytes);
}
// Torch's bool is 0 or 1.
inline uint64_t bytes_of(const uint8_t* p) {
  uint64_t bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return bytes;
}
inline bool all_response(const uint8_t* p) { return bytes_of(p) == 0x0101010101010101u; }
inline bool no_response(const uint8_t* p) { return bytes_of(p) == 0; }
inline bool every(Mask m) { return _mm256_movemask_ps(m.bits) == 0xff; }
inline Mask both(Mask a, Mask b) { return {_mm256_and_ps(a.bits, b.bits)}; }
inline Mask without(Mask a, Mask b) { return {_mm256_andnot_ps(b.bits, a.bits)}; }

inline int64_t number(Mask m) { return __builtin_popcount(_mm256_movemask_ps(m.bits)); }
using Count = int64_t;   // of all lanes: outside the vector units
inline void count(Count& total, Mask m) { total += number(m); }
inline int64_t lane_total(Count total) { return total; }

inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
// A NaN in the second argument is returned.
inline Vector minimum(Vector bound, Vector x) { return _mm256_min_ps(bound, x); }
inline Vector maximum(Vector bound, Vector x) { return _mm256_max_ps(bound, x); }
inline Mask less(Vector a, Vector b) { return {_mm256_cmp_ps(a, b, _CMP_LT_OQ)}; }
inline Mask at_most(Vector a, Vector b) { return {_mm256_cmp_ps(a, b, _CMP_LE_OQ)}; }
inline Mask differ(Vector a, Vector b) { return {_mm256_cmp_ps(a, b, _CMP_NEQ_UQ)}; }
inline Mask same_or_nan(Vector a, Vector b) { return {_mm256_cmp_ps(a, b, _CMP_EQ_UQ)}; }
inline Vector masked(Mask m, Vector v) { return _mm256_and_ps(m.bits, v); }
inline Vector select(Mask m, Vector yes, Vector no) { return _mm256_blendv_ps(no, yes, m.bits); }

inline Vector absolute(Vector v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
inline Vector add_where(Mask m, Vector total, Vector v) { return total + masked(m, v); }
inline Vector minimum_where(Mask m, Vector total, Vector v) { return _mm256_min_ps(total, select(m, v, total)); }
inline Vector maximum_where(Mask m, Vector total, Vector v) { return _mm256_max_ps(total, select(m, v, total)); }

// The scan inside one register; power[k] = gamma^(2^k), but for the last step gamma to a lane's distance from the value that
// it takes. First in each half, where a shift that brings in zeros is one instruction; then the half that is behind in scan
// order takes the other's last value.
template <bool Reverse, int Distance>
inline Vector shifted_in_halves(Vector v) {
  const __m256i bits = _mm256_castps_si256(v);
  return _mm256_castsi256_ps(Reverse ? _mm256_srli_si256(bits, 4 * Distance) : _mm256_slli_si256(bits, 4 * Distance));
}
template <bool Reverse>
inline Vector scan_register(Vector v, const Vector* power) {
  v = fma(power[0], shifted_in_halves<Reverse, 1>(v), v);
  v = fma(power[1], shifted_in_halves<Reverse, 2>(v), v);
  const Vector other = _mm256_permutevar8x32_ps(v, _mm256_set1_epi32(Reverse ? 4 : 3));
  return _mm256_blend_ps(v, fma(power[2], other, v), Reverse ? 0x0f : 0xf0);
}

template <bool Reverse>
inline Vector scan_register(const float* p, const Vector* power) {
  return scan_register<Reverse>(load(p), power);
}

// The sum of as many tokens as a register has lanes, from each lane on, reaching into the register behind. power[k] =
// gamma^(2^k); behind[k]: the sums over 2^k tokens of the register behind, replaced by this one's.
inline Vector window_sum(Vector v, Vector* behind, const Vector* power) {
  const auto middle = [](Vector v, Vector behind) { return _mm256_permute2f128_ps(v, behind, 0x21); };
  const auto joined = [](Vector v, Vector middle, auto bytes) {
    return _mm256_castsi256_ps(_mm256_alignr_epi8(_mm256_castps_si256(middle), _mm256_castps_si256(v), decltype(bytes)::value));
  };
  const Vector two = fma(power[0], joined(v, middle(v, behind[0]), std::integral_constant<int, 4>()), v);
  const Vector four = fma(power[1], joined(two, middle(two, behind[1]), std::integral_constant<int, 8>()), two);
  const Vector eight = fma(power[2], middle(four, behind[2]), four);
  behind[0] = v, behind[1] = two, behind[2] = four;
  return eight;
}

// In each half of four registers: lane j of register i becomes lane i of register j.
inline void transpose(Vector (&r)[4]) {
  const auto pairs = [](Vector v) { return _mm256_castps_pd(v); };
  const __m256d low01 = pairs(_mm256_unpacklo_ps(r[0], r[1])), low23 = pairs(_mm256_unpacklo_ps(r[2], r[3]));
  const __m256d high01 = pairs(_mm256_unpackhi_ps(r[0], r[1])), high23 = pairs(_mm256_unpackhi_ps(r[2], r[3]));
  r[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23));
  r[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23));
  r[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23));
  r[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23));
}
// Lane i is lane from[i] of v, 0 where from[i] is negative.
inline Vector permuted(Vector v, const int32_t* from) {
  const __m256i index = _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(v, index), _mm256_setzero_ps(), _mm256_castsi256_ps(index));
}

// 2^(n / 8) for the integer n in the low bits of `shifted` (exponential() in kernels_loss.inc).
constexpr int kExpBits = 3;
// The bits of 2^(i / 8), less i where the shifted n adds it.
alignas(64) constexpr int32_t kPowersOfTwo[] = {
    0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
inline Vector power_of_two(Vector shifted) {
  const __m256i bits = _mm256_castps_si256(shifted);
  const __m256i fraction = _mm256_permutevar8x32_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(kPowersOfTwo)), bits);
  return _mm256_castsi256_ps(_mm256_add_epi32(fraction, _mm256_slli_epi32(bits, 23 - kExpBits)));
}

inline void add_to(double* sums, Vector v) {
  const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
  _mm256_storeu_pd(sums, _mm256_loadu_pd(sums) + low);
  _mm256_storeu_pd(sums + 4, _mm256_loadu_pd(sums + 4) + high);
}

}  // namespace
}  // namespace megatron_fipo
