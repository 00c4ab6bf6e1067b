// Values -> bin numbers, compiled once per instruction set: see for_each_target.h.

namespace gradrep::GRADREP_TARGET {

// With kZerosDrop, a zero becomes `none`, the number after the last bin.
struct QuantiseLoops {
  template <bool kZerosDrop, typename S, typename T, typename Bin>
  static void quantise(const S* __restrict values, int64_t n, const Binning<T>& binning, Bin* __restrict numbers) {
    const Binning<T> same = binning;
    for (int64_t i = 0; i < n; ++i) numbers[i] = quantised<kZerosDrop, T, Bin>(widen(values[i]), same);
  }
  template <bool kZerosDrop, typename S, typename T, typename Bin>
  static void quantise(const S* __restrict values, int64_t n, const Binnings<T>& binnings, Bin* __restrict numbers) {
    const T* __restrict lo = binnings.lo, * __restrict inv = binnings.inv, * __restrict top = binnings.top;
    for (int64_t i = 0; i < n; ++i)
      numbers[i] = quantised<kZerosDrop, T, Bin>(widen(values[i]), Binning<T>{lo[i], inv[i], top[i]});
  }

 private:
  template <bool kZerosDrop, typename T, typename Bin>
  GRADREP_INLINE static Bin quantised(T v, const Binning<T>& binning) {
    const auto number = static_cast<Bin>(bin_number(v, binning));
    return kZerosDrop && v == 0 ? static_cast<Bin>(static_cast<Bin>(binning.top) + 1) : number;
  }
};

}  // namespace gradrep::GRADREP_TARGET
