// Weights of 4 bits by vectors, where a processor multiplies bytes (VNNI of x86). A part of kernels.cpp.
//
// Groups of 32 columns and more have a scale each, so their sums are short, and to scale and to add up each by itself takes
// as long as its products. Therefore lanes are rows here: of sixteen rows sixteen bytes each are read, 32 columns, and turned
// over into four vectors of a word of every row. The sum over a group stays in its lane, and is scaled together with those of
// the other rows. A word of x is the same for all lanes. int4's codes are bytes, and meet x's upper bytes and its lower ones;
// int4-dynamic's meet x in 8 bits, of which each group has a unit of its own, so that there is half as much to multiply.
//
// Several vectors take as long as it takes to multiply, and meet rows that lie beside each other: what comes next is asked
// for in one stream meanwhile. One or two take as long as memory, which gives more in several streams: then rows are far
// apart. To turn costs too much where vectors are shorter, or bytes are multiplied in more than one instruction.

// How a kind of weight meets vectors in lanes that are rows.
template <class W>
struct Turned {
    static constexpr bool HERE = false;
};

// As `product`, by weights of 4 bits.
template <class K, class Done>
void product_by_rows(Thread& me, const Matrix& m, const float* x, int64_t n, std::initializer_list<Part> parts, Done done);

#if defined(MULTIPLIES_BYTES) || defined(EMULATED_TILES)

typedef uint16_t Eight __attribute__((vector_size(16)));
typedef uint8_t Sixteen __attribute__((vector_size(16)));
typedef uint64_t Pair __attribute__((vector_size(16)));

// A word of eight weights is multiplied in some vectors of Numbers, by as many words of x, WORDS for 32 columns, as `words`
// makes them of eight numbers. Every second one is added up by itself: where these are x's upper bytes and its lower ones
// (SPLIT), the first sum counts 256 times. A lane has room for the sum of a group. Of x, SHARED columns are rounded together,
// or those of a group (BY_GROUP); its whole numbers have SHIFT bits before them in the words that they come in.
struct TurnedFours {
    static constexpr int64_t bytes(int64_t columns) { return columns / 2; }
};

struct TurnedInt4 : TurnedFours {
    using Numbers = Bytes;
    static constexpr bool OFFSET = true, SPLIT = true, BY_GROUP = false;
    static constexpr int WORDS = 16, LIMIT = TWO_BYTES, SHIFT = 16;
    static constexpr float UNIT = 1;
    // Of sixteen bytes each of every fourth row: their first words, their second ones, and so on.
    static void turn(const Words (&fourth)[4], Words (&words)[4]) {
        typedef uint64_t Pairs __attribute__((vector_size(4 * LANES)));
        Words half[4];
        Pairs pairs[4];
        zip(fourth[0], fourth[1], half[0], half[1]), zip(fourth[2], fourth[3], half[2], half[3]);
        zip(Pairs(half[0]), Pairs(half[2]), pairs[0], pairs[1]), zip(Pairs(half[1]), Pairs(half[3]), pairs[2], pairs[3]);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) words[i] = Words(pairs[i]);
    }
    static Bytes get(Words word, int vector) { return Bytes(vector < 2 ? word : word >> 4) & uint8_t(15); }
    static Eight words(Eight x) {
        const Eight carried = x + uint16_t(128);  // to the upper byte, of a lower one with a sign
        const Sixteen bytes = Sixteen((carried & uint16_t(0xff00)) | (x & uint16_t(255)));
        return Eight(pick<3, 7, 11, 15, 2, 6, 10, 14, 1, 5, 9, 13, 0, 4, 8, 12>(bytes, bytes));
    }
};

struct TurnedInt4Dynamic : TurnedInt4 {
    static constexpr bool SPLIT = false, BY_GROUP = true;
    static constexpr int WORDS = 8, LIMIT = 127, SHIFT = 24;
    static Bytes get(Words word, int vector) { return TurnedInt4::get(word, 2 * vector); }
    static uint64_t words(Eight x) {
        const Sixteen bytes = Sixteen(x);
        return Pair(pick<2, 6, 10, 14, 0, 4, 8, 12, 2, 6, 10, 14, 0, 4, 8, 12>(bytes, bytes))[0];
    }
};

struct TurnedNf4 : TurnedFours {
    using Numbers = Shorts;
    static constexpr bool OFFSET = false, SPLIT = false, BY_GROUP = false;
    static constexpr int WORDS = 16, LIMIT = 16383;  // 64 * 2047 * 16383 < 2^31
    static constexpr float UNIT = 1.0f / 2047;
    static constexpr Levels LEVELS{2047};
    // Two bytes of every row, and the next two: a level's bytes are looked up by themselves, and come together between.
    static void turn(const Words (&fourth)[4], Words (&words)[4]) {
        Halves even[2], odd[2], turned[4];
        zip(Halves(fourth[0]), Halves(fourth[2]), even[0], even[1]), zip(Halves(fourth[1]), Halves(fourth[3]), odd[0], odd[1]);
        zip(even[0], odd[0], turned[0], turned[1]), zip(even[1], odd[1], turned[2], turned[3]);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) words[i] = Words(turned[i]);
    }
    static Shorts get(Words word, int vector) {
        const Bytes codes = Bytes(vector < 2 ? word : word >> 4) & uint8_t(15);
        Bytes first, second;
        zip(look_up(LEVELS.lower, codes), look_up(LEVELS.upper, codes), first, second);
        return Shorts(vector % 2 ? second : first);
    }
    static Eight words(Eight x) { return pick<1, 3, 5, 7, 0, 2, 4, 6>(x, x); }
};

template <int GROUP>
struct Turned<Int4<GROUP>> {
    static constexpr bool HERE = true;
    using Kind = TurnedInt4;
    using Dynamic = TurnedInt4Dynamic;
};
template <int GROUP>
struct Turned<Nf4<GROUP>> {
    static constexpr bool HERE = true;
    using Kind = TurnedNf4;
};

// Sixteen bytes of every fourth of LANES rows.
inline Words every_fourth(const uint8_t* rows, int64_t apart) {
#ifdef __AVX512F__
    __m512i v = _mm512_castsi128_si512(load<__m128i>(rows));
    v = _mm512_mask_broadcast_i32x4(v, 0x00f0, load<__m128i>(rows + 4 * apart));
    v = _mm512_mask_broadcast_i32x4(v, 0x0f00, load<__m128i>(rows + 8 * apart));
    return Words(_mm512_mask_broadcast_i32x4(v, 0xf000, load<__m128i>(rows + 12 * apart)));
#else
    uint8_t all[4 * LANES];
    for (int i = 0; i < LANES / 4; i++) std::memcpy(all + 16 * i, rows + 4 * i * apart, 16);
    return load<Words>(all);
#endif
}

// Of LANES rows, so many bytes apart, sixteen bytes, turned over as K wants them.
template <class K>
inline void turn(const uint8_t* rows, int64_t apart, Words (&words)[4]) {
    Words fourth[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) fourth[i] = every_fourth(rows + i * apart, apart);
    K::turn(fourth, words);
}

// Of LANES rows, so many numbers of bfloat16 apart, eight numbers, or `count` where a row has no more.
inline void turn(const uint16_t* rows, int64_t apart, int64_t count, Floats (&numbers)[8]) {
    Words words[4];
    if (count >= 8) {
        turn<TurnedInt4>(reinterpret_cast<const uint8_t*>(rows), 2 * apart, words);
    } else {
        uint16_t some[8 * LANES] = {};
        for (int r = 0; r < LANES; r++)
            for (int64_t i = 0; i < count; i++) some[8 * r + i] = rows[r * apart + i];
        turn<TurnedInt4>(reinterpret_cast<const uint8_t*>(some), 16, words);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) numbers[i] = Floats(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
}

// Vectors that are multiplied together, laid out for it: of each 32 columns WORDS words of one after those of the other;
// then the sums of each group, where there is an offset; then what a 1 is of each SHARED columns, or each group.
template <class K>
struct Together {
    int64_t sums, units, size;
    Together(const Matrix& m, int64_t vectors) {
        const int64_t groups = m.columns / m.group;
        sums = m.columns / 32 * K::WORDS * vectors, units = sums + (K::OFFSET ? groups * vectors : 0);
        size = units + (K::BY_GROUP ? groups : (m.columns + SHARED - 1) / SHARED) * vectors;
    }
};

// A vector to its places among others, by its number.
template <class K>
void place_among(const Matrix& m, const float* x, int64_t number, int64_t vectors, float* placed) {
    typedef int32_t EightWide __attribute__((vector_size(32)));
    const Together<K> places(m, vectors);
    float *words = placed + K::WORDS * number, *sums = placed + places.sums + number, *units = placed + places.units + number;
    int32_t numbers[SHARED] = {};
    const int64_t together = K::BY_GROUP ? m.group : SHARED;
    for (int64_t shared = 0; shared < m.columns; shared += together, units += vectors) {
        const int64_t count = std::min(together, m.columns - shared);
        *units = round_together(x + shared, count, K::LIMIT, numbers) * K::UNIT;
        for (int64_t i = 0; i < count; i += 32, words += K::WORDS * vectors)
            for (int k = 0; k < 4; k++) {
                const auto some = K::words(__builtin_convertvector(load<EightWide>(numbers + i + 8 * k), Eight));
                std::memcpy(words + K::WORDS / 4 * k, &some, sizeof some);
            }
        if constexpr (K::OFFSET)
            for (int64_t i = 0; i < count; i += m.group, sums += vectors) {
                Ints all = {};
                for (int64_t g = 0; g < m.group; g += LANES) all += load<Ints>(numbers + i + g) << K::SHIFT >> K::SHIFT;
                *sums = sum(__builtin_convertvector(all, Floats));  // which has whole numbers up to 2^24
                if constexpr (K::BY_GROUP) *sums *= *units;
            }
    }
}

inline Floats all_lanes(const float* number) { return Floats(Words{} + load<uint32_t>(number)); }

// LANES rows, `apart` from each other, times X vectors: each pair adds up in the same order, however many there are. Of one
// or two vectors the rows' own next bytes are asked for; of more what lies at `ahead`, `more` for each 32 columns.
template <class K, int X>
inline void multiply_rows(
    const Matrix& m, int64_t row, int64_t apart, const float* x, const uint8_t* ahead, int64_t more, Floats (&sums)[X]) {
    using Numbers = typename K::Numbers;
    constexpr bool FEW = X < 3;
    constexpr int CHAINS = FEW ? 4 : 2;  // of products, each of which waits for the one before
    const Together<K> places(m, X);
    const int64_t groups = m.columns / m.group, between = apart * K::bytes(m.columns);
    const uint8_t* codes = static_cast<const uint8_t*>(m.codes) + row * K::bytes(m.columns);
    const uint16_t *scale = m.scale + row * groups, *zero = K::OFFSET ? m.zero + row * groups : nullptr;
    const float* words_of_x = x;
    int64_t time = 0;
    // A row's line is asked for once in the four times that sixteen bytes are read of it: a quarter of the rows at a time.
    auto ask_for_rows = [&](const void* rows, int64_t bytes, int64_t time, int64_t further) {
        const auto* quarter = static_cast<const uint8_t*>(rows) + time % 4 * (LANES / 4) * bytes;
#pragma GCC unroll 4
        for (int r = 0; r < LANES / 4; r++) __builtin_prefetch(quarter + r * bytes + further, 0, 3);
    };
    auto ask_for = [&](const void* from, int64_t bytes) {
#pragma GCC unroll 4
        for (int i = 0; i < LANES / 4; i++)
            __builtin_prefetch(static_cast<const uint8_t*>(from) + i * bytes / (LANES / 4), 0, 2);
    };
#pragma GCC unroll 8
    for (int j = 0; j < X; j++) sums[j] = Floats{};
    for (int64_t shared = 0; shared < groups; shared += SHARED / m.group) {
        const int64_t end = std::min(groups, shared + SHARED / m.group);
        Floats part[X] = {};
        for (int64_t eight = shared; eight < end; eight += 8) {
            const int64_t first = std::max<int64_t>(0, std::min(eight, groups - 8));
            Floats scales[8], offsets[8];
            if constexpr (FEW) ask_for_rows(scale + eight, 2 * apart * groups, eight / 8, 64);
            else ask_for(scale + LANES * (groups + eight), 16 * LANES);
            turn(scale + first, apart * groups, groups, scales);
            if constexpr (K::OFFSET) {
                if constexpr (FEW) ask_for_rows(zero + eight, 2 * apart * groups, eight / 8, 64);
                else ask_for(zero + LANES * (groups + eight), 16 * LANES);
                turn(zero + first, apart * groups, groups, offsets);
                for (int i = 0; i < 8; i++) offsets[i] -= 8.0f * scales[i];
            }
            for (int64_t g = eight; g < std::min(end, eight + 8); g++) {
                Ints whole[CHAINS][X] = {};
#pragma GCC unroll 1
                for (int64_t c = 0; c < m.group; c += 32, codes += 16, words_of_x += K::WORDS * X, time++) {
                    ask_for_rows(codes, between, time, FEW ? 256 : 64);
                    if constexpr (!FEW) ask_for(ahead, more), ahead += more;
                    Words words[4];
                    turn<K>(codes, between, words);
#pragma GCC unroll 16
                    for (int i = 0; i < K::WORDS; i++) {
                        const Numbers w = once(K::get(words[i / (K::WORDS / 4)], i % (K::WORDS / 4)));
#pragma GCC unroll 8
                        for (int j = 0; j < X; j++) {
                            const Words number = Words{} + load<uint32_t>(words_of_x + K::WORDS * j + i);
                            Ints& sum = whole[i % CHAINS][j];
                            sum = add_product(sum, w, Numbers(number));
                        }
                    }
                }
#pragma GCC unroll 8
                for (int j = 0; j < X; j++) {
                    Ints first_sum = whole[0][j], second_sum = whole[1][j];
                    if constexpr (CHAINS == 4) first_sum += whole[2][j], second_sum += whole[3][j];
                    const Ints all = (K::SPLIT ? first_sum << 8 : first_sum) + second_sum;
                    Floats wide = __builtin_convertvector(once(all), Floats);
                    if constexpr (K::BY_GROUP) wide *= all_lanes(x + places.units + g * X + j);
                    part[j] = add_product(part[j], scales[g - first], wide);
                }
                if constexpr (K::OFFSET)
#pragma GCC unroll 8
                    for (int j = 0; j < X; j++)
                        part[j] = add_product(part[j], offsets[g - first], all_lanes(x + places.sums + g * X + j));
            }
        }
        const float* units = x + places.units + shared / (SHARED / m.group) * X;
#pragma GCC unroll 8
        for (int j = 0; j < X; j++) {
            if constexpr (K::BY_GROUP) sums[j] += part[j];
            else sums[j] = add_product(sums[j], all_lanes(units + j), part[j]);
        }
    }
}

template <class K, class Done>
void product_by_rows(Thread& me, const Matrix& m, const float* x, int64_t n, std::initializer_list<Part> parts, Done done) {
    constexpr int MOST = 8;  // as many as there are registers for
    static thread_local std::vector<float> room;
    const int64_t passes = (n + MOST - 1) / MOST, each = n / passes, rest = n % passes, size = K::bytes(m.columns);
    const int64_t of_pass = (Together<K>(m, each + 1).size + 15) / 16 * 16;
    auto first_of = [&](int64_t pass) { return pass * each + std::min(pass, rest); };
    float* placed = lines(room, passes * of_pass);
    for (int64_t pass = 0; pass < passes; pass++)
        for (int64_t j = first_of(pass); j < first_of(pass + 1); j++)
            place_among<K>(m, x + j * m.columns, j - first_of(pass), first_of(pass + 1) - first_of(pass), placed + pass * of_pass);

    auto make = [&](int64_t row, int64_t apart, const Target& target) {  // 0 apart: one row
        const uint8_t* next = static_cast<const uint8_t*>(m.codes) + (row + LANES) * size;
        for (int64_t pass = 0; pass < passes; pass++) {
            const int64_t first = first_of(pass);
            with_count<MOST>(first_of(pass + 1) - first, [&](auto vectors) {
                Floats sums[vectors];
                const uint8_t* ahead = next + pass * (LANES * size / passes);
                multiply_rows<K, vectors>(m, row, apart, placed + pass * of_pass, ahead, LANES * 16 / passes, sums);
                for (int j = 0; j < vectors; j++)
                    if (apart == 1) put_rows(target, first + j, row, LANES, sums[j]);
                    else for (int r = 0; r < (apart ? LANES : 1); r++) target(first + j, row + r * apart, sums[j][r]);
            });
        }
    };
    const int64_t pieces = pieces_of<K>(m, me.count);
    me.share_out(pieces, [&](int64_t whose, int64_t i) {
        int64_t row, last;
        me.share(m.rows / int64_t(parts.size()), whose, row, last);
        const int64_t whole = (last - row) / LANES;
        auto cut = [&](int64_t piece) {  // an odd number of times LANES after the one before, where that can be
            const int64_t at = whole * piece / pieces;
            return row + LANES * (piece < pieces && whole > 2 * pieces ? at - ((at ^ piece) & 1) : at);
        };
        const int64_t from = cut(i), to = cut(i + 1), end = i == pieces - 1 ? last : to;
        // Odd, too: rows whose addresses end alike fight for their places in the first cache.
        const int64_t gap = n < 3 && to > from ? ((to - from) / LANES - 1) | 1 : 0;
        for (const Part& part : parts) {
            const int64_t first = part.first + from;
            for (int64_t k = 0; k < gap; k++) make(first + k, gap, part.target);
            for (int64_t k = gap * LANES; k < to - from; k += LANES) make(first + k, 1, part.target);
            for (int64_t k = to - from; k < end - from; k++) make(first + k, 0, part.target);
        }
        done(from, end);
    });
}
#endif
