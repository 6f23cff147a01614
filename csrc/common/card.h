// What the host asks of a GPU, once for each.
#pragma once

namespace qoq {

inline constexpr int kMaxDevices = 64;

struct Card {
  int capability;       // 10 * major + minor
  int multiprocessors;  // SMs
  int shared_bytes;     // of shared memory that a block can have
  int multiprocessor_shared_bytes;
  float clock;      // GHz
  float bandwidth;  // GB/s of its memory, or 0 where the driver does not say
};

const Card& card_of(int device);

}  // namespace qoq
