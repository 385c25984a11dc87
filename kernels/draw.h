// The next id of a row of logits: what sampling.py does with a dozen of PyTorch's operators, which take as long as a small
// model's step.
//
// What it is: the likeliest ids of a vocabulary, the filters and the draw, the same noise giving the same id (but among equals,
// which have an order here, their ids'). What it is not: a source of noise, which comes from the row's own generator; nor all of
// sampling.py, which says what the settings mean and keeps those without a top_k.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "vectors.h"

struct Settings {
  int64_t top_k;                      // fewer than there are logits
  float temperature, top_p, min_p, penalty;
};

using Choice = std::pair<float, int64_t>;                 // a logit and its id
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// The largest of x [n]; NaN is passed over.
inline float largest_of(const float* x, int64_t n) {
  floats most = floats{} + LOWEST;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const floats v = load16(x + i);
    most = v > most ? v : most;
  }
  float largest = *std::max_element((float*)&most, (float*)&most + LANES);
  for (; i < n; i++) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

// Where x [V] is largest; the first of several. (PyTorch's compares one by one.)
inline int64_t first_largest(const float* x, int64_t V) {
  constexpr int64_t SOME = 4096;      // only where the largest is are places looked at
  float largest = LOWEST;
  int64_t first = 0;
  for (int64_t i = 0; i < V; i += SOME)
    if (const float here = largest_of(x + i, std::min(SOME, V - i)); here > largest) largest = here, first = i;
  return std::min<int64_t>(std::find(x + first, x + V, largest) - x, V - 1);            // there is none among nothing but NaN
}

// The largest of each 32 of x [V], in `tops`.
inline void tops_of(const float* x, int64_t V, std::vector<float>& tops) {
  const auto larger = [](floats a, floats b) { return a > b ? a : b; };
  tops.resize((V + 31) / 32);
  int64_t i = 0;
  for (; i + 32 * LANES <= V; i += 32 * LANES) {
    floats v[LANES];
    for (int j = 0; j < LANES; j++) {
      v[j] = floats{} + LOWEST;
      for (int half = 0; half < 2; half++) v[j] = larger(load16(x + i + 32 * j + 16 * half), v[j]);
    }
    write(tops.data() + i / 32, fold(v, larger));
  }
  for (; i < V; i += 32) tops[i / 32] = largest_of(x + i, std::min<int64_t>(32, V - i));
}

// The n largest of x [V] in `found`, the largest first. They lie among the n parts of 32 with the largest tops, and are not
// smaller than the last of these.
inline void likeliest(const float* x, int64_t V, int64_t n, std::vector<Choice>& found) {
  thread_local std::vector<float> tops, order;
  tops_of(x, V, tops);
  float least = LOWEST;
  if (int64_t(tops.size()) > n) {
    order = tops;
    std::nth_element(order.begin(), order.begin() + n - 1, order.end(), std::greater<float>());
    least = order[n - 1];
  }
  found.clear();
  for (int64_t part = 0; part < int64_t(tops.size()); part++)
    for (int64_t i = 32 * part; tops[part] >= least && i < std::min(V, 32 * part + 32); i++)
      if (x[i] >= least) found.push_back({x[i], i});
  const auto before = [](const Choice& a, const Choice& b) { return a.first > b.first || (a.first == b.first && a.second < b.second); };
  if (int64_t(found.size()) > n) std::nth_element(found.begin(), found.begin() + n, found.end(), before), found.resize(n);
  std::sort(found.begin(), found.end(), before);
}

// An id drawn from x [V] with noise [n], numbers of [0, 1): the largest p / Exp(1) draws from p (the Gumbel-max trick). The n
// likeliest are looked at, top_k and some room for ties with the last of these. n = 0: the likeliest itself.
inline int64_t draw_row(const float* x, int64_t V, const Settings& s, const float* noise, int64_t n) {
  if (n == 0) return first_largest(x, V);
  thread_local std::vector<Choice> found;
  thread_local std::vector<float> p;
  likeliest(x, V, n, found);
  if (found.empty()) return V - 1;                        // nothing but NaN
  const float last = found[std::min<int64_t>(s.top_k, found.size()) - 1].first;
  float total = 0;
  p.clear();
  for (size_t i = 0; i < found.size() && found[i].first >= last; i++)
    total += p.emplace_back(std::exp((found[i].first - found[0].first) / std::max(s.temperature, 1e-5f)));
  int64_t id = found[0].second;
  float mass = 0, best = -1;
  for (size_t i = 0; i < p.size() && (i == 0 || ((mass < s.top_p || s.top_p >= 1) && p[i] >= s.min_p * p[0])); i++) {
    mass += p[i] / total;
    if (const float drawn = p[i] / -std::log(noise[i]); drawn > best) best = drawn, id = found[i].second;
  }
  return id;
}

// The same after logits of ids that were seen [V] have been lowered; what is drawn is seen then. seen null: none are.
inline int64_t draw_unseen(const float* x, int64_t V, const Settings& s, const float* noise, int64_t n, bool* seen) {
  if (!seen) return draw_row(x, V, s, noise, n);
  thread_local std::vector<float> lowered;
  lowered.assign(x, x + V);
  for (int64_t i = 0; i < V; i++)
    if (seen[i]) lowered[i] = x[i] < 0 ? x[i] * s.penalty : x[i] / s.penalty;
  const int64_t id = draw_row(lowered.data(), V, s, noise, n);
  seen[id] = true;
  return id;
}
