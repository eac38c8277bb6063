// Products by matrix tiles, where a processor has them (AMX of x86). A part of kernels.cpp.
//
// A tile is a register of 16 rows of 64 bytes. One instruction multiplies 16 rows of a weight, 32 columns of bfloat16 or 64
// of bytes, by as much of up to 16 vectors: what 256 instructions on vectors do, in the time of some sixteen. So a few
// vectors take as long as one, which is as long as memory takes.
//
// A weight's rows are the rows of a tile, read where they lie. The vectors are laid out once (`lay_out`), as the instruction
// wants its second factor: a tile's row has of each vector one word, 2 or 4 neighbours. Whole numbers of 16 bits are two
// bytes, so such a vector has two words in each row.

// EMULATED_TILES is for tests of what is made of the instructions where there are none, NO_TILES for those of vectors alone.
#if defined(EMULATED_TILES)
#define HAS_TILES
#elif !defined(NO_TILES) && LANES == 16 && defined(MULTIPLIES_BFLOAT16) && defined(MULTIPLIES_BYTES) && defined(__AMX_TILE__) && \
    defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef HAS_TILES
static_assert(LANES == 16, "a tile has rows of 16 words");

struct alignas(64) Shapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
    Shapes() { std::fill(row_bytes, row_bytes + 8, uint16_t(64)), std::fill(rows, rows + 8, uint8_t(16)); }
    // For sums, in tile 0, of some rows of a weight, in tile 1, by vectors of so many words a row, in tile 2.
    Shapes(int64_t weights, int64_t words) : Shapes() {
        rows[0] = rows[1] = uint8_t(weights), row_bytes[0] = row_bytes[2] = uint16_t(4 * words);
    }
};

#ifdef EMULATED_TILES
struct Tile {
    uint8_t row[16][64];
};
inline thread_local Tile held[8];
inline thread_local Shapes shapes;
inline bool may_use_tiles() { return true; }
inline void begin_tiles(const Shapes& of) { shapes = of; }
inline void end_tiles() {}
template <int T>
void clear_tile() { held[T] = Tile{}; }
template <int T>
void load_tile(const void* from, int64_t stride) {
    for (int r = 0; r < shapes.rows[T]; r++)
        std::memcpy(held[T].row[r], static_cast<const uint8_t*>(from) + r * stride, shapes.row_bytes[T]);
}
template <int T>
void store_tile(void* to, int64_t stride) {
    for (int r = 0; r < shapes.rows[T]; r++)
        std::memcpy(static_cast<uint8_t*>(to) + r * stride, held[T].row[r], shapes.row_bytes[T]);
}
template <class Number, class Sum, int C, int A, int B, class Widen>
void multiply_emulated(Widen wide) {
    constexpr int EACH = 4 / sizeof(Number);
    auto at = [](Tile& tile, int row, int i) { return load<Number>(tile.row[row] + i * sizeof(Number)); };
    for (int m = 0; m < shapes.rows[C]; m++)
        for (int n = 0; n < shapes.row_bytes[C] / 4; n++) {
            Sum sum = load<Sum>(held[C].row[m] + 4 * n);
            for (int k = 0; k < shapes.row_bytes[A] / int(sizeof(Number)); k++)
                sum += wide(at(held[A], m, k)) * wide(at(held[B], k / EACH, n * EACH + k % EACH));
            std::memcpy(held[C].row[m] + 4 * n, &sum, 4);
        }
}
template <int C, int A, int B>
void multiply_bytes() { multiply_emulated<int8_t, int32_t, C, A, B>([](int8_t byte) { return int32_t(byte); }); }
template <int C, int A, int B>
void multiply_bfloat16() { multiply_emulated<uint16_t, float, C, A, B>(widen); }
#else
// Linux gives a process tiles when it asks for them, once (arch_prctl: ARCH_REQ_XCOMP_PERM of the feature XTILEDATA).
inline bool may_use_tiles() {
    static const bool may = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return may;
}
inline void begin_tiles(const Shapes& of) { asm volatile("ldtilecfg %0" : : "m"(of)); }
inline void end_tiles() { asm volatile("tilerelease"); }
template <int T>
inline void clear_tile() { asm volatile("tilezero %%tmm%c0" : : "i"(T)); }
template <int T>
inline void load_tile(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void store_tile(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
inline void multiply_bytes() { asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B)); }
template <int C, int A, int B>
inline void multiply_bfloat16() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B)); }
#endif

template <int H, int... LANE>
inline void swap_blocks(Words& a, Words& b, std::integer_sequence<int, LANE...>) {
    Words upper = pick<(LANE & H ? LANES + LANE - H : LANE)...>(a, b);
    b = pick<(LANE & H ? LANES + LANE : LANE + H)...>(a, b), a = upper;
}

template <int H>
inline void transpose(Words (&v)[16]) {  // 16 x 16 words: blocks of H, of H / 2, ... change places
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        if (!(i & H)) swap_blocks<H>(v[i], v[i + H], std::make_integer_sequence<int, LANES>{});
    if constexpr (H > 1) transpose<H / 2>(v);
}

// How a kind of weight meets vectors in tiles: in bfloat16, or in bytes, where a vector's whole numbers of 16 bits are PARTS,
// their upper and their lower bytes. Not where it would have to be made such first: 4 bits are quicker as they are.
template <class W>
struct Tiled {
    static constexpr bool HERE = false;
};
template <>
struct Tiled<Bfloat16Pairs> {
    static constexpr bool HERE = true, BYTES = false;
    static constexpr int COLUMNS = 32, PARTS = 1;
};
template <>
struct Tiled<Int8> {
    static constexpr bool HERE = true, BYTES = true;
    static constexpr int COLUMNS = 64, PARTS = 2;
};
template <>
struct Tiled<Int8Dynamic> : Tiled<Int8> {
    static constexpr int PARTS = 1;
};

constexpr int64_t TILE = 16 * 64;  // bytes

// Vectors laid out for tiles: Q words of each row, and for each SHARED columns what a 1 of each of the Q is, in all lanes by
// their number.
template <class W>
struct Panel {
    using K = Tiled<W>;
    static constexpr int MOST = 16 / K::PARTS;  // vectors
    int64_t columns, units, bytes;              // `columns` are those in whole steps; where `units` begin, and all end
    Panel(const Matrix& m, int64_t Q) {
        columns = m.columns / K::COLUMNS * K::COLUMNS;
        units = columns / K::COLUMNS * 64 * Q;
        bytes = units + (K::BYTES ? (columns + SHARED - 1) / SHARED * 64 : 0);
    }
};

// `bytes` of each of `count` rows, `stride` apart, to steps of 16 rows of Q words: of 64 bytes each.
template <int Q>
void lay_out(const uint8_t* rows, int64_t stride, int64_t bytes, uint8_t* to, int64_t count = Q) {
    if (Q == 1) std::memcpy(to, rows, bytes);
    else
        for (int64_t at = 0; at < bytes; at += 64) {
            Words v[16];
#pragma GCC unroll 16
            for (int q = 0; q < 16; q++) v[q] = q < Q && q < count ? load<Words>(rows + q * stride + at) : Words{};
            transpose<8>(v);
#pragma GCC unroll 16
            for (int k = 0; k < 16; k++, to += 4 * Q) std::memcpy(to, &v[k], 4 * Q);
        }
}

// `count` vectors x (count, C) to a panel of Q words a row.
template <class W, int Q>
void place_in_tiles(const Matrix& m, const float* x, int64_t count, uint8_t* panel) {
    using K = Tiled<W>;
    constexpr int EACH = Q / K::PARTS;
    const Panel<W> p(m, Q);
    const int64_t bytes = p.columns / K::COLUMNS * 64, stride = bytes + 64;
    static thread_local std::vector<uint8_t> room;
    room.assign(Q * stride, 0);
    auto* units = reinterpret_cast<float*>(panel + p.units);
    for (int64_t j = 0; j < count; j++, x += m.columns) {
        uint8_t* upper = room.data() + j * stride;
        if constexpr (K::BYTES) {
            uint8_t* lower = upper + EACH * stride;
            int32_t numbers[SHARED];
            for (int64_t first = 0; first < p.columns; first += SHARED, units += LANES) {
                const int64_t shared = std::min(SHARED, p.columns - first);
                const float unit = round_together(x + first, shared, W::LIMIT, numbers);
                for (int lane = 0; lane < LANES; lane++)
                    if (lane % EACH == j) units[lane] = unit * (K::PARTS == 1 || lane % Q >= EACH ? 1 : 256);
                if constexpr (K::PARTS == 1) {
                    for (int64_t i = 0; i < shared; i++) upper[first + i] = uint8_t(numbers[i]);
                } else {
                    for (int64_t i = 0; i < shared; i++) lower[first + i] = uint8_t(numbers[i]);
                    for (int64_t i = 0; i < shared; i++) upper[first + i] = uint8_t((numbers[i] + 128) >> 8);
                }
            }
            units -= (p.columns + SHARED - 1) / SHARED * LANES;
        } else {
            for (int64_t c = 0; c < p.columns; c += LANES) put(reinterpret_cast<uint16_t*>(upper) + c, load<Floats>(x + c));
        }
    }
    lay_out<Q>(room.data(), stride, bytes, panel);
}

// `count` rows, sixteen at most and `gap` apart, times a panel: 16 x Q sums, but for columns that no step has.
template <class W, int Q>
void multiply_tile(const Matrix& m, int64_t row, int64_t gap, int64_t count, const uint8_t* panel, float* out) {
    using K = Tiled<W>;
    const Panel<W> p(m, Q);
    const int64_t stride = gap * W::bytes(m.columns);
    const uint8_t* codes = static_cast<const uint8_t*>(m.codes) + row * W::bytes(m.columns);
    if constexpr (K::BYTES) {
        const auto* units = reinterpret_cast<const float*>(panel + p.units);
        Floats sums[Q] = {};
        for (int64_t first = 0; first < p.columns; first += SHARED, units += LANES) {
            alignas(64) int32_t made[16 * Q];
            clear_tile<0>();
            for (int64_t c = first; c < std::min(p.columns, first + SHARED); c += 64) {
                load_tile<2>(panel + c * Q, 4 * Q), load_tile<1>(codes + c, stride);
                multiply_bytes<0, 1, 2>();
            }
            store_tile<0>(made, 4 * Q);
#pragma GCC unroll 16
            for (int z = 0; z < Q; z++) {
                Floats number = __builtin_convertvector(load<Ints>(made + z * LANES), Floats);
                sums[z] = add_product(sums[z], load<Floats>(units), number);
            }
        }
        std::memcpy(out, sums, sizeof sums);
    } else {
        clear_tile<0>();
        for (int64_t c = 0; c < p.columns; c += 32) {
            load_tile<2>(panel + 2 * c * Q, 4 * Q), load_tile<1>(codes + 2 * c, stride);
            multiply_bfloat16<0, 1, 2>();
        }
        store_tile<0>(out, 4 * Q);
    }
}

// What a 1 is in each of `count` rows beside each other.
template <class W>
inline Floats units_of_rows(const Matrix& m, int64_t row, int64_t count) {
    if constexpr (std::is_same<W, Bfloat16Pairs>::value) return Floats{} + 1.0f;
    if (count == LANES) return widened(m.scale + row);
    Floats units = {};
    for (int64_t i = 0; i < count; i++) units[i] = W::finish(m, row + i, 1);
    return units;
}

// As `product`, by tiles.
template <class W, class Done>
void product_by_tiles(Thread& me, const Matrix& m, const float* x, int64_t n, std::initializer_list<Part> parts, Done done) {
    using K = Tiled<W>;
    const int64_t panels = (n + Panel<W>::MOST - 1) / Panel<W>::MOST, each = n / panels, more = n % panels;
    auto go = [&](auto words) {
        constexpr int Q = words, EACH = Q / K::PARTS;
        const Panel<W> p(m, Q);
        static thread_local std::vector<uint8_t> room;
        uint8_t* laid_out = lines(room, panels * p.bytes);
        auto first_of = [&](int64_t panel) { return panel * each + std::min(panel, more); };
        for (int64_t i = 0; i < panels; i++) {
            const int64_t first = first_of(i);
            place_in_tiles<W, Q>(m, x + first * m.columns, first_of(i + 1) - first, laid_out + i * p.bytes);
        }
        // Rows `gap` apart, `count` of them, and the `many` after each, sixteen of both at most.
        auto make = [&](int64_t row, int64_t gap, int64_t count, int64_t many, const Target& target) {
            alignas(64) float made[16][16 * Q];
            for (int64_t i = 0; i < panels; i++) {
                const int64_t first = first_of(i), vectors = first_of(i + 1) - first;
                for (int64_t k = 0; k < many; k++) {
                    multiply_tile<W, Q>(m, row + k, gap, count, laid_out + i * p.bytes, made[k]);
                    for (int64_t c = p.columns; c < m.columns; c++)
                        for (int64_t r = 0; r < count; r++)
                            for (int64_t j = 0; j < vectors; j++) {
                                float& sum = made[k][r * Q + j];
                                sum = std::fma(W::at(m, row + k + r * gap, c), x[(first + j) * m.columns + c], sum);
                            }
                }
                for (int64_t from = 0; from < count * Q; from += LANES) {
                    Words v[16];  // of each word, the sums of rows beside each other
#pragma GCC unroll 16
                    for (int k = 0; k < 16; k++) v[k] = load<Words>(made[k] + from);
                    transpose<8>(v);
                    for (int64_t r = from / Q; r < std::min(count, (from + LANES) / Q); r++) {
                        const Words* words = v + (r * Q - from);
                        const Floats unit = units_of_rows<W>(m, row + r * gap, many);
                        for (int64_t j = 0; j < vectors; j++) {
                            Floats total = Floats(words[j]);
                            if (K::PARTS == 2) total += Floats(words[EACH + j]);
                            put_rows(target, first + j, row + r * gap, many, total * unit);
                        }
                    }
                }
            }
        };
        const int64_t pieces = pieces_of<W>(m, me.count);
        begin_tiles(Shapes(16, Q));
        me.share_out(pieces, [&](int64_t whose, int64_t i) {
            int64_t row, last;
            me.share(m.rows / int64_t(parts.size()), whose, row, last);
            const int64_t tiles = (last - row) / 16, from = tiles * i / pieces, to = tiles * (i + 1) / pieces, gap = to - from;
            const int64_t first = row + 16 * from, rest = i == pieces - 1 ? (last - row) % 16 : 0;
            for (const Part& part : parts)
                for (int64_t at = first; at < first + gap; at += 16)
                    make(part.first + at, gap, 16, std::min<int64_t>(16, first + gap - at), part.target);
            if (rest) begin_tiles(Shapes(rest, Q));
            for (const Part& part : parts)
                if (rest) make(part.first + last - rest, 1, rest, 1, part.target);
            if (rest) begin_tiles(Shapes(16, Q));
            done(first, first + 16 * gap + rest);
        });
        end_tiles();
    };
    const int64_t most = each + (more > 0);
    constexpr int P = K::PARTS;
    if (most == 1) go(Count<P>{});
    else if (most == 2) go(Count<2 * P>{});
    else if (most <= 4) go(Count<4 * P>{});
    else if (most <= 8) go(Count<8 * P>{});
    else if constexpr (P == 1) go(Count<16>{});
}

// A prompt's products -------------------------------------------------------------------------------------------------
//
// Many vectors by a weight that is made bfloat16 (but int8-dynamic: bytes by bytes). Blocks of its rows are copied into
// tiles that lie together, and meet 32 vectors at a time: four products for four tiles that are read. Of the vectors some
// columns stay in the first cache while all rows of a block go over them.

constexpr int64_t DEEP = 24;  // tiles of a row of tiles, that stay

// Sixteen bytes, each as a word. (GCC 12 takes them one by one where it is asked to convert the vector.)
template <class Byte>
inline Ints widen_bytes(const uint8_t* from) {
#ifdef __AVX512F__
    auto bytes = load<__m128i>(from);
    return Ints(std::is_signed<Byte>::value ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#else
    Ints words;
    for (int i = 0; i < LANES; i++) words[i] = Byte(from[i]);
    return words;
#endif
}

// Of 4 bits, 32 columns of a group: each group's values are few.
template <class W>
inline void decode_part(const uint8_t* pairs, float scale, float zero, uint8_t* to) {
    Floats values;
    if constexpr (W::OFFSET) {
        const Floats codes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        values = add_product(Floats{} + zero, codes, Floats{} + scale);
    } else {
        values = load<Floats>(NORMAL) * scale;
    }
    Words both = Words(widen_bytes<uint8_t>(pairs));
    both = (both >> 4 | both << 16) & 0x000f000fu;
#if defined(MULTIPLIES_BFLOAT16) && !defined(EMULATED_TILES)
    auto table = _mm512_castsi256_si512(__m256i(_mm512_cvtneps_pbh(__m512(values))));
    both = Words(_mm512_permutexvar_epi16(__m512i(both), table));
#else
    for (int i = 0; i < LANES; i++) both[i] = narrow(values[both[i] & 15]) | uint32_t(narrow(values[both[i] >> 16])) << 16;
#endif
    std::memcpy(to, &both, 64);
}

// 16 rows of a weight as tiles, one after the other, of bfloat16 (int8-dynamic: of bytes). Rows that it doesn't have are 0.
template <class W>
void make_tiles(const Matrix& m, int64_t row, uint8_t* tiles) {
    constexpr bool COPIED = std::is_same<W, Bfloat16Pairs>::value || std::is_same<W, Int8Dynamic>::value;
    const int64_t steps = m.columns / (std::is_same<W, Int8Dynamic>::value ? 64 : 32);
    for (int64_t r = 0; r < 16; r++, row++, tiles += 64) {
        const auto* codes = static_cast<const uint8_t*>(m.codes) + row * W::bytes(m.columns);
        if (row >= m.rows) {
            for (int64_t s = 0; s < steps; s++) std::memset(tiles + s * TILE, 0, 64);
        } else if constexpr (COPIED) {
            for (int64_t s = 0; s < steps; s++) std::memcpy(tiles + s * TILE, codes + s * 64, 64);
        } else if constexpr (std::is_same<W, Int8>::value) {
            for (int64_t i = 0; i < 2 * steps; i++)
                put(reinterpret_cast<uint16_t*>(tiles + i / 2 * TILE) + i % 2 * LANES,
                    __builtin_convertvector(widen_bytes<int8_t>(codes + i * LANES), Floats));
        } else {
            const int64_t groups = m.columns / m.group, in_group = m.group / 32;
            const uint16_t *scale = m.scale + row * groups, *zero = W::OFFSET ? m.zero + row * groups : scale;
            for (int64_t s = 0; s < steps; scale++, zero++) {
                const float one = widen(*scale);
                float none = 0;
                if constexpr (W::OFFSET) none = widen(*zero) - 8 * one;
                for (int64_t end = s + in_group; s < end; s++, codes += 16) decode_part<W>(codes, one, none, tiles + s * TILE);
            }
        }
    }
}

// Of bfloat16, a vector as bytes. Returns what a 1 is.
inline float to_bytes(const uint16_t* x, int64_t count, uint8_t* bytes) {
    static thread_local std::vector<float> wide, numbers;
    at_least(wide, count), at_least(numbers, count);
    for (int64_t i = 0; i < count; i += LANES) store(wide.data() + i, widened(x + i));
    auto* whole = reinterpret_cast<int32_t*>(numbers.data());
    const float unit = round_together(wide.data(), count, Int8Dynamic::LIMIT, whole);
    for (int64_t i = 0; i < count; i++) bytes[i] = uint8_t(whole[i]);
    return unit;
}

// Of bfloat16, a vector of which each group's numbers are rounded to 8 bits.
inline void round_by_groups(const Matrix& m, const uint16_t* x, uint16_t* rounded) {
    static thread_local std::vector<float> wide;
    at_least(wide, m.columns);
    for (int64_t i = 0; i < m.columns; i += LANES) store(wide.data() + i, widened(x + i));
    round_by_groups(m, wide.data(), m.columns, wide.data());
    for (int64_t i = 0; i < m.columns; i += LANES) put(rounded + i, load<Floats>(wide.data() + i));
}

// x (n, C) of bfloat16, C whole steps, by a weight: to out (n, N).
template <class W>
void multiply_many(const Matrix& m, const uint16_t* x, int64_t n, uint16_t* out, int64_t threads) {
    constexpr bool BYTES = std::is_same<W, Int8Dynamic>::value, SCALED = BYTES || std::is_same<W, Int8>::value;
    const int64_t row_bytes = m.columns * (BYTES ? 1 : 2), steps = row_bytes / 64, panels = (n + 31) / 32 * 2;
    const int64_t block = std::clamp<int64_t>((1 << 20) / row_bytes / 32 * 32, 32, 128), blocks = (m.rows + block - 1) / block;
    static thread_local std::vector<uint8_t> room;
    static thread_local std::vector<float> units;
    at_least(units, panels * 16);
    uint8_t* laid_out = lines(room, panels * steps * TILE);
    float* ones = units.data();
#pragma omp parallel num_threads(threads)
    {
        static thread_local std::vector<uint8_t> tiles, bytes;
        alignas(64) float sums[128 * 32], scales[128];
        uint8_t* weights = lines(tiles, block / 16 * steps * TILE);
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < panels; panel++) {
            const int64_t count = std::clamp<int64_t>(n - panel * 16, 0, 16);
            const auto* rows = reinterpret_cast<const uint8_t*>(x + panel * 16 * m.columns);
            if constexpr (BYTES) {
                uint8_t* made = lines(bytes, 16 * row_bytes);
                for (int64_t j = 0; j < count; j++)
                    ones[panel * 16 + j] = to_bytes(x + (panel * 16 + j) * m.columns, m.columns, made + j * row_bytes);
                rows = made;
            } else if (m.kind == INT4_DYNAMIC) {
                uint8_t* made = lines(bytes, 16 * row_bytes);
                for (int64_t j = 0; j < count; j++)
                    round_by_groups(m, x + (panel * 16 + j) * m.columns, reinterpret_cast<uint16_t*>(made) + j * m.columns);
                rows = made;
            }
            lay_out<16>(rows, row_bytes, row_bytes, laid_out + panel * steps * TILE, count);
        }
        begin_tiles(Shapes());
#pragma omp for schedule(dynamic)
        for (int64_t number = 0; number < blocks; number++) {
            const int64_t first = number * block, rows = (std::min(block, m.rows - first) + 31) / 32 * 32;
            for (int64_t r = 0; r < rows; r += 16) make_tiles<W>(m, first + r, weights + r / 16 * steps * TILE);
            if constexpr (SCALED)
                for (int64_t r = 0; r < rows; r++) scales[r] = first + r < m.rows ? W::finish(m, first + r, 1) : 0;
            const int64_t apart = steps * TILE, all = steps;  // not read anew at every step
            for (int64_t panel = 0; panel < panels; panel += 2) {
                for (int64_t deep = 0; deep < all; deep += DEEP) {
                    const int64_t size = std::min(DEEP, all - deep) * TILE;
                    for (int64_t r = 0; r < rows; r += 32) {
                        const uint8_t *a = weights + r / 16 * apart + deep * TILE, *b = laid_out + panel * apart + deep * TILE;
                        float* c = sums + r * 32;
                        if (deep == 0) clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
                        else load_tile<0>(c, 64), load_tile<1>(c + 256, 64), load_tile<2>(c + 512, 64), load_tile<3>(c + 768, 64);
                        for (int64_t at = 0; at < size; at += TILE) {
                            load_tile<4>(a + at, 64), load_tile<6>(b + at, 64);
                            load_tile<5>(a + apart + at, 64), load_tile<7>(b + apart + at, 64);
                            if constexpr (BYTES) {
                                multiply_bytes<0, 4, 6>(), multiply_bytes<1, 4, 7>();
                                multiply_bytes<2, 5, 6>(), multiply_bytes<3, 5, 7>();
                            } else {
                                multiply_bfloat16<0, 4, 6>(), multiply_bfloat16<1, 4, 7>();
                                multiply_bfloat16<2, 5, 6>(), multiply_bfloat16<3, 5, 7>();
                            }
                        }
                        store_tile<0>(c, 64), store_tile<1>(c + 256, 64), store_tile<2>(c + 512, 64), store_tile<3>(c + 768, 64);
                    }
                }
                for (int64_t r = 0; r < rows; r += 16)
                    for (int64_t half = 0; half < 2; half++) {
                        const int64_t token = (panel + half) * 16, row = first + r;
                        Words v[16];
#pragma GCC unroll 16
                        for (int i = 0; i < 16; i++) v[i] = load<Words>(sums + r * 32 + half * 256 + i * 16);
                        transpose<8>(v);
                        for (int64_t j = 0; j < 16 && token + j < n; j++) {
                            Floats total = BYTES ? __builtin_convertvector(Ints(v[j]), Floats) * ones[token + j] : Floats(v[j]);
                            if constexpr (SCALED) total *= load<Floats>(scales + r);
                            uint16_t *to = out + (token + j) * m.rows + row, some[16];
                            if (row + 16 <= m.rows) put(to, total);
                            else put(some, total), std::copy(some, some + std::max<int64_t>(0, m.rows - row), to);
                        }
                    }
            }
        }
        end_tiles();
    }
}

// Attention -----------------------------------------------------------------------------------------------------------
//
// As kernels.cpp has it, over a cache of bfloat16. Sixteen queries are the lanes: keys (rows of a tile) times them are scores
// by slot and query, so that a softmax is made of whole vectors, and its weights, two slots in a word, are the second factor
// for the values, which are turned so that their rows are head dimensions.

// 2^x as weights of bfloat16 need it, within 2^-13.7 of it; 0 where that is less than a float32 has.
inline Floats power_of_two(Floats x) {
#if defined(__AVX512DQ__)
    const Floats r = Floats(_mm512_reduce_ps(__m512(x), _MM_FROUND_TO_NEG_INF)), zero = {};  // what is above a whole number
    Floats p = add_product(zero + 0.22606716f, r, zero + 0.07802452f);  // the cubic that is least off, in proportion
    p = add_product(zero + 0.99992522f, r, add_product(zero + 0.69583354f, r, p));
    return Floats(_mm512_scalef_ps(__m512(p), __m512(x)));  // 2^floor(x) times it
#else
    return exponential(x * 0.69314718f);
#endif
}

// Of two vectors each number of bfloat16 beside the other's.
inline Words in_pairs(Floats one, Floats next) {
#if defined(MULTIPLIES_BFLOAT16) && defined(__AVX512BW__)
    const Words beside = {0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                          0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f};
    auto both = __m512i(_mm512_cvtne2ps_pbh(__m512(next), __m512(one)));
    return Words(_mm512_permutexvar_epi16(__m512i(beside), both));
#else
    return narrowed(one) | narrowed(next) << 16;
#endif
}

// Queries of a kv head, and what they see of a row of the cache.
struct TiledQueries {
    static constexpr int64_t AT_A_TIME = 256;  // slots
    int64_t D, count, steps, rows, sixteens;
    const uint16_t *keys, *values;
    std::vector<uint8_t> room;
    std::vector<uint16_t> numbers;         // (16, D): queries that are not laid out yet
    std::vector<int32_t> ends;             // how many slots each query sees
    std::vector<float> sums, most, total;  // of each sixteen: (D, 16), (16) and (16)
    uint8_t *laid_out, *turned_values, *weights, *last_keys;

    void begin(int64_t head_dim, int64_t queries, const void* own_keys, const void* own_values) {
        D = head_dim, count = queries, steps = D / 32, rows = D / 16, sixteens = (count + 15) / 16;
        keys = static_cast<const uint16_t*>(own_keys), values = static_cast<const uint16_t*>(own_values);
        ask_for(values);
        laid_out = lines(room, (sixteens * steps + AT_A_TIME / 32 * (rows + 1)) * TILE + 64 * D);
        turned_values = laid_out + sixteens * steps * TILE, weights = turned_values + AT_A_TIME / 32 * rows * TILE;
        last_keys = weights + AT_A_TIME / 32 * TILE;
        at_least(numbers, 16 * D), ends.assign(sixteens * 16, 0);
        sums.assign(sixteens * D * 16, 0), most.assign(sixteens * 16, NEVER), total.assign(sixteens * 16, 0);
    }

    // The queries of a sixteen, `some` of them, which are `stride` bytes apart.
    void bring(int64_t sixteen, const uint16_t* from, int64_t stride, int64_t some) {
        lay_out<16>(reinterpret_cast<const uint8_t*>(from), stride, 2 * D, laid_out + sixteen * steps * TILE, some);
    }

    // LANES pairs of a query's numbers, from d on; it sees so many slots, no fewer than the one before it.
    void bring(int64_t query, int64_t d, Floats first, Floats second, int64_t seen) {
        const Words pairs = in_pairs(first, second);
        std::memcpy(numbers.data() + query % 16 * D + d, &pairs, sizeof pairs);
        if (d == 0) std::fill(ends.begin() + query, ends.end(), int32_t(seen));  // and those that fill up the sixteen
        if (d + 2 * LANES == D && (query % 16 == 15 || query == count - 1))
            bring(query / 16, numbers.data(), 2 * D, query % 16 + 1);
    }

    void ask_for(const uint16_t* slots) const {  // 32 of them
        for (int64_t i = 0; i < 32 * D; i += 32) __builtin_prefetch(slots + i);
    }

    // Slots of values, 32 at a time, as tiles of 16 head dimensions by 32 slots: of 32 dimensions the even ones, then the odd
    // ones. Slots that are not there are 0. The next ones are asked for meanwhile, and at the end `soon`.
    void turn_values(const uint16_t* from, int64_t there, const uint16_t* soon) {
        uint8_t* to = turned_values;
        for (int64_t first = 0; first < there; first += 32) {
            ask_for(first + 32 < there ? from + (first + 32) * D : soon);
            for (int64_t d = 0; d < D; d += 32, to += 2 * TILE) {
                Words even[16], odd[16];
#pragma GCC unroll 16
                for (int k = 0; k < 16; k++) {
                    const int64_t slot = first + 2 * k;
                    const Words one = slot < there ? load<Words>(from + slot * D + d) : Words{};
                    const Words next = slot + 1 < there ? load<Words>(from + (slot + 1) * D + d) : Words{};
                    even[k] = (one & 0xffffu) | next << 16, odd[k] = one >> 16 | (next & 0xffff0000u);
                }
                transpose<8>(even), transpose<8>(odd);
                std::memcpy(to, even, TILE), std::memcpy(to + TILE, odd, TILE);
            }
        }
    }

    // A sixteen meets `there` slots, of which its queries see those before their `end`. The next are asked for as above.
    void meet(int64_t sixteen, const uint16_t* from, Ints end, int64_t there, const uint16_t* soon) {
        alignas(64) float scores[AT_A_TIME * 16];
        const uint8_t* q = laid_out + sixteen * steps * TILE;
        for (int64_t slot = 0; slot < there; slot += 32) {
            const void* here = from + slot * D;
            if (slot + 32 < there) ask_for(from + (slot + 32) * D);
            else if (soon) ask_for(soon);
            if (slot + 32 > there) here = std::memcpy(last_keys, here, 2 * D * (there - slot));
            clear_tile<0>(), clear_tile<1>();
            for (int64_t s = 0; s < steps; s++) {
                const auto* step = static_cast<const uint8_t*>(here) + s * 64;
                load_tile<6>(q + s * TILE, 64), load_tile<4>(step, 2 * D), load_tile<5>(step + 32 * D, 2 * D);
                multiply_bfloat16<0, 4, 6>(), multiply_bfloat16<1, 5, 6>();
            }
            store_tile<0>(scores + slot * 16, 64), store_tile<1>(scores + slot * 16 + 256, 64);
        }
        // A weight is 2 to the power of its score, in units that make it e to that over the root of D.
        const Floats zero = {}, never = zero + NEVER, before = load<Floats>(&most[sixteen * 16]);
        const Floats unit = zero + 1.44269504f / std::sqrt(float(D));
        const int64_t by_all = std::clamp<int64_t>(end[0], 0, there) / 2 * 2;  // slots that all see
        auto score = [&](int64_t slot) { return load<Floats>(scores + slot * 16); };
        auto higher = [](Floats a, Floats b) { return a > b ? a : b; };
        Floats highest = before, second = never, added = {};
        for (int64_t slot = 0; slot < by_all; slot += 2)
            highest = higher(score(slot), highest), second = higher(score(slot + 1), second);
        highest = higher(second, highest);
        for (int64_t slot = by_all; slot < there; slot++)
            highest = higher(end > int32_t(slot) ? score(slot) : never, highest);
        const Floats offset = zero - highest * unit;
        auto weight = [&](int64_t slot) { return power_of_two(add_product(offset, score(slot), unit)); };
        auto put_pair = [&](int64_t slot, Floats one, Floats next) {
            added += one + next;
            Words pair = in_pairs(one, next);
            std::memcpy(weights + slot * 32, &pair, 64);
        };
        for (int64_t slot = 0; slot < by_all; slot += 2) put_pair(slot, weight(slot), weight(slot + 1));
        for (int64_t slot = by_all; slot < (there + 31) / 32 * 32; slot += 2) {
            Floats two[2] = {};
            for (int i = 0; i < 2; i++)
                if (slot + i < there) two[i] = end > int32_t(slot + i) ? weight(slot + i) : zero;
            put_pair(slot, two[0], two[1]);
        }
        float* sum = &sums[sixteen * D * 16];
        if (std::memcmp(&before, &highest, sizeof before) != 0) {
            // Not of a query whose highest stays: as power_of_two has it, 2^0 is a little less than 1.
            const Floats fade = before == highest ? zero + 1.0f : power_of_two(add_product(offset, before, unit));
            for (int64_t i = 0; i < D * 16; i += 16) store(sum + i, load<Floats>(sum + i) * fade);
            store(&most[sixteen * 16], highest);
            added += load<Floats>(&total[sixteen * 16]) * fade;
        } else {
            added += load<Floats>(&total[sixteen * 16]);
        }
        store(&total[sixteen * 16], added);
        for (int64_t d = 0; d < rows; d += 2, sum += 512) {
            load_tile<0>(sum, 64), load_tile<1>(sum + 256, 64);
            for (int64_t slot = 0; slot < there; slot += 32) {
                const uint8_t* v = turned_values + (slot / 32 * rows + d) * TILE;
                load_tile<6>(weights + slot * 32, 64), load_tile<4>(v, 64), load_tile<5>(v + TILE, 64);
                multiply_bfloat16<0, 4, 6>(), multiply_bfloat16<1, 5, 6>();
            }
            store_tile<0>(sum, 64), store_tile<1>(sum + 256, 64);
        }
    }

    void look() {
        begin_tiles(Shapes());
        for (int64_t slot = 0; slot < ends.back(); slot += AT_A_TIME) {
            const int64_t there = std::min<int64_t>(AT_A_TIME, ends.back() - slot), next = slot + AT_A_TIME;
            turn_values(values + slot * D, there, keys + slot * D);
            for (int64_t i = 0; i < sixteens; i++) {
                const Ints end = load<Ints>(&ends[i * 16]) - int32_t(slot);
                const uint16_t* soon = i == 0 && next < ends.back() ? values + next * D : nullptr;
                const int64_t seen = std::min<int64_t>(there, end[15]);
                if (seen > 0) meet(i, keys + slot * D, end, seen, soon);
            }
        }
        end_tiles();
    }

    // Calls use(query, d, what it has of the LANES head dimensions from d on).
    template <class Use>
    void take(Use use) const {
        for (int64_t i = 0; i < sixteens; i++)
            for (int64_t d = 0; d < D; d += 32) {
                const Floats one = 1.0f / load<Floats>(&total[i * 16]);
                auto numbers = [&](int64_t row) { return Words(load<Floats>(&sums[(i * D + d + row) * 16]) * one); };
                Words even[16], odd[16];
#pragma GCC unroll 16
                for (int k = 0; k < 16; k++) even[k] = numbers(k), odd[k] = numbers(16 + k);
                transpose<8>(even), transpose<8>(odd);
                for (int64_t j = 0; j < std::min<int64_t>(16, count - i * 16); j++) {
                    Floats first = Floats(even[j]), second = Floats(odd[j]);
                    pair_up(first, second);
                    use(i * 16 + j, d, first), use(i * 16 + j, d + 16, second);
                }
            }
    }
};

struct TiledAttention {
    const Prompt& p;
    const int64_t group = p.heads / p.kv_heads;
    TiledQueries queries;
    explicit TiledAttention(const Prompt& prompt) : p(prompt) {}

    // Tokens first to last of a row, by the query heads of a kv head: of each, sixteen tokens together.
    void operator()(int64_t row, int64_t kv_head, int64_t first, int64_t last) {
        const int64_t tokens = last - first, sixteens = (tokens + 15) / 16, of_head = row * p.kv_row + kv_head * p.kv_head;
        const auto* q = static_cast<const uint16_t*>(p.q) + row * p.q_row + kv_head * group * p.q_head + first * p.q_token;
        queries.begin(p.head_dim, group * sixteens * 16, static_cast<const uint16_t*>(p.keys) + of_head,
                      static_cast<const uint16_t*>(p.values) + of_head);
        for (int64_t i = 0; i < group * sixteens; i++) {
            const int64_t token = i % sixteens * 16;
            for (int64_t j = 0; j < 16; j++)
                queries.ends[i * 16 + j] = int32_t(p.starts[row] + first + std::min(token + j + 1, tokens));
            queries.bring(i, q + i / sixteens * p.q_head + token * p.q_token, 2 * p.q_token,
                          std::min<int64_t>(16, tokens - token));
        }
        queries.look();
        queries.take([&](int64_t i, int64_t d, Floats numbers) {
            const int64_t token = first + i % (sixteens * 16), head = kv_head * group + i / (sixteens * 16);
            auto* out = static_cast<uint16_t*>(p.out) + ((row * p.tokens + token) * p.heads + head) * p.head_dim;
            if (token < last) put(out + d, numbers);
        });
    }
};
#endif
