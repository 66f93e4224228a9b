// Runs ranges of a kernel on threads of its own, all at once, as the operators do on torch's.
#pragma once

#include <cstdint>
#include <latch>
#include <thread>
#include <vector>

namespace torch_routers {

// body(begin, end) on each of `threads` threads, over disjoint ranges of [0, count).
template <class Body> void run_on_threads(int threads, std::int64_t count, const Body& body) {
  std::latch all_are_there(threads);
  std::vector<std::thread> running;
  for (int i = 0; i < threads; ++i)
    running.emplace_back([&, i] {
      all_are_there.arrive_and_wait();
      body(count * i / threads, count * (i + 1) / threads);
    });
  for (std::thread& thread : running) thread.join();
}

}  // namespace torch_routers
