// The vector operations of kernels.inc on AVX-512 (F, BW, VL, DQ).
#include <immintrin.h>

namespace megatron_fipo {
namespace {

constexpr int kLanes = 16;
constexpr int kVectorRegisters = 32;
using Vector = __m512;
using Mask = __mmask16;

inline Vector broadcast(float x) { return _mm512_set1_ps(x); }
inline Vector load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
inline void stream(float* p, Vector v) { _mm512_stream_ps(p, v); }
inline void finish_streams() { _mm_sfence(); }

// Lanes [low, high) of a register: others are neither read nor written.
inline Mask lanes(int low, int high) { return static_cast<Mask>((0xffffu << low) & (0xffffu >> (kLanes - high))); }
inline Vector load(const float* p, int low, int high) { return _mm512_maskz_loadu_ps(lanes(low, high), p); }
inline void store(float* p, Vector v, int low, int high) { _mm512_mask_storeu_ps(p, lanes(low, high), v); }

inline Mask load_mask(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm_test_epi8_mask(bytes, bytes);
}
inline Mask load_mask(const uint8_t* p, int low, int high) {
  const __m128i bytes = _mm_maskz_loadu_epi8(lanes(low, high), p);
  return _mm_test_epi8_mask(bytes, bytes);
}
// Torch's bool is 0 or 1.
inline bool all_response(const uint8_t* p) {
  uint64_t bytes[2];
  std::memcpy(bytes, p, sizeof(bytes));
  return (bytes[0] & bytes[1]) == 0x0101010101010101u;
}
inline bool no_response(const uint8_t* p) { return load_mask(p) == 0; }
inline bool every(Mask m) { return m == 0xffff; }
inline Mask both(Mask a, Mask b) { return a & b; }
inline Mask without(Mask a, Mask b) { return a & ~b; }

inline int64_t number(Mask m) { return __builtin_popcount(m); }
using Count = int64_t;   // of all lanes: outside the vector units
inline void count(Count& total, Mask m) { total += number(m); }
inline int64_t lane_total(Count total) { return total; }

inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
// A NaN in the second argument is returned.
inline Vector minimum(Vector bound, Vector x) { return _mm512_min_ps(bound, x); }
inline Vector maximum(Vector bound, Vector x) { return _mm512_max_ps(bound, x); }
inline Mask less(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Mask at_most(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
inline Mask differ(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ); }
inline Mask same_or_nan(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_UQ); }
inline Vector masked(Mask m, Vector v) { return _mm512_maskz_mov_ps(m, v); }
inline Vector select(Mask m, Vector yes, Vector no) { return _mm512_mask_mov_ps(no, m, yes); }

inline Vector absolute(Vector v) { return _mm512_abs_ps(v); }
inline Vector add_where(Mask m, Vector total, Vector v) { return _mm512_mask_add_ps(total, m, total, v); }
inline Vector minimum_where(Mask m, Vector total, Vector v) { return _mm512_mask_min_ps(total, m, total, v); }
inline Vector maximum_where(Mask m, Vector total, Vector v) { return _mm512_mask_max_ps(total, m, total, v); }

// The lane `Distance` earlier (forward) or later (reverse) in memory, zero outside the register.
template <bool Reverse, int Distance>
inline Vector shifted(Vector v) {
  const __m512i bits = _mm512_castps_si512(v), zero = _mm512_setzero_si512();
  return _mm512_castsi512_ps(Reverse ? _mm512_alignr_epi32(zero, bits, Distance)
                                     : _mm512_alignr_epi32(bits, zero, kLanes - Distance));
}

// The scan inside one register, by doubling; power[k] = gamma^k.
template <bool Reverse>
inline Vector scan_rest(Vector v, Vector shifted_by_one, const Vector* power) {
  v = fma(power[0], shifted_by_one, v);
  v = fma(power[1], shifted<Reverse, 2>(v), v);
  v = fma(power[2], shifted<Reverse, 4>(v), v);
  return fma(power[3], shifted<Reverse, 8>(v), v);
}
template <bool Reverse>
inline Vector scan_register(Vector v, const Vector* power) {
  return scan_rest<Reverse>(v, shifted<Reverse, 1>(v), power);
}
// Of the register at p: a second load takes the place of the first shift.
template <bool Reverse>
inline Vector scan_register(const float* p, const Vector* power) {
  const Vector by_one = Reverse ? _mm512_maskz_loadu_ps(0x7fff, p + 1) : _mm512_maskz_loadu_ps(0xfffe, p - 1);
  return scan_rest<Reverse>(load(p), by_one, power);
}

template <int Distance>
inline Vector joined(Vector v, Vector behind) {
  return _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(behind), _mm512_castps_si512(v), Distance));
}
// The sum of as many tokens as a register has lanes, from each lane on, reaching into the register behind. power[k] =
// gamma^(2^k); behind[k]: the sums over 2^k tokens of the register behind, replaced by this one's.
inline Vector window_sum(Vector v, Vector* behind, const Vector* power) {
  const Vector two = fma(power[0], joined<1>(v, behind[0]), v);
  const Vector four = fma(power[1], joined<2>(two, behind[1]), two);
  const Vector eight = fma(power[2], joined<4>(four, behind[2]), four);
  const Vector sixteen = fma(power[3], joined<8>(eight, behind[3]), eight);
  behind[0] = v, behind[1] = two, behind[2] = four, behind[3] = eight;
  return sixteen;
}

// In each quarter of four registers: lane j of register i becomes lane i of register j.
inline void transpose(Vector (&r)[4]) {
  const auto pairs = [](Vector v) { return _mm512_castps_pd(v); };
  const __m512d low01 = pairs(_mm512_unpacklo_ps(r[0], r[1])), low23 = pairs(_mm512_unpacklo_ps(r[2], r[3]));
  const __m512d high01 = pairs(_mm512_unpackhi_ps(r[0], r[1])), high23 = pairs(_mm512_unpackhi_ps(r[2], r[3]));
  r[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
  r[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
  r[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
  r[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
}
// Lane i is lane from[i] of v, 0 where from[i] is negative.
inline Vector permuted(Vector v, const int32_t* from) {
  const __m512i index = _mm512_load_si512(from);
  return _mm512_maskz_permutexvar_ps(_mm512_cmpge_epi32_mask(index, _mm512_setzero_si512()), index, v);
}

// 2^(n / 16) for the integer n in the low bits of `shifted` (exponential() in kernels_loss.inc).
constexpr int kExpBits = 4;
// The bits of 2^(i / 16), less i where the shifted n adds it.
alignas(64) constexpr int32_t kPowersOfTwo[] = {
    0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
    0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
inline Vector power_of_two(Vector shifted) {
  const __m512i bits = _mm512_castps_si512(shifted);
  const __m512i fraction = _mm512_permutexvar_epi32(bits, _mm512_load_si512(kPowersOfTwo));
  return _mm512_castsi512_ps(_mm512_add_epi32(fraction, _mm512_slli_epi32(bits, 23 - kExpBits)));
}

// Lane i of two registers as doubles: low half, high half.
inline void add_to(double* sums, Vector v) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
  _mm512_storeu_pd(sums, _mm512_loadu_pd(sums) + low);
  _mm512_storeu_pd(sums + 8, _mm512_loadu_pd(sums + 8) + high);
}

}  // namespace
}  // namespace megatron_fipo
