/* Strings by their beginnings: a double array over bytes. */
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace poet::text {

class Trie {
 public:
  static constexpr std::uint32_t root = 0;
  static constexpr std::int32_t no_value = -1;

  /* Different keys, none empty, with values of at least 0. */
  explicit Trie(std::vector<std::pair<std::string, std::int32_t>> keys);

  /* Go on from `node` by one byte; false if no key begins so. */
  bool step(std::uint32_t* node, unsigned char byte) const {
    const std::uint32_t next = units_[*node].base ^ byte;
    if (units_[next].parent != *node) return false;
    *node = next;
    return true;
  }

  /* Value of the key that ends at a node, or no_value. */
  std::int32_t value(std::uint32_t node) const { return values_[node]; }

 private:
  static constexpr std::uint32_t searched = 16 * 256; /* places from the end among which one is looked for */
  static constexpr std::uint32_t nobody = ~std::uint32_t{0}, nothing = nobody - 1; /* parent of what is free, and of the root */

  /* The child of a node by a byte is at base ^ byte, if that names the node as its parent. */
  struct Unit {
    std::uint32_t base = 0;
    std::uint32_t parent = nobody;
  };
  using Keys = std::vector<std::pair<std::string, std::int32_t>>;

  /* Keys [begin, end), which are alike up to `depth` and lead to `node`. */
  struct Range {
    std::size_t begin, end, depth;
    std::uint32_t node;
  };

  void add(const Keys& keys, const Range& range, std::vector<Range>* waiting);
  std::uint32_t base_for(const std::vector<unsigned char>& bytes);
  void grow(std::uint32_t last);

  std::vector<Unit> units_;
  std::vector<std::int32_t> values_;
  std::uint32_t first_free_ = 1;
};

}  // namespace poet::text
