// The loop of a step, fused with what the steps of all optimizers share: see for_each_target.h and step_chunk.h.
//
// A pass of its own for the average would be one more stream of memory, and alone: it is 5 % slower. Random bits are
// the exception. They are computed, not read, and come from an array in L1.
namespace gradrep::GRADREP_TARGET {

struct StepLoops {
  // An element of a state that is computed in T: as it is stored, or of bfloat16 and rounded by its random bits.
  template <typename T, typename State>
  struct Cell {
    State& stored;
    const uint16_t& bits;
    T value;
    GRADREP_INLINE Cell(State& stored, const uint16_t* bits, int64_t i)
        : stored(stored), bits(bits[i]), value(static_cast<T>(widen(stored))) {}
    GRADREP_INLINE void store() const { stored.bits = round_by(static_cast<float>(value), bits); }
  };
  template <typename T>
  struct Cell<T, T> {
    T& value;
    GRADREP_INLINE Cell(T& stored, const uint16_t*, int64_t) : value(stored) {}
    GRADREP_INLINE void store() const {}
  };

  // `states` are the arrays that the update keeps per parameter, each with an array of random bits where it needs
  // them. All arrays are separate arguments, because the compiler believes __restrict of arguments alone, and without
  // it would compare all pointers.
  template <typename Update, int kVariant, bool kAverages, typename T, typename... State>
  struct Of {
    using Numbers = typename Update::template Numbers<T>;
    template <typename>
    using Bits = const uint16_t*;

    // m has a number for every element. `rest` is 1 - decay of the average e.
    static void run(T* __restrict p, const T* __restrict g, const T* __restrict m, int64_t n, Numbers h, T clip,
                    T* __restrict e, T rest, State* __restrict... states, Bits<State> __restrict... bits) {
      for (int64_t i = 0; i < n; ++i) {
        one(p[i], g[i] * clip, m[i], h, Cell<T, State>(states[i], bits, i)...);
        if constexpr (kAverages) e[i] = averaged(e[i], p[i], rest);
      }
    }

   private:
    GRADREP_INLINE static void one(T& p, T g, T m, const Numbers& h, Cell<T, State>... cells) {
      Update::template element<kVariant>(p, g, m, h, cells.value...);
      (cells.store(), ...);
    }
  };
};

}  // namespace gradrep::GRADREP_TARGET
