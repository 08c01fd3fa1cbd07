// Reading a packed tile (formats.h, runtime/packed_layout.py): quads of codes out of the bit planes, scales and
// minimums of sixteen rows. Included before the bodies that use it.
namespace inhouse::IH_ISA {
namespace {

// Unrolls a loop over the rows that a body works on at once, so that its arrays live in registers. A loop stays a loop
// without optimisation, which keeps builds with sanitizers short.
#if defined(__clang__)
#define IH_UNROLL _Pragma("clang loop unroll(full)")
#else
#define IH_UNROLL _Pragma("GCC unroll 16")
#endif

// The coded bodies of this level (isa/*_sparse.cc).
#define IH_JOINED(a, b) a##b
#define IH_JOIN(a, b) IH_JOINED(a, b)
IH_INLINE const SparseKernels& sparse_kernels() { return inhouse::IH_JOIN(sparse_kernels_, IH_ISA)(); }

template <int N>
struct Int {
  static constexpr int value = N;
};

// f(Int<0>), f(Int<1>), ... f(Int<N - 1>), unrolled.
template <int N, int I = 0, class F>
IH_INLINE void repeat(F f) {
  if constexpr (I < N) {
    f(Int<I>{});
    repeat<N, I + 1>(f);
  }
}

// f(Int<a>, Int<b>) for a < M and b < N, unrolled.
template <int M, int N, class F>
IH_INLINE void for_each(F f) {
  repeat<M>([&](auto a)
                __attribute__((always_inline)) { repeat<N>([&](auto b) __attribute__((always_inline)) { f(a, b); }); });
}

IH_INLINE void prefetch(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }  // to the second level

// f(Int<ID>) with the number of the format whose bodies serve this one.
template <class F>
IH_INLINE void with_codes_of(int32_t format, F f) {
  switch (body_of(format)) {
    case 3:
      return f(Int<3>{});
    case 4:
      return f(Int<4>{});
    case 5:
      return f(Int<5>{});
    case 6:
      return f(Int<6>{});
    case 7:
      return f(Int<7>{});
    case 8:
      return f(Int<8>{});
    case 9:
      return f(Int<9>{});
    case 10:
      return f(Int<10>{});
    case 11:
      return f(Int<11>{});
    case 12:
      return f(Int<12>{});
    case 13:
      return f(Int<13>{});
    case 16:
      return f(Int<16>{});
    case 21:
      return f(Int<21>{});
    case 22:
      return f(Int<22>{});
    case 23:
      return f(Int<23>{});
    case 24:
      return f(Int<24>{});
    case 25:
      return f(Int<25>{});
    case 26:
      return f(Int<26>{});
    case 27:
      return f(Int<27>{});
    case 28:
      return f(Int<28>{});
    case 29:
      return f(Int<29>{});
    case 41:
      return f(Int<41>{});
    case 53:
      return f(Int<53>{});
    case 65:
      return f(Int<65>{});
    case 77:
      return f(Int<77>{});
    case 89:
      return f(Int<89>{});
    case 101:
      return f(Int<101>{});
    default:
      return;  // the loader admits no other number
  }
}

// Quad Q (0..7) of a block: inputs 4Q..4Q+3 of sixteen rows; a plane's bits, moved up to bit AT of each byte.
template <int BITS, int Q, int AT>
IH_INLINE B plane_bits(const uint8_t* plane) {
  if constexpr (BITS == 8) {
    return load_bytes(plane + 64 * Q);
  } else {
    constexpr int vector = BITS == 4 ? Q % 4 : Q / (8 / BITS), slot = BITS == 4 ? Q / 4 : Q % (8 / BITS);
    return and_bytes(shift_bytes<AT - slot * BITS>(load_bytes(plane + 64 * vector)), ((1 << BITS) - 1) << AT);
  }
}
template <int ID, int Q>
IH_INLINE B quad(const uint8_t* low, const uint8_t* high) {
  constexpr Format f = kFormats[ID];
  const B codes = plane_bits<f.low, Q, 0>(low);
  if constexpr (looks_up_bytes(f)) {
    return lookup_bytes(kCodeTables[f.table - kIQ4], codes);
  } else if constexpr (f.high == 0) {
    return codes;
  } else {
    return or_bytes(codes, plane_bits<f.high, Q, f.low>(high));
  }
}

template <Scalar S>
IH_INLINE V load_scalars(const uint8_t* p, int64_t entry) {
  if constexpr (S == kF32) {
    return load(reinterpret_cast<const float*>(p) + entry * 16);
  } else if constexpr (S == kF16) {
    return load_f16(reinterpret_cast<const uint16_t*>(p) + entry * 16);
  } else if constexpr (S == kE8M0) {  // bytes 0 and 1 mean denormals, which every step counts as 0
    return from_bits(shift_left<23>(max_int(sub_int(load_u8(p + entry * 16), set1_int(1)), set1_int(0))));
  } else {
    return load_bf16(reinterpret_cast<const uint16_t*>(p) + entry * 16);
  }
}

// Sixteen bytes as e4m3 numbers without a sign, exactly; 127, a NaN, reads as 480.
IH_INLINE V e4m3(VI bytes) {
  const V number = to_float(bytes);
  const V normal = from_bits(add_int(shift_left<20>(bytes), set1_int(120 << 23)));
  return select(less(number, set1(8.0f)), mul(number, set1(0x1p-9f)), normal);
}

// The same of e5m2; from 124 on, infinity and NaN, they read as 2^16 and more.
IH_INLINE V e5m2(VI bytes) {
  const V number = to_float(bytes);
  const V normal = from_bits(add_int(shift_left<21>(bytes), set1_int(112 << 23)));
  return select(less(number, set1(4.0f)), mul(number, set1(0x1p-16f)), normal);
}
// Sixteen bytes as floats of one byte.
template <Table T>
IH_INLINE V float_bytes(VI bytes) {
  const M negative = less(set1(127.5f), to_float(bytes));
  const VI magnitude = sub_int(bytes, to_int(select(negative, set1(128.0f), zero())));
  const V v = T == kE4M3 ? e4m3(magnitude) : e5m2(magnitude);
  return select(negative, sub(zero(), v), v);
}

// A tile of format ID; `blocks_per_scale` is above 1 where groups are longer than a block.
template <int ID>
struct Tile {
  static constexpr Format f = kFormats[ID];
  static constexpr int halves = f.group == 16 ? 2 : 1;  // groups in a block, where groups are no longer than that
  const uint8_t* data;
  const Layout& l;
  int64_t blocks_per_scale;
  Scalar scalar;  // of the scales of a family's format

  static constexpr bool offset = f.minimum || f.zeros;   // something is added to scale * code,
  static constexpr bool taken = f.two_level || f.zeros;  // or taken off

  // The tile `bytes` behind this one.
  IH_INLINE Tile further(int64_t bytes) const { return {data + bytes, l, blocks_per_scale, scalar}; }
  IH_INLINE const uint8_t* low(int64_t block) const { return data + l.low + block * f.low * 64; }
  IH_INLINE const uint8_t* high(int64_t block) const { return data + l.high + block * f.high * 64; }
  IH_INLINE int64_t entry(int64_t block, int half) const {
    if constexpr ((f.scale == kF32 && !f.two_level) || f.group > kBlock || f.family) {
      return block / blocks_per_scale;
    } else {
      return block * halves + half;
    }
  }
  IH_INLINE V two_level(int64_t section, int64_t sub, int64_t group) const {
    if constexpr (float_subs(f)) {
      return mul(load_scalars<f.scale>(data + section, 0), e4m3(load_u8(data + sub + group * 16)));
    }
    const V d = load_scalars<f.scale>(data + section, group / (kSuper / (kBlock / halves)));
    return mul(d, load_i8(reinterpret_cast<const int8_t*>(data + sub) + group * 16));
  }
  IH_INLINE V scale(int64_t block, int half) const {
    if constexpr (f.two_level) {
      return two_level(l.scale, l.sub_scale, entry(block, half));
    } else if constexpr (f.family) {
      if (scalar == kF16) return load_scalars<kF16>(data + l.scale, entry(block, half));
      if (scalar == kBF16) return load_scalars<kBF16>(data + l.scale, entry(block, half));
      return load_scalars<kF32>(data + l.scale, entry(block, half));
    } else {
      return load_scalars<f.scale>(data + l.scale, entry(block, half));
    }
  }
  IH_INLINE V zero_point(int64_t block, int half) const {
    return load_i8(reinterpret_cast<const int8_t*>(data + l.zeros) + entry(block, half) * 16);
  }
  // What is added to scale * code, or taken off.
  IH_INLINE V minimum(int64_t block, int half) const {
    if constexpr (f.zeros) {
      return mul(scale(block, half), zero_point(block, half));
    } else if constexpr (f.two_level) {
      return two_level(l.minimum, l.sub_minimum, entry(block, half));
    } else {
      return load_scalars<f.scale>(data + l.minimum, entry(block, half));
    }
  }
};

template <int ID>
IH_INLINE Tile<ID> tile_of(const Weight& w, const Layout& l, int64_t tile) {
  const int64_t group = kFormats[w.format].group;
  return {w.data + tile * l.tile_bytes, l,
          group == 0        ? l.blocks
          : group <= kBlock ? 1
                            : group / kBlock,
          kFormats[w.format].scale};
}

// y[0..15] of a row's outputs of `tile`, cut at the matrix's end.
IH_INLINE void store_outputs(const Weight& w, int64_t tile, const float* bias, V sums, float* y) {
  const int64_t o = tile * kTileRows, n = w.out - o < kTileRows ? w.out - o : kTileRows;
  if (bias != nullptr) sums = add(sums, load_n(bias + o, n));
  store_n(y + o, n, sums);
}

}  // namespace
}  // namespace inhouse::IH_ISA
