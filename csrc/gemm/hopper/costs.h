// What the tiles of the Hopper path take on one H200. docs/laboratory.md says what the numbers are
// fitted to.
#pragma once

#include "gemm/hopper/tiles.h"
#include "gemm/w4a8_schedule.h"

namespace qoq::w4a8 {

template <class Tile>
inline constexpr Cost kCost = {};
template <>
inline constexpr Cost kCost<Tile8> = {400, 300, 1100};
template <>
inline constexpr Cost kCost<Tile16> = {400, 300, 1500};
template <>
inline constexpr Cost kCost<Tile32> = {430, 500, 2000};
template <>
inline constexpr Cost kCost<Tile64> = {500, 1100, 3200};
template <>
inline constexpr Cost kCost<Tile128> = {374, 1200, 4300};
template <>
inline constexpr Cost kCost<Tile192> = {547, 1400, 4500};
template <>
inline constexpr Cost kCost<Tile128Wide> = {645, 3500, 9000};
template <>
inline constexpr Cost kCost<Tile256> = {635, 2500, 15000};
template <>
inline constexpr Cost kCost<Inputs64> = {630, 1100, 950};
template <>
inline constexpr Cost kCost<Inputs64Deep> = {475, 1100, 1900};
template <>
inline constexpr Cost kCost<Inputs128> = {350, 1400, 3200};
template <>
inline constexpr Cost kCost<Inputs128Pair> = {420, 2600, 4000};

template <>
inline constexpr Cost kCost<Nested16> = {560, 300, 1500};
template <>
inline constexpr Cost kCost<Nested64> = {700, 1100, 3200};
template <>
inline constexpr Cost kCost<Nested128> = {478, 1200, 4300};
template <>
inline constexpr Cost kCost<Nested192> = {718, 1400, 6000};
template <>
inline constexpr Cost kCost<Nested256> = {800, 2500, 14000};

}  // namespace qoq::w4a8
