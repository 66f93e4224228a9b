// Random numbers as a function of what they are for: Philox 4x32 with 10 rounds (Salmon, Moraes,
// Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3; 2011). There is no state, so that the
// numbers of a row depend neither on its place in the batch nor on threads, shards or the device.
#pragma once

#include "common/scalar.h"

namespace torch_routers {

struct RandomWords {
  std::uint32_t words[4];
};

TORCH_ROUTERS_HOST_DEVICE static inline RandomWords philox(std::uint64_t key, RandomWords counter) {
  auto low = static_cast<std::uint32_t>(key), high = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint32_t* c = counter.words;
    const std::uint64_t a = std::uint64_t{0xd2511f53u} * c[0];
    const std::uint64_t b = std::uint64_t{0xcd9e8d57u} * c[2];
    counter = {{static_cast<std::uint32_t>(b >> 32) ^ c[1] ^ low, static_cast<std::uint32_t>(b),
                static_cast<std::uint32_t>(a >> 32) ^ c[3] ^ high, static_cast<std::uint32_t>(a)}};
    low += 0x9e3779b9u;
    high += 0xbb67ae85u;
  }
  return counter;
}

// What numbers are for. Each purpose has numbers of its own, also under the same seed.
enum class Purpose : std::uint32_t { Capacity };

// The numbers of element (row, column) of a matrix whose rows are numbered over all batches.
TORCH_ROUTERS_HOST_DEVICE static inline RandomWords random_words(std::int64_t seed, Purpose purpose,
                                                                 std::int64_t row,
                                                                 std::int64_t column) {
  return philox(static_cast<std::uint64_t>(seed),
                {{static_cast<std::uint32_t>(row), static_cast<std::uint32_t>(row >> 32),
                  static_cast<std::uint32_t>(column), static_cast<std::uint32_t>(purpose)}});
}

}  // namespace torch_routers
