// Runs the kernels of an engine on vectors from stdin and writes to stdout what they computed. Knows abi.h and the
// stream that test_vectors.py writes, and no op. Compiled with -DTW_KERNELS=tw_kernel_0,tw_kernel_1,...
//
// Usage: driver WORKERS < vectors > results. A blob is its size in bytes (int64, -1: a null pointer), then the bytes.
// A case is a kernel's index (int32; -1: sampling, -2: the end) and what `run_kernel` or `run_sampling` reads.
#include <stdio.h>

#include "engine.cpp"

namespace {

const tw_kernel KERNELS[] = {TW_KERNELS};
constexpr int32_t SAMPLING = -1, END = -2;
constexpr int MAX_BLOBS = 8;
constexpr int64_t GUARD_BYTES = 64;
constexpr unsigned char GUARD = 0xA5;

[[noreturn]] void fail(const char* message) {
  fprintf(stderr, "driver: %s\n", message);
  exit(1);
}

void read_bytes(void* to, int64_t count) {
  if (fread(to, 1, (size_t)count, stdin) != (size_t)count) fail("the vectors end early");
}

template <class T>
T read_one() {
  T value;
  read_bytes(&value, sizeof value);
  return value;
}

// Aligned bytes with a guard behind them; never freed, since the vectors are small and the process is short.
struct blob {
  int64_t size;
  unsigned char* data;

  template <class T>
  T* as() const { return (T*)data; }
  void check() const {
    for (int64_t i = 0; data && i < GUARD_BYTES; ++i)
      if (data[size + i] != GUARD) fail("a kernel wrote behind its memory");
  }
};

blob make_blob(int64_t size) {
  unsigned char* data = (unsigned char*)aligned_alloc(64, (size_t)((size + 63) / 64 * 64 + GUARD_BYTES));
  if (!data) fail("no memory");
  memset(data, 0, (size_t)size);
  memset(data + size, GUARD, GUARD_BYTES);
  return {size, data};
}

blob read_blob() {
  const int64_t size = read_one<int64_t>();
  if (size < 0) return {0, nullptr};
  blob result = make_blob(size);
  read_bytes(result.data, size);
  return result;
}

int read_blobs(blob* blobs) {
  const int32_t count = read_one<int32_t>();
  if (count < 0 || count > MAX_BLOBS) fail("too many arrays in a case");
  for (int i = 0; i < count; ++i) blobs[i] = read_blob();
  return count;
}

void write_blob(const blob& result) {
  result.check();
  if (fwrite(result.data, 1, (size_t)result.size, stdout) != (size_t)result.size) fail("the results cannot be written");
}

// tw_run with null pointers, the scratch's size, tw_step's rows, then arrays: the batch's eight, buffers, weights.
// Writes all buffers.
void run_kernel(tw_pool* pool, int32_t kernel) {
  if (kernel < 0 || kernel >= (int32_t)(sizeof KERNELS / sizeof *KERNELS)) fail("no such kernel");
  tw_run run = read_one<tw_run>();
  const blob scratch = make_blob(read_one<int64_t>());
  const int32_t rows = read_one<int32_t>();
  blob batch[MAX_BLOBS], buffers[MAX_BLOBS], weights[MAX_BLOBS];
  if (read_blobs(batch) != 8) fail("a batch has eight arrays");
  const int num_buffers = read_blobs(buffers), num_weights = read_blobs(weights);
  const int32_t** fields[] = {&run.token_ids,     &run.positions,  &run.slots,        &run.query_starts,
                              &run.query_lengths, &run.kv_lengths, &run.block_tables, &run.output_rows};
  for (int i = 0; i < 8; ++i) *fields[i] = batch[i].as<int32_t>();
  run.scratch = scratch.data;
  void* buffer_pointers[MAX_BLOBS];
  const void* weight_pointers[MAX_BLOBS];
  for (int i = 0; i < num_buffers; ++i) buffer_pointers[i] = buffers[i].data;
  for (int i = 0; i < num_weights; ++i) weight_pointers[i] = weights[i].data;
  const tw_step step{KERNELS[kernel], buffer_pointers, weight_pointers, rows, 0};
  tw_execute(pool, &step, 1, &run, nullptr);
  scratch.check();
  for (int i = 0; i < num_buffers; ++i) write_blob(buffers[i]);
}

// Logits [rows, vocab], the requests with null pointers, then each request's seen, counts, biased and biases.
// Writes tokens and log probabilities.
void run_sampling(tw_pool* pool) {
  const int32_t rows = read_one<int32_t>(), vocab = read_one<int32_t>();
  const blob logits = read_blob(), requests = read_blob();
  if (requests.size != rows * (int64_t)sizeof(tw_sampling)) fail("tw_sampling has another size here");
  for (int32_t i = 0; i < rows; ++i) {
    tw_sampling* request = requests.as<tw_sampling>() + i;
    request->seen = read_blob().as<int32_t>();
    request->counts = read_blob().as<int32_t>();
    request->biased = read_blob().as<int32_t>();
    request->biases = read_blob().as<float>();
  }
  const blob tokens = make_blob(4 * rows), log_probs = make_blob(4 * rows);
  tw_sample(pool, logits.as<float>(), rows, vocab, requests.as<tw_sampling>(), tokens.as<int32_t>(),
            log_probs.as<float>());
  write_blob(tokens);
  write_blob(log_probs);
}

}  // namespace

int main(int argc, char** argv) {
  tw_pool* pool = argc == 2 ? tw_pool_create(atoi(argv[1])) : nullptr;
  if (!pool) fail("usage: driver WORKERS < vectors > results");
  for (int32_t kernel = read_one<int32_t>(); kernel != END; kernel = read_one<int32_t>()) {
    if (kernel == SAMPLING) run_sampling(pool);
    else run_kernel(pool, kernel);
  }
  if (fflush(stdout)) fail("the results cannot be written");
  tw_pool_destroy(pool);
  return 0;
}
