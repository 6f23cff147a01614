// Copies by threads, for the model of hopper.h; takes the place of csrc/common/cp_async.cuh.
//
// A copy happens at once or when its group is waited for, by chance: so what is overwritten too
// early and what is read too early both show.
#pragma once

#include "ptx.cuh"  // hopper.h

namespace model {

inline void copy_16(uint32_t destination, const char* source) {
  check(destination % 16 == 0, "an unaligned copy");
  Copy copy{destination, {}};
  if (source != nullptr) std::memcpy(copy.bytes.data(), source, 16);
  if (random_order() % 2 == 0) {
    std::memcpy(shared_pointer(destination, 16), copy.bytes.data(), 16);
  } else {
    self->copies.back().push_back(copy);
  }
  yield_perhaps(64);
}

}  // namespace model

namespace qoq::ptx {

inline void cp_async_16(uint32_t destination, const void* source) {
  const auto* bytes = static_cast<const uint8_t*>(source);
  check(reinterpret_cast<uintptr_t>(source) % 16 == 0, "an unaligned copy");
  check(bytes >= bulk_memory.data() && bytes + 16 <= bulk_memory.data() + bulk_memory.size(),
        "a copy of weights from outside");
  copy_16(destination, static_cast<const char*>(source));
}
inline void cp_async_16_or_zeros(uint32_t destination, const void* source, bool is_there) {
  if (!is_there) return copy_16(destination, nullptr);
  const auto* bytes = static_cast<const uint8_t*>(source);
  const bool is_weight =
      bytes >= bulk_memory.data() && bytes + 16 <= bulk_memory.data() + bulk_memory.size();
  if (is_weight) return cp_async_16(destination, source);
  check_previous_kernel();
  check(bytes >= previous_memory.data() &&
            bytes + 16 <= previous_memory.data() + previous_memory.size(),
        "a copy from outside");
  copy_16(destination, static_cast<const char*>(source));
}
inline void cp_async_commit_group() { self->copies.emplace_back(); }
template <int kPending>
void cp_async_wait_group() {
  auto& groups = self->copies;
  for (; groups.size() > kPending + 1; groups.pop_front())
    for (const Copy& copy : groups.front())
      std::memcpy(shared_pointer(copy.destination, 16), copy.bytes.data(), 16);
}

inline void cp_async_wait_all() {
  check(self->copies.size() == 1, "copies of a group and of a barrier");
  wait_until([] {
    make_some_copies();
    return std::ranges::none_of(self->block->arrivals,
                                [](const Arrival& one) { return one.thread == self; });
  });
}
// The barrier's phase is complete only when the copies before it are made, which happens by chance
// while somebody waits for it.
inline void cp_async_mbarrier_arrive(uint32_t barrier) {
  check(self->copies.size() == 1, "copies of a group and of a barrier");
  self->block->arrivals.push_back({self, barrier, std::move(self->copies.back())});
  self->copies.back().clear();
  yield_perhaps();
}

}  // namespace qoq::ptx
