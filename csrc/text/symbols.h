/* User-defined symbols: strings that a model always keeps whole. */
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace poet::text {

class Symbols {
 public:
  void add(std::string symbol, std::int32_t id) {
    auto& lengths = lengths_[static_cast<unsigned char>(symbol[0])];
    if (std::find(lengths.begin(), lengths.end(), symbol.size()) == lengths.end()) lengths.push_back(symbol.size());
    std::sort(lengths.begin(), lengths.end(), std::greater<>());
    ids_.emplace(std::move(symbol), id);
  }

  bool empty() const { return ids_.empty(); }

  /* Length of the longest symbol that the text begins with, 0 for none; the text has at least one byte. */
  std::size_t match(std::string_view text, std::int32_t* id) const {
    for (const std::size_t length : lengths_[static_cast<unsigned char>(text[0])]) {
      if (length > text.size()) continue;
      const auto found = ids_.find(text.substr(0, length));
      if (found != ids_.end()) {
        *id = found->second;
        return length;
      }
    }
    return 0;
  }

 private:
  struct Hash : std::hash<std::string_view> {
    using is_transparent = void;
  };
  std::unordered_map<std::string, std::int32_t, Hash, std::equal_to<>> ids_;
  std::array<std::vector<std::size_t>, 256> lengths_; /* of the symbols that begin with a byte, longest first */
};

}  // namespace poet::text
