// Threads that share out work of microseconds, as a block of a model is made of.
//
// What it is: `share`, by which threads take parts of what is left until nothing is, and `Team`, which keeps them awake and
// looking for the next such work while one of them does what lies between; so long they ask the memory for the weights they will
// read. Opening a parallel region for each costs 2 to 4 microseconds, a small model's product as much; a word between two awake
// threads a tenth of that. (Three times as much where they are on two dies, which is also when they have the memory of both: what
// one has written and the other reads, and what both have read and one writes, is to be kept small.) A team's thread that comes
// late to a work, because another program holds it up, is not waited for there. What it is not: threads of our own. They are
// PyTorch's, as many as torch.set_num_threads says, and outside a team each work is a parallel region.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

// What is left of a thread's part of a work.
struct alignas(64) Part { std::atomic<int64_t> next; int64_t end; };

class Team {
  // Odd while there is work. Who sees that says so in `inside` and looks again: either it finds that the work has ended, or who
  // ended it finds somebody inside.
  alignas(64) std::atomic<int64_t> turn{0};               // a cache line of what one thread writes and all look at
  std::atomic<bool> over{false};
  void (*call)(const void*, int64_t) = nullptr;
  const void* work = nullptr;
  alignas(64) std::atomic<int64_t> inside{0};

  // What each thread reads after the work at hand, and after the next one.
  struct alignas(64) Soon { std::atomic<const char*> at{nullptr}; };
  alignas(64) std::vector<Soon> soon{size_t(at::get_num_threads())};
  std::vector<const char*> then;
  static constexpr int64_t MOST = 1 << 18;                // bytes that are asked for: a part of a second cache

  // Between two looks. Who has looked in vain for some 20 microseconds lets others run: one of them may be who it waits for.
  static void breathe(int64_t looks) {
#ifdef __x86_64__
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");            // what "yield" does there is nothing
#endif
    if (looks % 1024 == 0) std::this_thread::yield();
  }

  void stand_by(int64_t me) {
    const char *given = nullptr, *asked = nullptr, *last = nullptr;
    for (int64_t seen = 0, looks = 1; !over.load(std::memory_order_relaxed); breathe(looks++)) {
      const int64_t now = turn;
      if (now % 2 == 0 || now == seen) {
        const char* const at = soon[me].at.load(std::memory_order_relaxed);
        if (at != given) given = asked = at, last = at + MOST;
        for (int line = 0; line < 4 && asked < last; line++, asked += 64) __builtin_prefetch(asked, 0, 2);
        continue;
      }
      inside++;
      struct Leave { std::atomic<int64_t>& inside; ~Leave() { inside--; } } leave{inside};      // also by an exception
      if (turn == now) call(work, me);
      seen = now, looks = 1;
    }
  }

 public:
  std::vector<Part> parts{size_t(at::get_num_threads())};         // of the work at hand

  // f(team) on this thread, with all others standing by for what it shares out; f(null) where there are no others.
  template <class F> static void gather(const F& f) {
    if (at::get_num_threads() == 1 || at::in_parallel_region()) return f(nullptr);
    Team team;
    at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t me, int64_t) {
      if (me) return team.stand_by(me);
      struct End { std::atomic<bool>& over; ~End() { over = true; } } end{team.over};
      f(&team);
    });
  }

  int64_t size() const { return parts.size(); }

  // What threads read after the next work, begin(thread): they ask for it while they wait, else the memory would rest.
  template <class F> void will_read(const F& begin) {
    then.resize(size());
    for (int64_t t = 1; t < size(); t++) then[t] = begin(t);
  }

  // f(thread) on all threads that are free, 0 being this one.
  template <class F> void run(const F& f) {
    call = [](const void* g, int64_t me) { (*(const F*)g)(me); }, work = &f;
    for (size_t t = 1; t < then.size(); t++) soon[t].at.store(then[t], std::memory_order_relaxed);
    then.clear();
    turn++;
    struct End {
      Team& team;
      ~End() {
        team.turn++;
        for (int64_t looks = 1; team.inside; looks++) breathe(looks);
      }
    } end{*this};
    f(0);
  }
};

// f(begin, end) on all of 0 ... n - 1, by as many threads as there are grains. Each takes what is its own, which then is in its
// cache the next time too, in smaller and smaller parts, and at last of what others have left: all end together, also where
// another program holds up one of them.
template <class F> void share(Team* team, int64_t n, int64_t grain, const F& f) {
  const int64_t threads = std::min<int64_t>(team ? team->size() : at::get_num_threads(), (n + grain - 1) / grain);
  if (threads < 2) return f(0, n);
  std::vector<Part> here(team ? 0 : threads);
  std::vector<Part>& parts = team ? team->parts : here;
  for (int64_t t = 0; t < threads; t++) parts[t].next = t * n / threads, parts[t].end = (t + 1) * n / threads;
  const auto take = [&](int64_t me) {
    for (int64_t t = me; t < me + threads && me < threads; t++) {
      Part& part = parts[t % threads];
      for (int64_t at = part.next, end; at < part.end;) {
        end = std::min(part.end, at + std::max(grain, (part.end - at) / 2));
        if (part.next.compare_exchange_weak(at, end)) f(at, end), at = part.next;
      }
    }
  };
  if (team) team->run(take);
  else at::parallel_for(0, threads, 1, [&](int64_t me, int64_t) { take(me); });
}
