#include "trie.h"

#include <algorithm>

namespace poet::text {

Trie::Trie(std::vector<std::pair<std::string, std::int32_t>> keys) {
  std::sort(keys.begin(), keys.end());
  grow(root);
  units_[root].parent = nothing;
  std::vector<Range> waiting{{0, keys.size(), 0, root}}; /* no recursion: keys have up to 8,000 bytes */
  while (!waiting.empty()) {
    const Range range = waiting.back();
    waiting.pop_back();
    add(keys, range, &waiting);
  }
}

/* Add the next bytes of a range's keys, and the ranges that they divide it into. */
void Trie::add(const Keys& keys, const Range& range, std::vector<Range>* waiting) {
  const auto [first, end, depth, node] = range;
  std::size_t begin = first;
  if (begin < end && keys[begin].first.size() == depth) values_[node] = keys[begin++].second;
  std::vector<unsigned char> bytes;
  std::vector<std::size_t> starts;
  for (std::size_t i = begin; i < end; ++i) {
    const auto byte = static_cast<unsigned char>(keys[i].first[depth]);
    if (bytes.empty() || bytes.back() != byte) {
      bytes.push_back(byte);
      starts.push_back(i);
    }
  }
  starts.push_back(end);
  if (bytes.empty()) return;
  const std::uint32_t base = base_for(bytes);
  units_[node].base = base;
  for (const unsigned char byte : bytes) units_[base ^ byte].parent = node;
  for (std::size_t i = bytes.size(); i-- > 0;) waiting->push_back({starts[i], starts[i + 1], depth + 1, base ^ bytes[i]});
}

/* A base at which the places of all these bytes are free: the first one in the last blocks, since holes in older ones are seldom filled. */
std::uint32_t Trie::base_for(const std::vector<unsigned char>& bytes) {
  while (first_free_ < units_.size() && units_[first_free_].parent != nobody) ++first_free_;
  const auto size = static_cast<std::uint32_t>(units_.size());
  for (std::uint32_t place = std::max(first_free_, size > searched ? size - searched : 0);; ++place) {
    grow(place | 0xff);
    const std::uint32_t base = place ^ bytes[0];
    if (std::all_of(bytes.begin(), bytes.end(), [&](unsigned char byte) { return units_[base ^ byte].parent == nobody; })) return base;
  }
}

/* Whole blocks of 256, so that base ^ byte is always inside. */
void Trie::grow(std::uint32_t last) {
  if (last < units_.size()) return;
  units_.resize((static_cast<std::size_t>(last) | 0xff) + 1);
  values_.resize(units_.size(), no_value);
}

}  // namespace poet::text
