/* A cache of fixed size from short words to their ids: one cache line an entry, two entries a set, the older one is replaced. */
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <utility>
#include <vector>

namespace poet::text {

class WordCache {
 public:
  static constexpr std::size_t longest = 31; /* bytes of a word */
  static constexpr std::size_t most = 7;     /* ids of a word */

  using Key = std::array<char, longest + 1>; /* a word, zeros, and in the last byte its length, which is 0 for no word */

  struct alignas(64) Entry {
    Key key{};
    std::int32_t count = 0;
    std::array<std::int32_t, most> ids{};
  };

  WordCache() : entries_(std::size_t{1} << bits) {}

  /* The entry of a word of at most `longest` bytes; or, with *found false, one that holds that word but no ids yet. */
  Entry& look_up(std::string_view word, bool* found) {
    Key key{};
    std::memcpy(key.data(), word.data(), word.size());
    key[longest] = static_cast<char>(word.size());
    Entry* set = &entries_[2 * set_of(key)];
    *found = true;
    if (same(set[0], key)) return set[0];
    if (same(set[1], key)) {
      std::swap(set[0], set[1]);
      return set[0];
    }
    *found = false;
    set[1] = set[0];
    set[0].key = key;
    set[0].count = 0;
    return set[0];
  }

 private:
  static constexpr int bits = 16;

  static bool same(const Entry& entry, const Key& key) { return std::memcmp(entry.key.data(), key.data(), sizeof key) == 0; }

  static std::size_t set_of(const Key& key) {
    std::uint64_t parts[4];
    std::memcpy(parts, key.data(), sizeof parts);
    std::uint64_t hash = (parts[0] ^ parts[3]) * 0x9e3779b97f4a7c15u;
    hash = (hash ^ hash >> 29 ^ parts[1]) * 0xbf58476d1ce4e5b9u;
    hash = (hash ^ hash >> 32 ^ parts[2]) * 0x94d049bb133111ebu;
    return static_cast<std::size_t>(hash >> (64 - (bits - 1)));
  }

  std::vector<Entry> entries_;
};

}  // namespace poet::text
