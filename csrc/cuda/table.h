// What the fast kernels read: a table of pointers that travels by value in the parameters of the launch, so that
// nothing is copied to the device beforehand and a CUDA graph can capture it.
//
// The parameters of one dtype are cut into chunks, what a block reads at a time, and the chunks of a launch are dealt
// to slots, one block each (or a few blocks, for different pairs of tasks), in contiguous ranges.
#pragma once

#include <cstdint>

#include "../float_types.h"

namespace gradstats::cuda {

template <int kRows, int kSegments>
struct Table {
  static constexpr int kMaxRows = kRows, kMaxSegments = kSegments;

  const void* rows[kRows];             // by segment: the tasks', null for zeros, and room for one beside them
  int64_t numel[kSegments];
  int32_t first_chunk[kSegments + 1];  // of each segment, and their number
  bool aligned[kSegments];             // whether all rows start at 16-byte boundaries
  const double* weights;               // of the tasks, where their gradients are combined
  int32_t num_tasks;
  int32_t num_segments;
  int32_t num_slots;                   // the same for all launches
  bool add;                            // to what earlier launches have written
};

// Every launch copies all of its parameters: so a small table for small problems, and one as large as CUDA takes
// (32,764 bytes from 12.1 on, 4,096 before) for long lists.
using SmallTable = Table<352, 48>;
using LargeTable = Table<3000, 640>;
static_assert(sizeof(SmallTable) + sizeof(double*) <= 4096 && sizeof(LargeTable) + sizeof(double*) <= 32764);

// Where the sum of tasks i <= j stands among those of all pairs.
GRADSTATS_HOST_DEVICE inline int64_t pair_index(int64_t i, int64_t j, int64_t num_tasks) {
  return i * (2 * num_tasks - i - 1) / 2 + j;
}

inline int64_t num_pairs(int64_t num_tasks) { return num_tasks * (num_tasks + 1) / 2; }

// Hands in what slot `slot` of a launch has for tasks i <= j. `partial` has all slots of one pair side by side.
template <class Launch>
GRADSTATS_HOST_DEVICE void write_sum(const Launch& launch, double* partial, int i, int j, int slot, double sum) {
  double& out = partial[pair_index(i, j, launch.num_tasks) * launch.num_slots + slot];
  out = launch.add ? out + sum : sum;
}

// Walks through the chunks of a slot.
struct Chunk {
  int index, end;    // among those of the launch
  int segment;
  int64_t position;  // of its first entry in the segment, in chunks
};

template <class Table>
GRADSTATS_HOST_DEVICE Chunk first_chunk_of(const Table& table, int slot) {
  const int64_t chunks = table.first_chunk[table.num_segments];
  Chunk chunk{static_cast<int>(slot * chunks / table.num_slots),
              static_cast<int>((slot + 1) * chunks / table.num_slots)};
  int low = 0, high = table.num_segments;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (chunk.index < table.first_chunk[middle] ? high : low) = middle;
  }
  chunk.segment = low;
  chunk.position = chunk.index - table.first_chunk[low];
  return chunk;
}

// Whether the next chunk is in another segment.
template <class Table>
GRADSTATS_HOST_DEVICE bool advance(const Table& table, Chunk& chunk) {
  ++chunk.index;
  ++chunk.position;
  if (chunk.index < table.first_chunk[chunk.segment + 1]) return false;
  ++chunk.segment;  // none is empty
  chunk.position = 0;
  return true;
}

// The row of a task in a segment; null, zeros, for tasks that there are not.
template <class In, class Table>
GRADSTATS_HOST_DEVICE const In* row_of(const Table& table, int segment, int task) {
  return task < table.num_tasks ? static_cast<const In*>(table.rows[segment * (table.num_tasks + 1) + task]) : nullptr;
}

// What the row beside those of the tasks is: what products of entries are weighed by, or what gradients are combined to.
enum class Beside : uint8_t { nothing, metric, combination };

template <class In, class Table>
GRADSTATS_HOST_DEVICE In* row_beside(const Table& table, int segment) {
  return static_cast<In*>(const_cast<void*>(table.rows[segment * (table.num_tasks + 1) + table.num_tasks]));
}

}  // namespace gradstats::cuda
