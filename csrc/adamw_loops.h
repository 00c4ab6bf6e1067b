// The loops of AdamW over a run of elements: see for_each_target.h and adamw_chunk.h.
namespace gradrep::GRADREP_TARGET {

// Divisions and roots take nearly the time that memory does, and the hardware asks for four streams of it too late: to
// ask for 4 KiB ahead, a cache line at a time, gains 10 %.
struct AdamwLoops {
  template <int kVariant, typename T>
  struct Of {
    using Numbers = AdamwUpdate::Numbers<T>;

    // The whole step of weights that stand for one branch with α = 1. `sign` is -1 of a maximum.
    static void whole(T* __restrict p, const T* __restrict g, int64_t n, const Numbers& numbers, T sign,
                      T* __restrict m, T* __restrict v, T* __restrict greatest) {
      const Numbers h = numbers;
      const int64_t whole_lines = n / kLine * kLine;
      for (int64_t i = 0; i < whole_lines; i += kLine) {
        ask_for(p + i, g + i, m + i, v + i);
        for (int64_t j = i; j < i + kLine; ++j) {
          const auto shared = moments(g[j] * sign, h, m, v, greatest, j);
          p[j] = AdamwUpdate::moved(p[j], shared.n / (shared.s + h.eps), h);
        }
      }
      for (int64_t i = whole_lines; i < n; ++i) {
        const auto shared = moments(g[i] * sign, h, m, v, greatest, i);
        p[i] = AdamwUpdate::moved(p[i], shared.n / (shared.s + h.eps), h);
      }
    }

    // Where every element has one branch, and where it has two.
    static void one_branch(T* __restrict p, const T* __restrict g, const T* __restrict factor,
                           const T* __restrict alpha, int64_t n, const Numbers& numbers, T* __restrict m,
                           T* __restrict v, T* __restrict greatest) {
      const Numbers h = numbers;
      const int64_t whole_lines = n / kLine * kLine;
      for (int64_t i = 0; i < whole_lines; i += kLine) {
        ask_for(p + i, g + i, m + i, v + i);
        for (int64_t j = i; j < i + kLine; ++j) {
          const auto shared = moments(g[j] * factor[j], h, m, v, greatest, j);
          p[j] = AdamwUpdate::moved(p[j], AdamwUpdate::added(shared.n, shared.s, alpha[j], h), h);
        }
      }
      for (int64_t i = whole_lines; i < n; ++i) {
        const auto shared = moments(g[i] * factor[i], h, m, v, greatest, i);
        p[i] = AdamwUpdate::moved(p[i], AdamwUpdate::added(shared.n, shared.s, alpha[i], h), h);
      }
    }

    static void two_branches(T* __restrict p, const T* __restrict g, const T* __restrict factor,
                             const T* __restrict alpha, const T* __restrict second, int64_t n, const Numbers& numbers,
                             T* __restrict m, T* __restrict v, T* __restrict greatest) {
      const Numbers h = numbers;
      const int64_t whole_lines = n / kLine * kLine;
      for (int64_t i = 0; i < whole_lines; i += kLine) {
        ask_for(p + i, g + i, m + i, v + i);
        for (int64_t j = i; j < i + kLine; ++j) {
          const auto shared = moments(g[j] * factor[j], h, m, v, greatest, j);
          const T first = AdamwUpdate::added(shared.n, shared.s, alpha[j], h);
          p[j] = AdamwUpdate::moved(p[j], first + AdamwUpdate::added(shared.n, shared.s, second[j], h), h);
        }
      }
      for (int64_t i = whole_lines; i < n; ++i) {
        const auto shared = moments(g[i] * factor[i], h, m, v, greatest, i);
        const T first = AdamwUpdate::added(shared.n, shared.s, alpha[i], h);
        p[i] = AdamwUpdate::moved(p[i], first + AdamwUpdate::added(shared.n, shared.s, second[i], h), h);
      }
    }

    // The parts of a step with more branches, or with an identity: what the branches share, and then the weights.
    static void shared(const T* __restrict g, const T* __restrict factor, int64_t n, const Numbers& numbers,
                       T* __restrict m, T* __restrict v, T* __restrict greatest, T* __restrict to_n,
                       T* __restrict to_s) {
      const Numbers h = numbers;
      for (int64_t i = 0; i < n; ++i) {
        const auto shared = moments(g[i] * factor[i], h, m, v, greatest, i);
        to_n[i] = shared.n;
        to_s[i] = shared.s;
      }
    }

    static void first(const T* __restrict n_of, const T* __restrict s_of, const T* __restrict alpha, int64_t n,
                      const Numbers& numbers, T* __restrict sum) {
      const Numbers h = numbers;
      for (int64_t i = 0; i < n; ++i) sum[i] = AdamwUpdate::added(n_of[i], s_of[i], alpha[i], h);
    }

    static void further(const T* __restrict n_of, const T* __restrict s_of, const T* __restrict alpha, int64_t n,
                        const Numbers& numbers, T* __restrict sum) {
      const Numbers h = numbers;
      for (int64_t i = 0; i < n; ++i) sum[i] = sum[i] + AdamwUpdate::added(n_of[i], s_of[i], alpha[i], h);
    }

    static void move(T* __restrict p, const T* __restrict sum, int64_t n, const Numbers& numbers) {
      const Numbers h = numbers;
      for (int64_t i = 0; i < n; ++i) p[i] = AdamwUpdate::moved(p[i], sum[i], h);
    }

   private:
    static constexpr int64_t kLine = 64 / sizeof(T), kAhead = 4096 / sizeof(T);
    GRADREP_INLINE static void ask_for(const T* p, const T* g, const T* m, const T* v) {
      prefetch_all(p + kAhead, kLine);
      prefetch_all(g + kAhead, kLine);
      prefetch_all(m + kAhead, kLine);
      prefetch_all(v + kAhead, kLine);
    }

    // Without amsgrad the array of the greatest v is not touched: the parameter stands in for it.
    GRADREP_INLINE static AdamwUpdate::Shared<T> moments(T g, const Numbers& h, T* m, T* v, T* greatest, int64_t i) {
      T none = 0;
      if constexpr (kVariant >= 2)
        return AdamwUpdate::moments<kVariant>(g, h, m[i], v[i], greatest[i]);
      else
        return AdamwUpdate::moments<kVariant>(g, h, m[i], v[i], none);
    }
  };

  // M = Σ α² of a run, and what an identity adds is the caller's.
  template <typename T>
  static void add_square(const T* __restrict alpha, int64_t n, T* __restrict sum) {
    for (int64_t i = 0; i < n; ++i) sum[i] = sum[i] + alpha[i] * alpha[i];
  }
};

}  // namespace gradrep::GRADREP_TARGET
