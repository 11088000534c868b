// Runs the CUDA kernels in the emulator on cases from a file: run_cases SEED IN OUT (test_cuda_emulator.py writes and
// reads them). All cases of a run share one workspace, as launches on a stream do. Inputs are allocated to the byte, so
// that a sanitizer sees any step outside, and outputs start as NaN.
#define MEGATRON_FIPO_EMULATOR
#include "cuda/discounted_scan.cu"
#include "cuda/fipo_loss.cu"
#include "cuda/scale_per_sequence.cu"

using namespace megatron_fipo;

namespace {

enum Kind : int64_t { kLoss, kAggregate, kScanReverse, kScanForward, kScale };

struct Case {
  int64_t kind, num_tokens, num_sequences, wide, bf16, advantage_is_per_token, paper, misaligned;
  double gamma, weight_low, weight_high, safety_threshold, dual_clip, clip_low, clip_high;
};

template <class T>
bool read(std::FILE* file, T* data, size_t count) {
  return std::fread(data, sizeof(T), count, file) == count;
}

// A vector that starts `offset` elements behind a 16-byte boundary.
template <class T>
class Vector {
 public:
  Vector(size_t size, int64_t offset)
      : size_(size), memory_(std::malloc((size + offset) * sizeof(T))), offset_(offset) {
    std::memset(data(), 0xff, size * sizeof(T));
  }
  ~Vector() { std::free(memory_); }
  Vector(const Vector&) = delete;
  T* data() { return static_cast<T*>(memory_) + offset_; }
  void write(std::FILE* file) { std::fwrite(data(), sizeof(T), size_, file); }

 private:
  size_t size_;
  void* memory_;
  int64_t offset_;
};

// Null when the file says so by size -1.
template <class T>
std::unique_ptr<Vector<T>> read_vector(std::FILE* file, int64_t offset) {
  int64_t size;
  if (!read(file, &size, 1)) emulator::fail("the file of cases is too short");
  if (size < 0) return nullptr;
  auto vector = std::make_unique<Vector<T>>(size, offset);
  if (!read(file, vector->data(), size)) emulator::fail("the file of cases is too short");
  return vector;
}

template <class T>
T* pointer(const std::unique_ptr<Vector<T>>& vector) {
  return vector ? vector->data() : nullptr;
}

void run(const Case& c, const cuda::WorkspaceMemory& workspace, std::FILE* in, std::FILE* out) {
  const size_t tokens = c.num_tokens, sequences = c.num_sequences;
  const auto offsets32 = c.wide ? nullptr : read_vector<int32_t>(in, 0);
  const auto offsets64 = c.wide ? read_vector<int64_t>(in, 0) : nullptr;
  const cuda::PackedSequences packed = {c.wide ? static_cast<void*>(pointer(offsets64)) : pointer(offsets32),
                                        c.wide != 0, c.num_sequences};
  const auto carry = read_vector<double>(in, 0);   // in kScale the scale
  if (c.kind >= kScanReverse) {
    const auto x = read_vector<float>(in, c.misaligned);
    Vector<float> y(tokens, c.misaligned);
    if (c.kind == kScale)
      cuda::scale_per_sequence(pointer(x), pointer(carry), y.data(), c.num_tokens, packed, nullptr);
    else
      cuda::discounted_scan({pointer(x), y.data(), pointer(carry), c.num_tokens, packed}, c.gamma,
                            c.kind == kScanReverse, workspace, nullptr);
    y.write(out);
    return;
  }
  const auto logp = c.bf16 ? nullptr : read_vector<float>(in, c.misaligned);
  const auto old_logp = c.bf16 ? nullptr : read_vector<float>(in, c.misaligned);
  const auto logp16 = c.bf16 ? read_vector<uint16_t>(in, c.misaligned) : nullptr;
  const auto old_logp16 = c.bf16 ? read_vector<uint16_t>(in, c.misaligned) : nullptr;
  const auto mask = read_vector<uint8_t>(in, c.misaligned);
  const auto advantage = read_vector<float>(in, c.misaligned);
  const auto token_weight = read_vector<float>(in, c.misaligned);
  cuda::LossArguments arguments = {pointer(logp),         pointer(old_logp),
                                   c.bf16 != 0,           pointer(mask),
                                   pointer(advantage),    c.advantage_is_per_token != 0,
                                   pointer(token_weight), pointer(carry),
                                   c.num_tokens,          packed};
  if (c.bf16) arguments.logp = pointer(logp16), arguments.old_logp = pointer(old_logp16);
  const auto f = [](double v) { return static_cast<float>(v); };
  const FipoParams params = {c.gamma, f(c.weight_low), f(c.weight_high), f(c.safety_threshold), f(c.dual_clip),
                             f(std::log(c.dual_clip)), f(c.clip_low), f(c.clip_high), c.paper != 0};
  if (c.kind == kAggregate) {
    Vector<float> aggregate(sequences, 0);
    Vector<int32_t> beyond_c(sequences, 0);
    cuda::future_kl_aggregate(arguments, params, {aggregate.data(), beyond_c.data()}, workspace, nullptr);
    aggregate.write(out);
    beyond_c.write(out);
    return;
  }
  Vector<double> loss(sequences, 0), statistics(kNumStatistics, 0);
  Vector<int64_t> counts(2 * sequences, 0);
  Vector<float> grad(tokens, c.misaligned), weight(tokens, c.misaligned);
  cuda::fipo_loss(arguments, params, {loss.data(), counts.data(), grad.data(), weight.data(), statistics.data()},
                  workspace, nullptr);
  loss.write(out);
  counts.write(out);
  grad.write(out);
  weight.write(out);
  statistics.write(out);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) emulator::fail("usage: run_cases SEED IN OUT");
  emulator::settings().seed = static_cast<unsigned>(std::atoi(argv[1]));
  std::FILE* in = std::fopen(argv[2], "rb");
  std::FILE* out = std::fopen(argv[3], "wb");
  int64_t capacity;
  if (!in || !out || !read(in, &capacity, 1)) emulator::fail("cannot open the files");
  std::vector<uint64_t> memory(cuda::workspace_size(capacity) / 8 + 1, 0);
  Case c;
  while (read(in, &c, 1)) run(c, {memory.data(), capacity}, in, out);
  std::fclose(in);
  std::fclose(out);
  return 0;
}
