/* Buffers of large results, kept for the next result of that size. The system maps large buffers afresh every time, and clears them page by
 * page: a sixth of the time of the product that fills them. */
#pragma once

#include <cstddef>

namespace poet {

/* Buffers of less than this are not worth keeping. */
constexpr std::size_t pooled_bytes = 2 << 20;

/* A buffer of at least `bytes` bytes, aligned to a huge page, or nullptr if memory ran out. Contents are undefined. */
void* take_output(std::size_t bytes);

/* Hand a buffer of take_output back. At most `idle_limit` bytes wait for their next use; beyond that they go back to the system. Buffers may
 * be handed back by any thread. */
constexpr std::size_t idle_limit = std::size_t{1} << 30;
void give_output_back(void* buffer);

}  // namespace poet
