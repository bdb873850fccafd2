// Reads memory and does nothing else: the limit that no Gramian kernel can beat. Built by pairwise_cpu.py.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

using Words [[gnu::vector_size(64)]] = uint64_t;

__attribute__((target_clones("avx512f", "avx2", "default"))) static uint64_t read_run(const char* from, size_t bytes,
                                                                                    size_t ahead) {
  Words a{}, b{}, c{}, d{};
  size_t at = 0;
  for (; at + 4 * sizeof(Words) <= bytes; at += 4 * sizeof(Words)) {
    // The processor alone stops asking at the end of each page.
    for (size_t line = 0; line < 4 && ahead > 0; ++line) __builtin_prefetch(from + at + ahead + line * sizeof(Words));
    Words v[4];
    __builtin_memcpy(v, from + at, sizeof v);
    a ^= v[0], b ^= v[1], c ^= v[2], d ^= v[3];
  }
  a ^= b ^ c ^ d;
  uint64_t out = 0;
  for (; at < bytes; ++at) out ^= static_cast<unsigned char>(from[at]);
  for (size_t lane = 0; lane < sizeof(Words) / sizeof(uint64_t); ++lane) out ^= a[lane];
  return out;
}

// Reads `count` buffers end to end with `threads` threads, each its share of every buffer, asking for memory `ahead`
// bytes before it is needed (0: leaving that to the processor).
extern "C" uint64_t read_all(const char* const* buffers, const size_t* bytes, size_t count, int threads,
                             size_t ahead) {
  std::vector<uint64_t> seen(threads);
  const auto work = [&](int t) {
    for (size_t i = 0; i < count; ++i) {
      const size_t begin = bytes[i] * t / threads, end = bytes[i] * (t + 1) / threads;
      seen[t] ^= read_run(buffers[i] + begin, end - begin, ahead);
    }
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
  work(0);
  for (std::thread& other : others) other.join();
  uint64_t out = 0;
  for (uint64_t s : seen) out ^= s;
  return out;
}
