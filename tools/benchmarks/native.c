// The limits (copying and streaming the same bytes) and the plainest peer, compiled for this very processor when a benchmark
// starts. It shares OpenMP's threads with torch.
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define THREADS _Pragma("omp parallel for num_threads(threads) schedule(static)")

static void piece(int64_t n, int64_t i, int threads, int64_t* begin, int64_t* end) {
  const int64_t step = (n / threads + 1023) / 1024 * 1024;
  *begin = i * step < n ? i * step : n;
  *end = i + 1 == threads || *begin + step > n ? n : *begin + step;
}

void copy(const float* x, float* y, int64_t n, int threads) {
  THREADS for (int i = 0; i < threads; ++i) {
    int64_t begin, end;
    piece(n, i, threads, &begin, &end);
    memcpy(y + begin, x + begin, (end - begin) * sizeof(float));
  }
}

// Copies with stores that go past the caches.
void copy_streaming(const float* x, float* y, int64_t n, int threads) {
#if defined(__AVX__)
  THREADS for (int i = 0; i < threads; ++i) {
    int64_t begin, end;
    piece(n, i, threads, &begin, &end);
    for (; begin + 8 <= end; begin += 8) _mm256_stream_ps(y + begin, _mm256_loadu_ps(x + begin));
    for (; begin < end; ++begin) y[begin] = x[begin];
    _mm_sfence();
  }
#else
  copy(x, y, n, threads);
#endif
}

// The bytes of the fused loss: two floats and a byte in, two floats out.
void stream(const float* a, const float* b, const uint8_t* mask, float* x, float* y, int64_t n, int threads) {
  THREADS for (int i = 0; i < threads; ++i) {
    int64_t begin, end;
    piece(n, i, threads, &begin, &end);
    for (int64_t t = begin; t < end; ++t) {
      x[t] = a[t] + mask[t];
      y[t] = b[t];
    }
  }
}

void stream_streaming(const float* a, const float* b, const uint8_t* mask, float* x, float* y, int64_t n, int threads) {
#if defined(__AVX2__)
  THREADS for (int i = 0; i < threads; ++i) {
    int64_t begin, end;
    piece(n, i, threads, &begin, &end);
    for (; begin + 8 <= end; begin += 8) {
      const __m256i m = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(mask + begin)));
      _mm256_stream_ps(x + begin, _mm256_add_ps(_mm256_loadu_ps(a + begin), _mm256_cvtepi32_ps(m)));
      _mm256_stream_ps(y + begin, _mm256_loadu_ps(b + begin));
    }
    for (; begin < end; ++begin) x[begin] = a[begin] + mask[begin], y[begin] = b[begin];
    _mm_sfence();
  }
#else
  stream(a, b, mask, x, y, n, threads);
#endif
}

// y[t] = x[t] + gamma y[t + 1], sequence by sequence.
void scan(const float* x, float* y, const int64_t* offsets, int64_t sequences, float gamma, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t s = 0; s < sequences; ++s) {
    float value = 0;
    for (int64_t t = offsets[s + 1] - 1; t >= offsets[s]; --t) y[t] = value = x[t] + gamma * value;
  }
}
