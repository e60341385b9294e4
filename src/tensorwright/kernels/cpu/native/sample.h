// From logits to tokens. runtime/sampling.py is the reference and states the order of the steps.
//
// Rows are shared by the workers. Nothing is sorted unless top-k, top-p or min-p ask for it, and then only the tokens
// that can matter: a histogram over the logits' leading bits finds them. Logits that are NaN are never chosen.
#pragma once
#include "functions.h"
#include "numbers.h"
#include "pool.h"

namespace tw {

struct sampling_job {
  const float* logits;
  int32_t rows, vocab;
  const tw_sampling* requests;
  int32_t* tokens;
  float* log_probs;
};

struct candidate {
  uint32_t key;  // ascending: the most probable first
  int32_t token;
};

constexpr int BLOCK = 1024;  // numbers summed in float32 before going into a double
constexpr int BINS = 2048;

// Lowest first for the highest float; NaN last.
TW_INLINE uint32_t descending_key(float value) {
  const uint32_t bits = bits_of_float(value);
  if (value != value) return 0xffffffffu;
  return bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
}

// The largest number's index, the first of equals; 0 if all are NaN or −infinity.
TW_INLINE int32_t argmax(const float* x, int32_t count) {
  floats top = broadcast(-INFINITY);
  int32_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const floats value = load(x + i);
    top = value > top ? value : top;
  }
  float largest = reduce_maximum(top);
  for (; i < count; ++i) largest = x[i] > largest ? x[i] : largest;
  for (i = 0; i < count; ++i)
    if (x[i] == largest) return i;
  return 0;
}

// Sum of e^((x − largest) / temperature) over at most BLOCK numbers.
TW_INLINE float block_weight(const float* x, int32_t count, float largest, float temperature) {
  floats total = {};
  for (int32_t i = 0; i < count; i += LANES) {
    const int lanes = count - i < LANES ? count - i : LANES;
    floats value = load(x + i, lanes);
    if (lanes < LANES)
      for (int j = lanes; j < LANES; ++j) value[j] = -INFINITY;
    total += exponential((value - largest) / temperature);
  }
  return reduce_add(total);
}

TW_INLINE double total_weight(const float* x, int32_t count, float largest, float temperature) {
  double total = 0.0;
  for (int32_t i = 0; i < count; i += BLOCK)
    total += block_weight(x + i, count - i < BLOCK ? count - i : BLOCK, largest, temperature);
  return total;
}

TW_INLINE float weight_of(float value, float largest, float temperature) {
  return value == value ? expf((value - largest) / temperature) : 0.0f;
}

// Bias, then repetition, presence and frequency penalties, onto a copy of the row.
TW_INLINE void adjust(float* row, int32_t vocab, const tw_sampling* request) {
  for (int32_t i = 0; i < request->num_biased; ++i)
    if (request->biased[i] >= 0 && request->biased[i] < vocab) row[request->biased[i]] += request->biases[i];
  for (int32_t i = 0; i < request->num_seen; ++i) {
    const int32_t token = request->seen[i];
    if (token < 0 || token >= vocab) continue;
    const float penalty = request->repetition_penalty;
    row[token] = row[token] > 0.0f ? row[token] / penalty : row[token] * penalty;
    if (request->counts[i] > 0)
      row[token] -= request->presence_penalty + request->frequency_penalty * (float)request->counts[i];
  }
}

// Stable radix sort by key: equal logits stay in the order of their ids. Gives the array that holds the result.
TW_INLINE candidate* sort_candidates(candidate* from, candidate* to, int32_t count) {
  if (count <= 64) {
    for (int32_t i = 1; i < count; ++i) {
      const candidate moving = from[i];
      int32_t j = i;
      for (; j > 0 && from[j - 1].key > moving.key; --j) from[j] = from[j - 1];
      from[j] = moving;
    }
    return from;
  }
  for (int shift = 0; shift < 33; shift += 11) {
    int32_t starts[BINS] = {};
    for (int32_t i = 0; i < count; ++i) ++starts[from[i].key >> shift & (BINS - 1)];
    int32_t start = 0;
    for (int bin = 0; bin < BINS; ++bin) {
      const int32_t size = starts[bin];
      starts[bin] = start;
      start += size;
    }
    for (int32_t i = 0; i < count; ++i) to[starts[from[i].key >> shift & (BINS - 1)]++] = from[i];
    candidate* swapped = from;
    from = to;
    to = swapped;
  }
  return from;
}

// The least probable bin (leading 11 bits of the key) that top-k, top-p or min-p can still reach.
TW_INLINE uint32_t last_bin(const float* row, int32_t vocab, const tw_sampling* request, float largest) {
  int32_t counts[BINS] = {};
  double weights[BINS] = {};
  const bool by_count = request->top_k > 0;
  double total = 0.0;
  for (int32_t i = 0; i < vocab; i += LANES) {
    const int lanes = vocab - i < LANES ? vocab - i : LANES;
    floats weight = {};
    if (!by_count) weight = exponential((load(row + i, lanes) - largest) / request->temperature);
    for (int j = 0; j < lanes; ++j) {
      const uint32_t bin = descending_key(row[i + j]) >> 21;
      ++counts[bin];
      weights[bin] += weight[j];
    }
  }
  for (int bin = 0; bin < BINS; ++bin) total += weights[bin];
  int64_t count = 0;
  double weight = 0.0;
  for (uint32_t bin = 0; bin < BINS - 1; ++bin) {
    count += counts[bin];
    weight += weights[bin];
    // Slightly more than top_p, so that rounding never cuts a token that the exact rule keeps.
    if (by_count ? count >= request->top_k : request->top_p < 1.0f && weight >= total * (request->top_p + 1e-6))
      return bin;
  }
  return BINS - 1;
}

// top-k, then min-p and top-p on what it leaves, then the inverse of the distribution function at `uniform`, in order
// of falling probability.
TW_INLINE int32_t sample_sorted(const float* row, int32_t vocab, const tw_sampling* request, float largest,
                                candidate* memory) {
  const uint32_t bin = last_bin(row, vocab, request, largest);
  // Far below min_p, tokens need no sorting; with top-k they still count in the total that top-p is a share of.
  const bool early = request->min_p > 0.0f && request->top_k <= 0;
  const float slack = 1e-3f * (1.0f + fabsf(largest));
  const float least = early ? largest + request->temperature * logf(request->min_p) - slack : -INFINITY;
  int32_t count = 0;
  for (int32_t i = 0; i < vocab; ++i) {
    const uint32_t key = descending_key(row[i]);
    if (key >> 21 <= bin && row[i] >= least) memory[count++] = {key, i};
  }
  const candidate* sorted = sort_candidates(memory, memory + vocab, count);
  if (request->top_k > 0 && count > request->top_k) count = request->top_k;
  double total = 0.0;
  for (int32_t i = 0; i < count; ++i) total += weight_of(row[sorted[i].token], largest, request->temperature);
  // Without top-k, tokens that were left out count in the total that top-p is a share of.
  if (request->top_k <= 0 && request->top_p < 1.0f) total = total_weight(row, vocab, largest, request->temperature);
  double kept = 0.0;
  int32_t length = 0;
  while (length < count) {
    const float weight = weight_of(row[sorted[length].token], largest, request->temperature);
    if (length > 0 && (weight < request->min_p || (request->top_p < 1.0f && kept >= request->top_p * total))) break;
    kept += weight;
    ++length;
  }
  double sum = 0.0;
  for (int32_t i = 0; i + 1 < length; ++i) {
    sum += weight_of(row[sorted[i].token], largest, request->temperature);
    if (sum > request->uniform * kept) return sorted[i].token;
  }
  return sorted[length > 0 ? length - 1 : 0].token;
}

// The inverse of the distribution function at `uniform`, in order of token ids: no sort.
TW_INLINE int32_t sample_all(const float* row, int32_t vocab, const tw_sampling* request, float largest) {
  const double goal = request->uniform * total_weight(row, vocab, largest, request->temperature);
  double sum = 0.0;
  int32_t chosen = 0;
  for (int32_t i = 0; i < vocab; i += BLOCK) {
    const int32_t end = vocab - i < BLOCK ? vocab : i + BLOCK;
    const double block = block_weight(row + i, end - i, largest, request->temperature);
    if (sum + block <= goal && end < vocab) {
      sum += block;
      continue;
    }
    for (int32_t j = i; j < end; ++j) {
      const float weight = weight_of(row[j], largest, request->temperature);
      if (weight > 0.0f) chosen = j;
      sum += weight;
      if (weight > 0.0f && sum > goal) return j;
    }
  }
  return chosen;
}

TW_INLINE int32_t choose(const float* row, int32_t vocab, const tw_sampling* request, candidate* memory) {
  const int32_t best = argmax(row, vocab);
  const float largest = row[best];
  if (!(request->temperature > 0.0f) || !(fabsf(largest) < INFINITY)) return best;
  if (request->top_k > 0 || request->top_p < 1.0f || request->min_p > 0.0f)
    return sample_sorted(row, vocab, request, largest, memory);
  return sample_all(row, vocab, request, largest);
}

inline void sample_rows(void* argument, const tw_worker* worker) {
  const sampling_job* job = static_cast<const sampling_job*>(argument);
  const int32_t vocab = job->vocab;
  const size_t row_bytes = ((size_t)vocab * sizeof(float) + 63) / 64 * 64;
  char* memory = (char*)tw_worker_memory(worker, row_bytes + 2 * sizeof(candidate) * (size_t)vocab);
  for (int32_t i = tw_take(worker); i < job->rows; i = tw_take(worker)) {
    const float* logits = job->logits + (int64_t)i * vocab;
    const tw_sampling* request = job->requests + i;
    const float* row = logits;
    if (!memory) {
      job->tokens[i] = -1;  // out of memory: the runtime must look
      continue;
    }
    if (request->num_biased > 0 || request->num_seen > 0) {
      memcpy(memory, logits, (size_t)vocab * sizeof(float));
      adjust((float*)memory, vocab, request);
      row = (const float*)memory;
    }
    const int32_t token = choose(row, vocab, request, (candidate*)(memory + row_bytes));
    const float largest = logits[argmax(logits, vocab)];
    job->tokens[i] = token;
    job->log_probs[i] = logits[token] - largest - (float)log(total_weight(logits, vocab, largest, 1.0f));
  }
}

}  // namespace tw
