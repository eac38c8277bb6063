// A step of a few tokens: the transformer's blocks, and products by weights of 32, 16, 8 and 4 bits. And what a prompt needs
// besides products, which are the framework's.
//
// Writing a token multiplies a few vectors by every weight of the model. What takes the time is to read the weights, as
// long as nothing else gets in the way; and with a framework's operators something does: each costs some microseconds to
// begin, and few of them read 16, 8 or 4 bits at the speed of memory on every processor. So here a whole step is one call.
// Its threads stay together from the first block to the last and meet where one needs what the others made. Weights are
// widened in registers, on their way from memory; what is added up is float32, in steps of 8 and 4 bits whole numbers.
//
// Nothing here depends on PyTorch or on a processor: vectors are GCC's (Clang has them too), LANES numbers wide, and the
// compiler turns them into what there is; where x86 has an instruction that it would not find, that is called by name.
// Letters are those of model.py: B rows of T new tokens each, n = B * T tokens, H query heads, K kv heads, D head dim, S
// slots.

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef LANES
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#endif

#if LANES == 16 && defined(__AVX512BF16__)
#define MULTIPLIES_BFLOAT16
#endif
#if LANES == 16 && defined(__AVX512VNNI__)
#define MULTIPLIES_BYTES
#endif

using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint8_t;

// What Python hands over. library.py has the same fields.

struct Matrix {  // N rows (outputs) of C columns (inputs)
    const void* codes;
    const uint16_t* scale;  // bfloat16: of a row (8 bits), or of each group of a row (4 bits)
    const uint16_t* zero;   // bfloat16, of each group
    int64_t kind, rows, columns, group;
};

struct Block {
    const float *attention_norm, *ffn_norm;
    Matrix wqkv, wo, w13, w2;  // wq over wk over wv, and w1 over w3
    void *keys, *values;       // (rows of the cache, K, S, D)
};

struct Prompt {  // queries (B, T, H, D) at any strides, counted in numbers; keys and values (B, K, S, D)
    const void *q, *keys, *values;
    void* out;              // (B, T, H, D)
    const int64_t* starts;  // (B)
    int64_t kind, rows, tokens, heads, kv_heads, head_dim, q_row, q_token, q_head, kv_row, kv_head, threads;
};

struct Step {
    int64_t rows, tokens, dim, heads, kv_heads, head_dim, hidden, slots, cache_kind, threads;
    float eps;
    int64_t vocabulary, embedding_kind;
    const void* embedding;       // (V, dim)
    const int64_t* ids;          // (n): the tokens
    const int64_t* starts;       // (B): the position of each row's first new token
    const float *norm;           // after the last block
    const float *cos, *sin;      // (S, D/2)
    float *qkv, *mixed, *gated;  // room for n tokens: (H + 2K) * D, H * D, and 2 * hidden numbers of each
};

namespace {

enum Kind : int64_t { FLOAT32, BFLOAT16, INT8, INT8_DYNAMIC, INT4, INT4_DYNAMIC, NF4 };

// Vectors -------------------------------------------------------------------------------------------------------------

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));  // twice as many
typedef uint16_t Halves __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(4 * LANES)));

template <class V>
inline V load(const void* at) {  // from any address
    V v;
    std::memcpy(&v, at, sizeof v);
    return v;
}

// Keeps the compiler from reading a number anew from memory for each use of it.
template <class V>
inline V once(V v) {
#if LANES == 16 && defined(__AVX512F__)
    asm("" : "+v"(v));  // any of 32 registers
#elif (LANES == 8 && defined(__AVX__)) || (LANES == 4 && defined(__SSE__))
    asm("" : "+x"(v));
#endif
    return v;
}

inline void store(float* at, Floats v) { std::memcpy(at, &v, sizeof v); }

// In one instruction, rounded once, in every tile: GCC takes two where it finds them quicker.
inline Floats add_product(Floats sum, Floats a, Floats b) {
#if LANES == 16 && defined(__AVX512F__)
    return Floats(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(sum)));
#elif LANES == 8 && defined(__FMA__)
    return Floats(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(sum)));
#elif LANES == 4 && defined(__FMA__)
    return Floats(_mm_fmadd_ps(__m128(a), __m128(b), __m128(sum)));
#else
    return sum + a * b;
#endif
}

// Of whole numbers, to each lane the two products that it holds. x86 has an instruction for it that GCC doesn't find.
inline Ints add_product(Ints sum, Shorts a, Shorts b) {
#ifdef MULTIPLIES_BYTES
    return Ints(_mm512_dpwssd_epi32(__m512i(sum), __m512i(a), __m512i(b)));
#elif LANES == 16 && defined(__AVX512BW__)
    return sum + Ints(_mm512_madd_epi16(__m512i(a), __m512i(b)));
#elif LANES == 8 && defined(__AVX2__)
    return sum + Ints(_mm256_madd_epi16(__m256i(a), __m256i(b)));
#elif LANES == 4 && defined(__SSE2__)
    return sum + Ints(_mm_madd_epi16(__m128i(a), __m128i(b)));
#else
    Ints left = load<Ints>(&a), right = load<Ints>(&b);
    return sum + (left << 16 >> 16) * (right << 16 >> 16) + (left >> 16) * (right >> 16);
#endif
}

// Of bytes, the second with a sign, the four that each lane holds.
inline Ints add_product(Ints sum, Bytes a, Bytes b) {
#ifdef MULTIPLIES_BYTES
    return Ints(_mm512_dpbusd_epi32(__m512i(sum), __m512i(a), __m512i(b)));
#else
    for (int i = 0; i < 4 * LANES; i++) sum[i / 4] += a[i] * int8_t(b[i]);
    return sum;
#endif
}

// Of bfloat16, which is the upper half of a float32, to each lane the two products that it holds.
inline Floats add_product(Floats sum, Halves a, Halves b) {
#ifdef MULTIPLIES_BFLOAT16
    return Floats(_mm512_dpbf16_ps(__m512(sum), __m512bh(a), __m512bh(b)));
#else
    Words first[2] = {Words(a) << 16, Words(b) << 16}, second[2] = {Words(a) & 0xffff0000u, Words(b) & 0xffff0000u};
    return sum + Floats(first[0]) * Floats(first[1]) + Floats(second[0]) * Floats(second[1]);
#endif
}

inline float widen(uint16_t half) {
    uint32_t bits = uint32_t(half) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

inline uint16_t narrow(float wide) {  // to the nearest bfloat16, of two the even one
    uint32_t bits;
    std::memcpy(&bits, &wide, 4);
    if (wide != wide) return uint16_t(bits >> 16 | 64);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void as_number(float wide, float& number) { number = wide; }
inline void as_number(float wide, uint16_t& number) { number = narrow(wide); }

inline void put(float* at, Floats v) { store(at, v); }

typedef uint16_t Narrow __attribute__((vector_size(2 * LANES)));

inline Words narrowed(Floats v) {  // as `narrow`, of numbers and of the NaNs that arithmetic makes
    Words bits = Words(v);
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

inline void put(uint16_t* at, Floats v) {
#ifdef MULTIPLIES_BFLOAT16
    auto narrow = _mm512_cvtneps_pbh(__m512(v));
#else
    Narrow narrow = __builtin_convertvector(narrowed(v), Narrow);
#endif
    std::memcpy(at, &narrow, sizeof narrow);
}

inline Floats widened(const uint16_t* at) { return Floats(__builtin_convertvector(load<Narrow>(at), Words) << 16); }

typedef float Four __attribute__((vector_size(16)));

inline float sum(Floats v) {
    Four parts[LANES / 4];
    std::memcpy(parts, &v, sizeof v);
    Four four = parts[0];
    for (int i = 1; i < LANES / 4; i++) four += parts[i];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// Lanes of two vectors by number, the second's after the first's.
template <int... LANE, class V>
inline V pick(V a, V b) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, LANE...);
#else
    return __builtin_shuffle(a, b, decltype(a == b){LANE...});
#endif
}

// Of each sixteen bytes of two vectors eight (the first, or the second), numbers of both in turn.
template <int SECOND, class V, int... LANE>
inline V zip(V a, V b, std::integer_sequence<int, LANE...>) {
    constexpr int ALL = sizeof...(LANE), EACH = 4 * ALL / LANES;
    return pick<(LANE / EACH * EACH + SECOND * EACH / 2 + LANE % EACH / 2 + LANE % 2 * ALL)...>(a, b);
}

template <class V>
inline void zip(V a, V b, V& first, V& second) {
    constexpr std::make_integer_sequence<int, sizeof(V) / sizeof(V{}[0])> lanes;
    first = zip<0>(a, b, lanes), second = zip<1>(a, b, lanes);
}

// Of pairs beside each other in two vectors, the first numbers and the second ones.
template <int... LANE>
inline void separate(Floats& first, Floats& second, std::integer_sequence<int, LANE...>) {
    const Floats firsts = pick<(2 * LANE)...>(first, second);
    second = pick<(2 * LANE + 1)...>(first, second), first = firsts;
}
inline void separate(Floats& first, Floats& second) { separate(first, second, std::make_integer_sequence<int, LANES>{}); }

// And back.
template <int... LANE>
inline void pair_up(Floats& first, Floats& second, std::integer_sequence<int, LANE...>) {
    const Floats lower = pick<(LANE / 2 + LANE % 2 * LANES)...>(first, second);
    second = pick<((LANES + LANE) / 2 + LANE % 2 * LANES)...>(first, second), first = lower;
}
inline void pair_up(Floats& first, Floats& second) { pair_up(first, second, std::make_integer_sequence<int, LANES>{}); }

// Of the numbers of a and then of b, blocks of H: each with the next.
template <int H, int... LANE>
inline Floats fold(Floats a, Floats b, std::integer_sequence<int, LANE...>) {
    return pick<(LANE / H * 2 * H + LANE % H)...>(a, b) + pick<(LANE / H * 2 * H + LANE % H + H)...>(a, b);
}

// N vectors (a power of two), the lanes of each added up until LANES / N of them are left.
template <int N>
inline Floats folded(const Floats* v) {
    if constexpr (N == 1) return *v;
    else return fold<LANES / N>(folded<N / 2>(v), folded<N / 2>(v + N / 2), std::make_integer_sequence<int, LANES>{});
}

// The sums of N vectors, added up in the same order however many there are. As a call it costs more than it saves.
template <int N>
inline __attribute__((always_inline)) void sum_each(const Floats* v, float* sums) {
    if constexpr (N > LANES) {
        sum_each<LANES>(v, sums);
        sum_each<N - LANES>(v + LANES, sums + LANES);
    } else {
        Floats all[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) all[i] = i < N ? v[i] : Floats{};
        store(sums, folded<LANES>(all));
    }
}

inline float largest(Floats v) {
    Four parts[LANES / 4];
    std::memcpy(parts, &v, sizeof v);
    Four four = parts[0];
    for (int i = 1; i < LANES / 4; i++) four = parts[i] > four ? parts[i] : four;
    return std::max(std::max(four[0], four[2]), std::max(four[1], four[3]));
}

// e^x, within 2 units in the last place: 2^n times a polynomial of what is left, |r| <= ln(2) / 2.
inline Floats exponential(Floats x) {
    const Floats zero = {}, magic = zero + 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number
    x = x < -87.0f ? zero - 87.0f : x;
    x = x > 88.0f ? zero + 88.0f : x;
    Floats shifted = x * 1.44269504f + magic, n = shifted - magic;
    Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln(2) in two parts
    Floats p = zero + 1.9875691500e-4f;
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = p * r + c;
    p = p * r * r + r + 1.0f;
    Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
    Floats scale;
    std::memcpy(&scale, &power, sizeof scale);
    return p * scale;
}

inline Floats silu(Floats x) { return x / (1.0f + exponential(-x)); }

#if LANES == 16 || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif
constexpr int ROOM = REGISTERS == 32 ? 4 : 2;

// Weights -------------------------------------------------------------------------------------------------------------
//
// Each kind says how a STEP of columns is read: VECTORS vectors of Numbers, in whatever order costs least to get from its
// bytes. x is brought into that order once (`place`: PLACED floats' room a step). TALL rows at a time keep up with memory,
// WIDE ones with BROAD vectors, as many as there are registers for: more vectors where it takes most to get a weight. `at`
// is one weight by its column: it is what the others must agree with (nf4's levels to 13 bits), and does what is left of a
// row after whole steps.
//
// What Numbers are says how they are multiplied. 32 and 16 bits as Floats; 16 bits, where the processor multiplies in
// bfloat16, as they are (Halves), by x in bfloat16. 8 and 4 bits as whole numbers of 16 bits (Shorts), two products at once
// in a lane of 32, which takes half the instructions: SHARED columns of x are rounded to whole numbers up to LIMIT, which
// is the largest of them, and their sum is multiplied by what a 1 is. That adds less to a sum's error than bfloat16 does by
// rounding the largest of them alone: 2,048 roundings by at most 2^-16 of it, some one way and some the other, are like one
// by 2^-11. A lane has 512 of them at most, and of so many products with bytes the sum has 32 bits. Where x is to have 8
// bits and the processor multiplies bytes, by bytes: one of two has no sign, so BIAS is added to weights, and taken off
// their sums. A GROUPED kind's sums are multiplied by its groups' `scales` after each step. What the weights of a group have
// in common is left out of them, and multiplied by the sum of the group's x: `offset`.

constexpr int TWO_BYTES = 127 * 256 + 127;  // what an upper and a lower one, both with a sign, can be: tiles.h takes it apart

struct Float32 {
    using Numbers = Floats;
    static constexpr int VECTORS = 1, STEP = LANES, PLACED = STEP, TALL = 4, WIDE = REGISTERS == 32 ? 6 : 2, BROAD = 4;
    static constexpr bool OFFSET = false;
    static int column(int vector, int lane) { return lane; }  // of a step, by where it is read
    static Floats get(const uint8_t* row, int64_t step, int) { return once(load<Floats>(row + step * 4 * LANES)); }
    static constexpr int64_t bytes(int64_t columns) { return 4 * columns; }
    static float at(const Matrix& m, int64_t row, int64_t column) {
        return static_cast<const float*>(m.codes)[row * m.columns + column];
    }
    static float finish(const Matrix& m, int64_t row, float sum) { return sum; }
};

struct Bfloat16 {  // of two neighbours in 32 bits, the second is a float32 once the first is taken off it
    using Numbers = Floats;
    static constexpr int VECTORS = 2, STEP = 2 * LANES, PLACED = STEP, TALL = 4, WIDE = ROOM, BROAD = 4;
    static constexpr bool OFFSET = false;
    static int column(int vector, int lane) { return 2 * lane + vector; }
    static Floats get(const uint8_t* row, int64_t step, int vector) {
        Words pairs = load<Words>(row + step * 4 * LANES);
        pairs = vector ? pairs & 0xffff0000u : pairs << 16;
        return load<Floats>(&pairs);
    }
    static constexpr int64_t bytes(int64_t columns) { return 2 * columns; }
    static float at(const Matrix& m, int64_t row, int64_t column) {
        return widen(static_cast<const uint16_t*>(m.codes)[row * m.columns + column]);
    }
    static float finish(const Matrix& m, int64_t row, float sum) { return sum; }
};

#ifdef MULTIPLIES_BFLOAT16
struct Bfloat16Pairs : Bfloat16 {
    using Numbers = Halves;
    static constexpr int VECTORS = 1, PLACED = LANES, WIDE = 6;
    static Halves get(const uint8_t* row, int64_t step, int) { return load<Halves>(row + step * 4 * LANES); }
};
#else
using Bfloat16Pairs = Bfloat16;
#endif

struct Int8 {
    using Numbers = Shorts;
    static constexpr int VECTORS = 4, STEP = 8 * LANES, PLACED = 4 * LANES, TALL = 4, WIDE = REGISTERS == 32 ? 5 : 2, BROAD = 4;
    static constexpr int LIMIT = TWO_BYTES, BIAS = 0;
    static constexpr bool GROUPED = false, OFFSET = false;
    static constexpr float UNIT = 1;
    static int column(int vector, int number) { return vector / 2 * 4 * LANES + 2 * number + vector % 2; }
    static Shorts get(const uint8_t* row, int64_t step, int vector) {  // of two neighbours in 16 bits, one
        Shorts pairs = once(load<Shorts>(row + step * STEP + vector / 2 * 4 * LANES));
        return (vector % 2 ? pairs : Shorts(Halves(pairs) << uint16_t(8))) >> int16_t(8);
    }
    static constexpr int64_t bytes(int64_t columns) { return columns; }
    static float at(const Matrix& m, int64_t row, int64_t column) {
        return static_cast<const int8_t*>(m.codes)[row * m.columns + column];
    }
    static float finish(const Matrix& m, int64_t row, float sum) { return sum * widen(m.scale[row]); }
};

struct Int8Dynamic : Int8 {
    static constexpr int LIMIT = 127;
#ifdef MULTIPLIES_BYTES
    using Numbers = Bytes;
    static constexpr int VECTORS = 1, STEP = 4 * LANES, PLACED = LANES, WIDE = 6, BIAS = 128;
    static int column(int, int number) { return number; }
    static Bytes get(const uint8_t* row, int64_t step, int) { return load<Bytes>(row + step * STEP) ^ uint8_t(BIAS); }
#endif
};

// 4 bits, two in a byte, the first in the upper half. Of 32 neighbours each lane reads eight; groups are whole such parts.
// (fours.h has another way, for processors that multiply bytes.)
template <int GROUP>
struct FourBits {
    static_assert(GROUP % 32 == 0);
    using Numbers = Shorts;
    static constexpr int VECTORS = 4, STEP = 8 * LANES, PLACED = 4 * LANES, TALL = 2, WIDE = 2, BROAD = REGISTERS == 32 ? 8 : 4;
    static constexpr int LIMIT = TWO_BYTES, BIAS = 0;
    static constexpr bool GROUPED = true;
    static int column(int vector, int number) { return 4 * number + (vector ^ 1); }
    static constexpr int64_t bytes(int64_t columns) { return columns / 2; }
    static int code_at(const Matrix& m, int64_t row, int64_t column) {
        int64_t index = row * m.columns + column;
        uint8_t pair = static_cast<const uint8_t*>(m.codes)[index / 2];
        return index % 2 ? pair & 15 : pair >> 4;
    }
    static float finish(const Matrix& m, int64_t row, float sum) { return sum; }

    // Where a group's sum is placed: Bfloat16 reads a row of scales as it reads a row of weights.
    static int64_t placed_group(int64_t g) { return g / (2 * LANES) * (2 * LANES) + g % 2 * LANES + g % (2 * LANES) / 2; }

    // A step's scales, in the lanes of their groups. Two bfloat16 are read at once, and each is shifted to where a float32
    // has its upper half.
    static Floats scales(const uint16_t* of_row, int64_t step) {
        constexpr int lanes = GROUP / 8;
        if constexpr (lanes >= LANES) {
            Words pairs = Words(Halves{} + of_row[step / (lanes / LANES)]) & 0xffff0000u;
            return load<Floats>(&pairs);
        }
        const uint16_t* here = of_row + step * (LANES / lanes);
        uint32_t shifts[LANES], second[LANES];
        for (int i = 0; i < LANES; i++) shifts[i] = i / lanes % 2 ? 0 : 16, second[i] = i / lanes / 2 ? ~0u : 0;
        Words halves = Words{} + load<uint32_t>(here);
        if constexpr (LANES / lanes > 2)
            halves = (halves & ~load<Words>(second)) | (load<uint32_t>(here + 2) & load<Words>(second));
        halves = halves << load<Words>(shifts) & 0xffff0000u;
        return load<Floats>(&halves);
    }
};

template <int GROUP>
struct Int4 : FourBits<GROUP> {  // (code - 8) * scale + zero
    static constexpr bool OFFSET = true;
    static constexpr float UNIT = 1;
    static Shorts get(const uint8_t* row, int64_t step, int vector) {
        Halves fours = once(load<Halves>(row + step * 4 * LANES));
        return Shorts(vector == 3 ? fours >> uint16_t(12) : fours >> uint16_t(4 * vector) & uint16_t(15));
    }
    // Of (code - 8) * scale + zero, what is not code * scale. There are zeros behind the sums, so that numbers of the next
    // row, which are finite, do no harm; behind the last row there are none.
    static Floats offset(const Matrix& m, int64_t row, const float* sums) {
        int64_t groups = m.columns / GROUP, first = row * groups, steps = (groups + Bfloat16::STEP - 1) / Bfloat16::STEP;
        const uint16_t *scale = m.scale + first, *zero = m.zero + first;
        if (first + steps * Bfloat16::STEP > m.rows * groups) {
            float rest = 0;
            for (int64_t g = 0; g < groups; g++)
                rest += (widen(zero[g]) - 8 * widen(scale[g])) * sums[FourBits<GROUP>::placed_group(g)];
            return Floats{rest};
        }
        Floats total = {};
#pragma GCC unroll 4
        for (int64_t s = 0; s < steps; s++)
#pragma GCC unroll 2
            for (int v = 0; v < Bfloat16::VECTORS; v++, sums += LANES) {
                auto read = [&](const uint16_t* of) { return Bfloat16::get(reinterpret_cast<const uint8_t*>(of), s, v); };
                total = add_product(total, read(zero) - 8.0f * read(scale), load<Floats>(sums));
            }
        return total;
    }
    static float value(const Matrix& m, int64_t group, int code) {
        return float(code - 8) * widen(m.scale[group]) + widen(m.zero[group]);
    }
    static float at(const Matrix& m, int64_t row, int64_t column) {
        return value(m, (row * m.columns + column) / GROUP, FourBits<GROUP>::code_at(m, row, column));
    }
};

// The 16 levels of QLoRA's NormalFloat (arXiv 2305.14314, appendix E).
constexpr float NORMAL[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
    -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

constexpr float ONE = 8191;  // what the level 1 is as a whole number: of eight products the sum has 32 bits

struct Levels {  // as whole numbers of 16 bits, their lower and their upper bytes
    uint8_t lower[16] = {}, upper[16] = {};
    constexpr explicit Levels(float one) {
        for (int i = 0; i < 16; i++) {
            int level = int(NORMAL[i] * one + (NORMAL[i] < 0 ? -0.5f : 0.5f));
            lower[i] = uint8_t(level), upper[i] = uint8_t(level >> 8);
        }
    }
};
constexpr Levels LEVELS(ONE);

inline Bytes look_up(const uint8_t (&table)[16], Bytes codes) {
#if LANES == 16 && defined(__AVX512BW__)
    return Bytes(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(load<__m128i>(table)), __m512i(codes)));
#elif LANES == 8 && defined(__AVX2__)
    return Bytes(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load<__m128i>(table)), __m256i(codes)));
#elif LANES == 4 && defined(__SSSE3__)
    return Bytes(_mm_shuffle_epi8(load<__m128i>(table), __m128i(codes)));
#else
    for (int i = 0; i < 4 * LANES; i++) codes[i] = table[codes[i]];
    return codes;
#endif
}

template <int GROUP>
struct Nf4 : FourBits<GROUP> {  // level(code) * scale
    static constexpr bool OFFSET = false;
    static constexpr float UNIT = 1 / ONE;
    // A level's lower bytes and its upper ones are looked up by themselves, and come together in halves of sixteen.
    static int column(int vector, int number) {
        return 2 * (number / 8 * 16 + vector % 2 * 8 + number % 8) + (vector < 2);
    }
    static Shorts get(const uint8_t* row, int64_t step, int vector) {
        Bytes pairs = load<Bytes>(row + step * 4 * LANES), codes = (vector < 2 ? pairs : pairs >> 4) & uint8_t(15);
        Bytes first, second;
        zip(look_up(LEVELS.lower, codes), look_up(LEVELS.upper, codes), first, second);
        return Shorts(vector % 2 ? second : first);
    }
    static float value(const Matrix& m, int64_t group, int code) { return NORMAL[code] * widen(m.scale[group]); }
    static float at(const Matrix& m, int64_t row, int64_t column) {
        return value(m, (row * m.columns + column) / GROUP, FourBits<GROUP>::code_at(m, row, column));
    }
};

// Products ------------------------------------------------------------------------------------------------------------

constexpr int64_t AHEAD = 1024;   // bytes of a row: what is asked for from memory while others are multiplied
constexpr int64_t SHARED = 2048;  // columns of x that share a unit; each lane has 512 of them at most

// Numbers as whole ones up to `limit` (in the lower bits); returns what a 1 is. Beside infinity, or what is no number,
// nothing is one.
float round_together(const float* x, int64_t count, int limit, int32_t* numbers) {
    Words highest = {};
    for (int64_t i = 0; i < count; i += LANES) {
        Words size = load<Words>(x + i) & 0x7fffffffu;
        highest = size > highest ? size : highest;
    }
    uint32_t most = 0;
    for (int i = 0; i < LANES; i++) most = std::max(most, uint32_t(highest[i]));
    if (most >= 0x7f800000) return std::nanf("");
    float unit = std::max(load<float>(&most) / float(limit), 0x1p-126f), units = 1 / unit;
    const float magic = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number, in its lower bits
    for (int64_t i = 0; i < count; i += LANES) {
        Floats number = load<Floats>(x + i) * units + magic;
        std::memcpy(numbers + i, &number, sizeof number);
    }
    return unit;
}

// Of vectors whose columns are whole groups, each group's numbers are rounded to 8 bits.
void round_by_groups(const Matrix& m, const float* x, int64_t count, float* rounded) {
    int32_t numbers[128];
    for (; count; count -= m.group, x += m.group, rounded += m.group) {
        const float unit = round_together(x, m.group, 127, numbers);
        for (int64_t i = 0; i < m.group; i += LANES)
            store(rounded + i, __builtin_convertvector(load<Ints>(numbers + i) << 24 >> 24, Floats) * unit);
    }
}

struct Unit {  // of SHARED columns: what a 1 is, and where their sum begins
    float one;
    int32_t begin;
};

// Where a vector's parts are, in the order in which W reads them: its whole steps, what is left of it, the sums of groups
// (as Bfloat16 reads the groups' numbers), and the units.
template <class W>
struct Places {
    static constexpr bool BYTES = std::is_same<typename W::Numbers, Bytes>::value;
    static constexpr bool WHOLE = BYTES || std::is_same<typename W::Numbers, Shorts>::value;
    int64_t steps, columns, rest, sums, units, size;  // `columns` are those in whole steps
    explicit Places(const Matrix& m) {
        steps = m.columns / W::STEP, columns = steps * W::STEP;
        rest = steps * W::PLACED, sums = rest + m.columns - columns;
        units = sums + (W::OFFSET ? (m.columns / m.group + Bfloat16::STEP - 1) / Bfloat16::STEP * Bfloat16::STEP : 0);
        size = units + (WHOLE ? (columns + SHARED - 1) / SHARED * 2 : 0);
    }
};

template <class W>
void place(const Matrix& m, const float* x, float* placed) {
    Places<W> places(m);
    std::copy(x + places.columns, x + m.columns, placed + places.rest);
    if constexpr (Places<W>::WHOLE) {
        using Number = typename std::conditional<Places<W>::BYTES, int8_t, int16_t>::type;
        constexpr int NUMBERS = 4 * LANES / sizeof(Number);
        float *sums = placed + places.sums, *units = placed + places.units;
        std::fill(sums, units, 0.0f);
        int32_t numbers[SHARED] = {};
        Number in_order[W::STEP];
        for (int64_t shared = 0; shared < places.columns; shared += SHARED, units += 2) {
            int64_t count = std::min(SHARED, places.columns - shared);
            Unit unit = {round_together(x + shared, count, W::LIMIT, numbers), 0};
            if constexpr (W::OFFSET)
                for (int64_t first = 0; first < count; first += m.group) {
                    int32_t total = 0;
                    for (int64_t i = first; i < first + m.group; i++) total += Number(numbers[i]);
                    sums[W::placed_group((shared + first) / m.group)] = unit.one * float(total);
                }
            if constexpr (W::BIAS != 0)
                for (int64_t i = 0; i < count; i++) unit.begin -= W::BIAS * Number(numbers[i]);
            unit.one *= W::UNIT;
            std::memcpy(units, &unit, sizeof unit);
            for (int64_t first = 0; first < count; first += W::STEP, placed += W::PLACED) {
#pragma GCC unroll 4
                for (int v = 0; v < W::VECTORS; v++)
                    for (int i = 0; i < NUMBERS; i++)
                        in_order[v * NUMBERS + i] = Number(numbers[first + W::column(v, i)]);
                std::memcpy(placed, in_order, sizeof in_order);
            }
        }
    } else if constexpr (std::is_same<typename W::Numbers, Halves>::value) {
        auto* narrowed = reinterpret_cast<uint16_t*>(placed);
        for (int64_t c = 0; c < places.columns; c += LANES) put(narrowed + c, load<Floats>(x + c));
    } else {
        for (int64_t first = 0; first < places.columns; first += W::STEP)
#pragma GCC unroll 2
            for (int v = 0; v < W::VECTORS; v++)
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) *placed++ = x[first + W::column(v, i)];
    }
}

// What is asked for from memory meanwhile: bytes after a row's own, at its first step, and how many more at each.
struct Ahead {
    int64_t from, step;
};

struct Target {
    float* out;
    int64_t stride;
    bool add;
    void operator()(int64_t token, int64_t row, float value) const {
        float& place = out[token * stride + row];
        place = add ? place + value : value;
    }
};

// Of a token, `count` rows beside each other.
inline void put_rows(const Target& target, int64_t token, int64_t row, int64_t count, Floats values) {
    float* place = target.out + token * target.stride + row;
    if (count == LANES) store(place, target.add ? load<Floats>(place) + values : values);
    else for (int64_t i = 0; i < count; i++) target(token, row + i, values[i]);
}

// R rows of a weight, `gap` apart, times X vectors from `token` on. Each pair adds up in the same order in whatever tile it
// is, so that what comes out for a token does not depend on those beside it.
template <class W, int R, int X>
inline void tile(
    const Matrix& m, int64_t row, int64_t gap, const float* x, int64_t stride, int64_t token, Ahead ahead, Target target) {
    using Numbers = typename W::Numbers;
    x += token * stride;
    const Places<W> places(m);
    const int64_t size = W::bytes(m.columns), groups = m.group ? m.columns / m.group : 0;
    const uint8_t* codes = static_cast<const uint8_t*>(m.codes) + row * size;
    const uint8_t* ahead_of = codes + ahead.from;
    auto ask_for = [&](int r, int64_t step) {
        const uint8_t* at = ahead_of + r * gap * size + step * ahead.step;
        __builtin_prefetch(at, 0, 2);
        if constexpr (W::bytes(W::STEP) > 64) __builtin_prefetch(at + ahead.step / 2, 0, 2);
    };
    Floats sums[R][X] = {};
    if constexpr (W::OFFSET)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int j = 0; j < X; j++) sums[r][j] = W::offset(m, row + r * gap, x + j * stride + places.sums);
    if constexpr (Places<W>::WHOLE) {
        constexpr int T = X == 1 || REGISTERS == 32 ? R : 1;  // rows together: what it takes to get a weight needs registers
        constexpr int64_t STEPS = SHARED / W::STEP;
        auto unit_of = [&](int j, int64_t shared) { return load<Unit>(x + j * stride + places.units + 2 * shared); };
        for (int64_t shared = 0; shared * STEPS < places.steps; shared++) {
            const int64_t end = std::min(places.steps, (shared + 1) * STEPS);
#pragma GCC unroll 8
            for (int first = 0; first < R; first += T) {
                const uint8_t* rows = codes + first * gap * size;
                Floats part[T][X] = {};
                Ints whole[T][X] = {};
                if constexpr (W::BIAS != 0)
#pragma GCC unroll 8
                    for (int j = 0; j < X; j++)
#pragma GCC unroll 8
                        for (int r = 0; r < T; r++) whole[r][j] = Ints{unit_of(j, shared).begin};
                for (int64_t s = shared * STEPS; s < end; s++) {
#pragma GCC unroll 8
                    for (int r = 0; r < T; r++) ask_for(first + r, s);
#pragma GCC unroll 8
                    for (int v = 0; v < W::VECTORS; v++) {
                        Numbers w[T];
#pragma GCC unroll 8
                        for (int r = 0; r < T; r++) w[r] = W::get(rows + r * gap * size, s, v);
#pragma GCC unroll 8
                        for (int j = 0; j < X; j++) {
                            Numbers number = load<Numbers>(x + j * stride + s * W::PLACED + v * LANES);
                            if constexpr (T > 1) number = once(number);
#pragma GCC unroll 8
                            for (int r = 0; r < T; r++) whole[r][j] = add_product(whole[r][j], w[r], number);
                        }
                    }
                    if constexpr (W::GROUPED)
#pragma GCC unroll 8
                        for (int r = 0; r < T; r++) {
                            Floats scales = W::scales(m.scale + (row + (first + r) * gap) * groups, s);
#pragma GCC unroll 8
                            for (int j = 0; j < X; j++) {
                                part[r][j] = add_product(part[r][j], scales, __builtin_convertvector(once(whole[r][j]), Floats));
                                whole[r][j] = Ints{};
                            }
                        }
                }
#pragma GCC unroll 8
                for (int r = 0; r < T; r++)
#pragma GCC unroll 8
                    for (int j = 0; j < X; j++) {
                        if constexpr (!W::GROUPED) part[r][j] = __builtin_convertvector(whole[r][j], Floats);
                        sums[first + r][j] = add_product(sums[first + r][j], Floats{} + unit_of(j, shared).one, part[r][j]);
                    }
            }
        }
    } else {
        for (int64_t s = 0; s < places.steps; s++) {
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) ask_for(r, s);
#pragma GCC unroll 2
            for (int v = 0; v < W::VECTORS; v++) {
                Numbers w[R];
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) w[r] = W::get(codes + r * gap * size, s, v);
#pragma GCC unroll 8
                for (int j = 0; j < X; j++) {
                    Numbers number = once(load<Numbers>(x + j * stride + s * W::PLACED + v * LANES));
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) sums[r][j] = add_product(sums[r][j], w[r], number);
                }
            }
        }
    }
    float totals[(R * X + LANES - 1) / LANES * LANES];
    sum_each<R * X>(sums[0], totals);
    if (places.columns < m.columns)
        for (int r = 0; r < R; r++)
            for (int j = 0; j < X; j++) {
                const float* rest = x + j * stride + places.rest;
                float& total = totals[r * X + j];
                for (int64_t c = places.columns; c < m.columns; c++)
                    total = std::fma(W::at(m, row + r * gap, c), *rest++, total);
            }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < X; j++)  // each by itself: to put some together costs the compiler more than it saves
            target(token + j, row + r * gap, once(W::finish(m, row + r * gap, totals[r * X + j])));
}

constexpr int64_t BESIDE = 4;  // tiles

template <int N>
using Count = std::integral_constant<int, N>;

// Calls use(Count<n>{}), n from 1 to MOST.
template <int MOST, class Use>
void with_count(int64_t n, Use use) {
    if constexpr (MOST > 1)
        if (n < MOST) return with_count<MOST - 1>(n, use);
    use(Count<MOST>{});
}

// Tiles of R rows, `gap` apart, and up to MOST vectors: those that begin with rows first to last. So memory is read in R
// long streams, and gives more than in one (docs/LOG.md). As few passes as there can be, of as many vectors each; a pass
// goes over some tiles before the next does, while its vectors are in the first cache.
template <class W, int R, int MOST>
inline void tiles(
    const Matrix& m, int64_t first, int64_t last, int64_t gap, const float* x, int64_t stride, int64_t n, Target target) {
    const int64_t passes = (n + MOST - 1) / MOST, each = n / passes, more = n % passes, size = W::bytes(m.columns);
    const int64_t beside = passes == 1 ? 1 : BESIDE;
    const Ahead next = {passes == 1 ? AHEAD : beside * size, W::bytes(W::STEP) / passes};
    auto pass_over = [&](int64_t row, int64_t pass) {
        const int64_t token = pass * each + std::min(pass, more), vectors = each + (pass < more);
        const Ahead ahead = {next.from + pass * (size / passes), next.step};
        auto go = [&](auto count) { tile<W, R, count>(m, row, gap, x, stride, token, ahead, target); };
        with_count<MOST>(vectors, go);
    };
    for (int64_t row = first; row < last; row += beside)
        for (int64_t pass = 0; pass < passes; pass++)
            for (int64_t i = row; i < std::min(last, row + beside); i++) pass_over(i, pass);
}

template <class Use>
void with_four_bits(const Matrix& m, Use use) {
    if (m.kind == NF4) return use(Nf4<64>{});
    m.group == 32 ? use(Int4<32>{}) : m.group == 64 ? use(Int4<64>{}) : use(Int4<128>{});
}

template <class Use>
void with_kind(const Matrix& m, Use use) {
    switch (m.kind) {
        case FLOAT32: return use(Float32{});
        case BFLOAT16: return use(Bfloat16Pairs{});
        case INT8: return use(Int8{});
        case INT8_DYNAMIC: return use(Int8Dynamic{});
        default: return with_four_bits(m, use);
    }
}

// A row of a plain weight.
void decode_row(const Matrix& m, int64_t row, float* out) {
    auto as = [&](auto kind) {
        for (int64_t c = 0; c < m.columns; c++) out[c] = kind.at(m, row, c);
    };
    m.kind == FLOAT32 ? as(Float32{}) : as(Bfloat16{});
}

// A row of 4 bits: each group's values are few.
template <class T, class W>
void decode_row(W, const Matrix& m, int64_t row, T* out) {
    int64_t first = row * m.columns / m.group;
    const uint8_t* pairs = static_cast<const uint8_t*>(m.codes) + row * W::bytes(m.columns);
    for (int64_t group = first; group < first + m.columns / m.group; group++) {
        T values[16];
        for (int code = 0; code < 16; code++) as_number(W::value(m, group, code), values[code]);
        for (int64_t i = 0; i < m.group; i += 2, pairs++) *out++ = values[*pairs >> 4], *out++ = values[*pairs & 15];
    }
}

// Threads, and who does what ------------------------------------------------------------------------------------------
//
// A machine's processors are not equally quick, least of all where others use them too. So each thread's share of a weight
// is cut in pieces, and who is done with its own goes on with those that others have not come to.

struct alignas(64) Share {
    std::atomic<int64_t> taken{0}, given{0};  // pieces, by whom ever, and those of them that others have
};

struct Thread {
    int64_t index, count;
    Share* shares;  // each thread's for this turn, and for the next
    int64_t turn = 0;

    // A thread's part of a range, in whole sixteens: whole tiles.
    void share(int64_t whole, int64_t of, int64_t& first, int64_t& last) const {
        int64_t parts = (whole + 15) / 16;
        first = std::min(whole, parts * of / count * 16);
        last = std::min(whole, parts * (of + 1) / count * 16);
    }

    // Calls use(whose, i) for pieces 0 to `pieces` - 1 of each thread's share, once for all threads: for its own, from the
    // first on, and then for what others have not come to, from the last on. Returns when all are done.
    template <class Use>
    void share_out(int64_t pieces, Use use) {
        if (pieces == 1) {  // too little to look what others do
            use(index, 0);
        } else {
            Share *now = shares + turn % 2 * count, *next = shares + (turn + 1) % 2 * count;
            turn++;
            next[index].taken = next[index].given = 0;  // nobody uses it any more, or already
            for (int64_t i = 0; now[index].taken++ < pieces; i++) use(index, i);
            for (int64_t other = (index + 1) % count; other != index; other = (other + 1) % count)
                while (now[other].taken < pieces && now[other].taken++ < pieces)
                    use(other, pieces - 1 - now[other].given++);
        }
#pragma omp barrier
    }
};

// Calls use(thread) for each of `count` threads, which are in it together.
template <class Use>
void together(int64_t count, Use use) {
    std::vector<Share> shares(2 * count);
#pragma omp parallel num_threads(count)
    {
        Thread me{omp_get_thread_num(), omp_get_num_threads(), shares.data()};
        use(me);
    }
}

// Vectors that are kept from call to call only grow: what is added to them is written to, each time.
template <class T>
void at_least(std::vector<T>& room, int64_t count) {
    if (int64_t(room.size()) < count) room.resize(count);
}

// So many numbers of it, from where a line of the cache begins.
template <class T>
T* lines(std::vector<T>& room, int64_t count) {
    constexpr int64_t LINE = 64 / sizeof(T);
    at_least(room, count + LINE);
    return room.data() + (LINE - reinterpret_cast<uintptr_t>(room.data()) / sizeof(T) % LINE);
}

// Some rows of a weight, and where what they make goes.
struct Part {
    int64_t first;
    Target target;
};

constexpr int64_t PIECE = 1 << 19;  // bytes of a weight: some forty microseconds

template <class W>
int64_t pieces_of(const Matrix& m, int64_t threads) {
    return std::max<int64_t>(1, W::bytes(m.columns) * m.rows / threads / PIECE);
}

constexpr float NEVER = -3e38f;  // a score that has no weight

#include "fours.h"
#include "tiles.h"

// As `product`, by vectors of a row's neighbours.
template <class W, class Done>
void product_in_streams(Thread& me, const Matrix& m, const float* x, int64_t n, std::initializer_list<Part> parts, Done done) {
    static thread_local std::vector<float> room;
    const int64_t stride = (Places<W>(m).size + 15) / 32 * 32 + 16;  // vectors begin in different lines of a cache
    float* placed = lines(room, n * stride);
    for (int64_t j = 0; j < n; j++) place<W>(m, x + j * m.columns, placed + j * stride);

    const int64_t pieces = pieces_of<W>(m, me.count);
    me.share_out(pieces, [&](int64_t whose, int64_t i) {
        int64_t row, last;
        me.share(m.rows / int64_t(parts.size()), whose, row, last);
        // The piece's part of each of so many streams of rows. What is not in one of them is left.
        auto make = [&](auto streams, auto most) {
            constexpr int R = streams, MOST = most;
            int64_t gap = (last - row) / R, from = row + gap * i / pieces, to = row + gap * (i + 1) / pieces;
            for (const Part& part : parts)
                tiles<W, R, MOST>(m, part.first + from, part.first + to, gap, placed, stride, n, part.target);
            for (int r = 0; r < R; r++) done(from + r * gap, to + r * gap);
            row += R * gap;
        };
        // A weight is got for more vectors at once, which is less work a vector, and a vector for WIDE rows.
        if (n < 3) make(Count<W::TALL>{}, Count<2>{});
        else make(Count<W::WIDE>{}, Count<W::BROAD>{});
        make(Count<1>{}, Count<4>{});
    });
}

// A weight times n vectors (n, C), by all threads. Its rows are in `parts` of the same size, which go along with each other;
// done(first, last) is called with rows of each that have been made.
template <class Done>
void product(Thread& me, const Matrix& m, const float* x, int64_t n, std::initializer_list<Part> parts, Done done) {
    with_kind(m, [&](auto kind) {
        using W = decltype(kind);
        if constexpr (Turned<W>::HERE) {
            if constexpr (W::OFFSET)
                if (m.kind == INT4_DYNAMIC) return product_by_rows<typename Turned<W>::Dynamic>(me, m, x, n, parts, done);
            product_by_rows<typename Turned<W>::Kind>(me, m, x, n, parts, done);
        } else {
#ifdef HAS_TILES
            if constexpr (Tiled<W>::HERE)
                if (may_use_tiles()) return product_by_tiles<W>(me, m, x, n, parts, done);
#endif
            static thread_local std::vector<float> rounded;
            if (m.kind == INT4_DYNAMIC) {
                at_least(rounded, n * m.columns);
                round_by_groups(m, x, n * m.columns, rounded.data());
                x = rounded.data();
            }
            product_in_streams<W>(me, m, x, n, parts, done);
        }
    });
}

void product(Thread& me, const Matrix& m, const float* x, int64_t n, Target target) {
    product(me, m, x, n, {{0, target}}, [](int64_t, int64_t) {});
}

// The parts of a block ------------------------------------------------------------------------------------------------

void normalise(const float* x, const float* weight, int64_t dim, float eps, float* out) {
    Floats squares = {};
    float rest = 0;
    int64_t whole = dim / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) squares += load<Floats>(x + i) * load<Floats>(x + i);
    for (int64_t i = whole; i < dim; i++) rest += x[i] * x[i];
    float factor = 1 / std::sqrt((sum(squares) + rest) / float(dim) + eps);
    for (int64_t i = 0; i < dim; i++) out[i] = x[i] * factor * weight[i];
}

const float* normalised(const float* x, const float* weight, int64_t n, int64_t dim, float eps) {
    static thread_local std::vector<float> normed;
    at_least(normed, n * dim);
    for (int64_t i = 0; i < n; i++) normalise(x + i * dim, weight, dim, eps, normed.data() + i * dim);
    return normed.data();
}

// A head's D numbers, neighbours turned as pairs by the angles of a position: use(d, first ones, second ones) of LANES pairs,
// which are the numbers from d on.
template <class Use>
inline void turned(const float* x, const Step& s, int64_t position, Use use) {
    const float *cosines = s.cos + position * s.head_dim / 2, *sines = s.sin + position * s.head_dim / 2;
    for (int64_t d = 0; d < s.head_dim; d += 2 * LANES) {
        Floats first = load<Floats>(x + d), second = load<Floats>(x + d + LANES);
        separate(first, second);
        const Floats cosine = load<Floats>(cosines + d / 2), sine = load<Floats>(sines + d / 2);
        use(d, first * cosine - second * sine, first * sine + second * cosine);
    }
}

// Keys and values of a cache are read like rows of weights. BY_PAIRS: first numbers of pairs, then second ones.
struct Float32Cache : Float32 {
    using Number = float;
    static constexpr bool BY_PAIRS = false;
};
struct Bfloat16Cache : Bfloat16 {
    using Number = uint16_t;
    static constexpr bool BY_PAIRS = true;
};

constexpr int AT_ONCE = 64;   // slots: their scores are made before the softmax goes on
constexpr int64_t KEYS = 2;  // that meet the same queries together

// Of a slot, the one that is AT_ONCE after it: keys and values take turns, so that a processor doesn't see what comes next.
inline void ask_for_next(const uint8_t* slot, int64_t size) {
    for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(slot + AT_ONCE * size + i);
}

struct Query {
    float* q;      // (D), placed and scaled
    int64_t seen;  // slots that it sees
    float* sums;
    float most, total;
};

// STEPS steps of `count` values, each by its slot's weight, to what M queries have of them.
template <class W, int M, int STEPS>
inline void mix(
    Query* queries, const uint8_t* values, int64_t step, int64_t count, int64_t next, const float (&weights)[M][AT_ONCE],
    const float* fade, int64_t size) {
    constexpr int ALL = STEPS * W::VECTORS;
    Floats mixed[M][ALL];
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int u = 0; u < ALL; u++) mixed[m][u] = load<Floats>(queries[m].sums + step * W::STEP + u * LANES) * fade[m];
    for (int64_t i = 0; i < count; i++) {
        if (step == 0 && i < next) ask_for_next(values + i * size, size);
#pragma GCC unroll 4
        for (int u = 0; u < ALL; u++) {
            const Floats value = once(W::get(values + i * size, step + u / W::VECTORS, u % W::VECTORS));
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) mixed[m][u] += weights[m][i] * value;
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int u = 0; u < ALL; u++) store(queries[m].sums + step * W::STEP + u * LANES, mixed[m][u]);
}

// M queries, and slots first to first + count of those that they see. `next` are those in the block after it.
template <class W, int M>
void attend(
    Query* queries, const uint8_t* keys, const uint8_t* values, int64_t first, int64_t count, int64_t next, int64_t D) {
    const int64_t size = W::bytes(D), steps = D / W::STEP;
    float scores[M][AT_ONCE], fade[M];
    Floats products[M][LANES];
    for (int64_t slot = 0; slot < count; slot += LANES) {
        auto meet = [&](auto keys_together, int64_t i) {
            constexpr int N = keys_together;
            const uint8_t* key = keys + (first + slot + i) * size;
            Floats product[M][N] = {};
            for (int k = 0; k < N; k++)
                if (slot + i + k < next) ask_for_next(key + k * size, size);
            for (int64_t s = 0; s < steps; s++)
#pragma GCC unroll 2
                for (int v = 0; v < W::VECTORS; v++) {
                    Floats part[N];
#pragma GCC unroll 2
                    for (int k = 0; k < N; k++) part[k] = once(W::get(key + k * size, s, v));
#pragma GCC unroll 4
                    for (int m = 0; m < M; m++) {
                        const Floats number = once(load<Floats>(queries[m].q + s * W::STEP + v * LANES));
#pragma GCC unroll 2
                        for (int k = 0; k < N; k++) product[m][k] = add_product(product[m][k], part[k], number);
                    }
                }
#pragma GCC unroll 4
            for (int m = 0; m < M; m++)
#pragma GCC unroll 2
                for (int k = 0; k < N; k++) products[m][i + k] = product[m][k];
        };
        const int64_t here = std::min<int64_t>(LANES, count - slot);
        int64_t i = 0;
        for (; i + KEYS <= here; i += KEYS) meet(Count<KEYS>{}, i);
        for (; i < here; i++) meet(Count<1>{}, i);
        for (int m = 0; m < M; m++) {
            for (int64_t i = count - slot; i < LANES; i++) products[m][i] = Floats{};
            sum_each<LANES>(products[m], scores[m] + slot);
        }
    }
    for (int m = 0; m < M; m++) {
        float* score = scores[m];
        Query& query = queries[m];
        const float before = query.most;
        for (int64_t i = count; i % LANES; i++) score[i] = NEVER;
        Floats highest = load<Floats>(score), weights = {};
        for (int64_t i = LANES; i < count; i += LANES) {
            Floats here = load<Floats>(score + i);
            highest = here > highest ? here : highest;
        }
        query.most = std::max(before, largest(highest));
        for (int64_t i = 0; i < count; i += LANES) {
            Floats weight = exponential(load<Floats>(score + i) - query.most);
            if (i + LANES > count)
                for (int lane = int(count - i); lane < LANES; lane++) weight[lane] = 0;
            store(score + i, weight);
            weights += weight;
        }
        fade[m] = before == NEVER ? 0.0f : std::exp(before - query.most);
        query.total = query.total * fade[m] + sum(weights);
    }
    values += first * size;
    int64_t s = 0;
    for (; s + 4 / W::VECTORS <= steps; s += 4 / W::VECTORS)
        mix<W, M, 4 / W::VECTORS>(queries, values, s, count, next, scores, fade, size);
    for (; s < steps; s++) mix<W, M, 1>(queries, values, s, count, next, scores, fade, size);
}

template <class W>
void remember(const Thread& me, const Block& block, const Step& s) {
    int64_t D = s.head_dim, width = (s.heads + 2 * s.kv_heads) * D;
    for (int64_t item = me.index; item < s.rows * s.tokens * s.kv_heads; item += me.count) {
        int64_t token = item / s.kv_heads, head = item % s.kv_heads, row = token / s.tokens;
        int64_t position = s.starts[row] + token % s.tokens, at = ((row * s.kv_heads + head) * s.slots + position) * D;
        const float *key = s.qkv + token * width + (s.heads + head) * D, *value = key + s.kv_heads * D;
        auto* keys = static_cast<typename W::Number*>(block.keys) + at;
        auto* values = static_cast<typename W::Number*>(block.values) + at;
        turned(key, s, position, [&](int64_t d, Floats first, Floats second) {
            pair_up(first, second);
            put(keys + d, first), put(keys + d + LANES, second);
        });
        for (int64_t d = 0; d < D; d += LANES) put(values + d, load<Floats>(value + d));
    }
}

// Queries of a kv head, and what they see of a row of the cache, by vectors. Softmax in one pass (online: arXiv
// 1805.02867). All go through the keys and values together, some slots at a time, which are then in the thread's cache.
template <class W>
struct Queries {
    int64_t D;
    const uint8_t *keys, *values;
    std::vector<float> room;
    std::vector<Query> queries;

    void begin(int64_t head_dim, int64_t count, const void* own_keys, const void* own_values) {
        D = head_dim, keys = static_cast<const uint8_t*>(own_keys), values = static_cast<const uint8_t*>(own_values);
        float* q = lines(room, 2 * count * D);
        queries.clear();
        for (int64_t i = 0; i < count; i++, q += 2 * D) {
            std::fill(q + D, q + 2 * D, 0.0f);
            queries.push_back({q, 0, q + D, NEVER, 0});
        }
    }

    // LANES pairs of a query's numbers, from d on; it sees so many slots, no fewer than the one before it.
    void bring(int64_t query, int64_t d, Floats first, Floats second, int64_t seen) {
        const float scale = 1 / std::sqrt(float(D));
        if (!W::BY_PAIRS) pair_up(first, second);
        store(queries[query].q + d, first * scale), store(queries[query].q + d + LANES, second * scale);
        queries[query].seen = seen;
    }

    void look() {
        for (int64_t first = 0; first < queries.back().seen; first += AT_ONCE)
            for (size_t i = 0; i < queries.size();) {
                auto seen = [&](int64_t query) { return std::min<int64_t>(AT_ONCE, queries[query].seen - first); };
                const bool beside = i + ROOM <= queries.size() && seen(i) == seen(i + ROOM - 1);
                const int64_t count = seen(i), next = queries[i].seen - first - count;
                if (count > 0)
                    (beside ? attend<W, ROOM> : attend<W, 1>)(&queries[i], keys, values, first, count, next, D);
                i += beside ? ROOM : 1;
            }
    }

    // Calls use(query, d, what it has of the LANES head dimensions from d on).
    template <class Use>
    void take(Use use) const {
        for (size_t i = 0; i < queries.size(); i++)
            for (int64_t d = 0; d < D; d += 2 * LANES) {
                const float one = 1 / queries[i].total;
                Floats first = load<Floats>(queries[i].sums + d) * one, second = load<Floats>(queries[i].sums + d + LANES) * one;
                if (W::BY_PAIRS) pair_up(first, second);
                use(i, d, first), use(i, d + LANES, second);
            }
    }
};

template <class Queries>
void look(Thread& me, const Block& block, const Step& s) {
    static thread_local Queries queries;
    const int64_t D = s.head_dim, width = (s.heads + 2 * s.kv_heads) * D, size = D * (s.cache_kind == FLOAT32 ? 4 : 2);
    const int64_t group = s.heads / s.kv_heads, all = group * s.tokens;  // queries of a kv head
    int64_t parts = 1;  // of a kv head's queries, where there are more threads than kv heads
    while (s.rows * s.kv_heads * parts < me.count && parts * 2 <= all) parts *= 2;
    const int64_t items = s.rows * s.kv_heads * parts;
    me.share_out((items + me.count - 1) / me.count, [&](int64_t whose, int64_t i) {
        const int64_t item = i * me.count + whose, kv_head = item / parts % s.kv_heads, row = item / (s.kv_heads * parts);
        if (item >= items) return;
        const int64_t begin = all * (item % parts) / parts, count = all * (item % parts + 1) / parts - begin;
        auto head = [&](int64_t query) { return kv_head * group + (begin + query) % group; };
        auto t = [&](int64_t query) { return (begin + query) / group; };
        const int64_t from = (row * s.kv_heads + kv_head) * s.slots * size;
        queries.begin(D, count, static_cast<const uint8_t*>(block.keys) + from,
                      static_cast<const uint8_t*>(block.values) + from);
        for (int64_t query = 0; query < count; query++) {
            const int64_t position = s.starts[row] + t(query);
            const float* q = s.qkv + (row * s.tokens + t(query)) * width + head(query) * D;
            turned(q, s, position, [&](int64_t d, Floats first, Floats second) {
                queries.bring(query, d, first, second, position + 1);
            });
        }
        queries.look();
        queries.take([&](int64_t query, int64_t d, Floats numbers) {
            store(s.mixed + ((row * s.tokens + t(query)) * s.heads + head(query)) * D + d, numbers);
        });
    });
}

void look(Thread& me, const Block& block, const Step& s) {
    if (s.cache_kind == FLOAT32) return look<Queries<Float32Cache>>(me, block, s);
#ifdef HAS_TILES
    // By how many heads share a key, and not by how many tokens there are: a token's numbers don't depend on those beside it.
    if (s.heads / s.kv_heads >= 4 && s.head_dim % 32 == 0 && may_use_tiles()) return look<TiledQueries>(me, block, s);
#endif
    look<Queries<Bfloat16Cache>>(me, block, s);
}

// Of `count` numbers, each gate's silu times its value, to where the gate was.
void gate(float* gates, const float* values, int64_t count) {
    const int64_t whole = count / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) store(gates + i, silu(load<Floats>(gates + i)) * load<Floats>(values + i));
    if (whole == count) return;
    float rest[2][LANES] = {};
    std::copy(gates + whole, gates + count, rest[0]), std::copy(values + whole, values + count, rest[1]);
    store(rest[0], silu(load<Floats>(rest[0])) * load<Floats>(rest[1]));
    std::copy(rest[0], rest[0] + (count - whole), gates + whole);
}

void attention(Thread& me, const Block& block, const Step& s, const float* x, Target target) {
    int64_t n = s.rows * s.tokens, D = s.head_dim;
    const float* normed = normalised(x, block.attention_norm, n, s.dim, s.eps);
    product(me, block.wqkv, normed, n, {s.qkv, (s.heads + 2 * s.kv_heads) * D, false});
    s.cache_kind == FLOAT32 ? remember<Float32Cache>(me, block, s) : remember<Bfloat16Cache>(me, block, s);
#pragma omp barrier
    look(me, block, s);
    product(me, block.wo, s.mixed, n, target);
}

void feed_forward(Thread& me, const Block& block, const Step& s, const float* x, Target target) {
    int64_t n = s.rows * s.tokens;
    const float* normed = normalised(x, block.ffn_norm, n, s.dim, s.eps);
    float *gates = s.gated, *values = gates + n * s.hidden;
    product(me, block.w13, normed, n, {{0, {gates, s.hidden, false}}, {s.hidden, {values - s.hidden, s.hidden, false}}},
            [&](int64_t first, int64_t last) {
                for (int64_t at = first; at < first + n * s.hidden; at += s.hidden) gate(gates + at, values + at, last - first);
            });
    product(me, block.w2, gates, n, target);
}

// A prompt's attention ------------------------------------------------------------------------------------------------
//
// Softmax in one pass again, as FlashAttention does it (arXiv 2205.14135): a block of queries meets SLOTS slots at a time,
// whose keys and values are laid out first so that lanes are slots (of keys) or head dimensions (of values). Numbers are of
// the type T, as they are in the cache; one word of 32 bits, a float32 or two of bfloat16, is multiplied at a time.

constexpr int SLOTS = 64, TOGETHER = 4;  // queries that meet ROOM vectors

// To R x N vectors, each of R rows of `count` words times a column of words, which are `stride` apart.
template <class T, int R, int N>
inline void add_words(
    Floats (&sums)[R][N], const T* rows, int64_t row_stride, int64_t count, const uint32_t* columns, int64_t stride) {
    using Numbers = typename std::conditional<sizeof(T) == 4, Floats, Halves>::type;
    constexpr int64_t PAIR = 4 / sizeof(T);
    for (int64_t i = 0; i < count; i++) {
        Numbers column[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) column[n] = load<Numbers>(columns + i * stride + n * LANES);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            Numbers row = Numbers(Words{} + load<uint32_t>(rows + r * row_stride + i * PAIR));
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) sums[r][n] = add_product(sums[r][n], row, column[n]);
        }
    }
}

// What a thread has of a kv head: a block of queries, and a block of slots.
template <class T>
struct Attention {
    static constexpr int64_t PAIR = 4 / sizeof(T);
    const Prompt& p;
    const int64_t D = p.head_dim, group = p.heads / p.kv_heads;
    std::vector<uint32_t> keys, values;  // (D / PAIR, SLOTS) and (SLOTS / PAIR, D) words
    std::vector<T> zeros;
    std::vector<float> sums, most, total;  // (queries, D), and of each query
    explicit Attention(const Prompt& prompt) : p(prompt), keys(D / PAIR * SLOTS), values(SLOTS / PAIR * D), zeros(D) {}

    void lay_out(const T* from_keys, const T* from_values, int64_t count) {
        if (count < SLOTS) std::fill(keys.begin(), keys.end(), 0), std::fill(values.begin(), values.end(), 0);
        for (int64_t i = 0; i < D / PAIR; i++)
            for (int64_t slot = 0; slot < count; slot++)
                keys[i * SLOTS + slot] = load<uint32_t>(from_keys + slot * D + i * PAIR);
        for (int64_t slot = 0; slot < count; slot += PAIR) {
            const T *one = from_values + slot * D, *next = slot + PAIR <= count ? one + (PAIR - 1) * D : zeros.data();
            uint32_t* words = values.data() + slot / PAIR * D;
            for (int64_t d = 0; d < D; d++)
                if constexpr (PAIR == 2) words[d] = one[d] | uint32_t(next[d]) << 16;
                else words[d] = load<uint32_t>(one + d);
        }
    }

    // R queries beside each other, the first of which sees `seen` of the block's slots, and each one more than the last.
    template <int R>
    void meet(const T* q, int64_t query, int64_t seen) {
        float scores[R][SLOTS];
        T weights[R][SLOTS];
        const float scale = 1 / std::sqrt(float(D));
        for (int64_t slot = 0; slot < SLOTS; slot += ROOM * LANES) {
            Floats made[R][ROOM] = {};
            add_words<T>(made, q, p.q_token, D / PAIR, keys.data() + slot, SLOTS);
            for (int r = 0; r < R; r++)
                for (int n = 0; n < ROOM; n++) store(&scores[r][slot + n * LANES], made[r][n] * scale);
        }
        float fade[R];
        for (int r = 0; r < R; r++) {
            for (int64_t slot = std::max<int64_t>(0, seen + r); slot < SLOTS; slot++) scores[r][slot] = NEVER;
            Floats highest = load<Floats>(scores[r]), added = {};
            for (int64_t slot = LANES; slot < SLOTS; slot += LANES) {
                Floats here = load<Floats>(&scores[r][slot]);
                highest = here > highest ? here : highest;
            }
            float before = most[query + r], now = std::max(before, largest(highest));
            for (int64_t slot = 0; slot < SLOTS; slot += LANES) {
                Floats score = load<Floats>(&scores[r][slot]), weight = exponential(score - now);
                weight = score <= NEVER ? Floats{} : weight;
                added += weight;
                put(&weights[r][slot], weight);
            }
            fade[r] = before == now ? 1 : std::exp(before - now);
            most[query + r] = now;
            total[query + r] = total[query + r] * fade[r] + sum(added);
        }
        int64_t d = 0;
        for (; d + ROOM * LANES <= D; d += ROOM * LANES) mix<R, ROOM>(weights[0], fade, query, d);
        for (; d < D; d += LANES) mix<R, 1>(weights[0], fade, query, d);
    }

    template <int R, int N>
    void mix(const T* weights, const float* fade, int64_t query, int64_t d) {
        Floats mixed[R][N];
        for (int r = 0; r < R; r++)
            for (int n = 0; n < N; n++) mixed[r][n] = load<Floats>(&sums[(query + r) * D + d + n * LANES]) * fade[r];
        add_words<T>(mixed, weights, SLOTS, SLOTS / PAIR, values.data() + d, D);
        for (int r = 0; r < R; r++)
            for (int n = 0; n < N; n++) store(&sums[(query + r) * D + d + n * LANES], mixed[r][n]);
    }

    // Tokens first to last of a row, by the query heads of a kv head.
    void operator()(int64_t row, int64_t kv_head, int64_t first, int64_t last) {
        const int64_t tokens = last - first, start = p.starts[row] + first, end = p.starts[row] + last;
        sums.assign(group * tokens * D, 0), most.assign(group * tokens, NEVER), total.assign(group * tokens, 0);
        const T *own_keys = static_cast<const T*>(p.keys) + row * p.kv_row + kv_head * p.kv_head;
        const T *own_values = static_cast<const T*>(p.values) + row * p.kv_row + kv_head * p.kv_head;
        for (int64_t slot = 0; slot < end; slot += SLOTS) {
            lay_out(own_keys + slot * D, own_values + slot * D, std::min<int64_t>(SLOTS, end - slot));
            for (int64_t head = 0; head < group; head++) {
                const T* q = static_cast<const T*>(p.q) + row * p.q_row + (kv_head * group + head) * p.q_head;
                int64_t t = std::max<int64_t>(0, slot - start);  // earlier ones don't see so far
                for (; t + TOGETHER <= tokens; t += TOGETHER)
                    meet<TOGETHER>(q + (first + t) * p.q_token, head * tokens + t, start + t + 1 - slot);
                for (; t < tokens; t++) meet<1>(q + (first + t) * p.q_token, head * tokens + t, start + t + 1 - slot);
            }
        }
        for (int64_t head = 0; head < group; head++)
            for (int64_t t = 0; t < tokens; t++) {
                int64_t query = head * tokens + t, token = row * p.tokens + first + t;
                T* out = static_cast<T*>(p.out) + (token * p.heads + kv_head * group + head) * D;
                for (int64_t d = 0; d < D; d += LANES) put(out + d, load<Floats>(&sums[query * D + d]) / total[query]);
            }
    }
};

template <class Attention>
void attend_to(const Prompt& p) {
    int64_t queries = std::max<int64_t>(16, 256 * p.kv_heads / p.heads), blocks = (p.tokens + queries - 1) / queries;
#pragma omp parallel num_threads(p.threads)
    {
        Attention attention(p);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < p.rows * p.kv_heads * blocks; item++) {
            int64_t block = blocks - 1 - item % blocks;
            attention(item / blocks / p.kv_heads, item / blocks % p.kv_heads, block * queries,
                      std::min(p.tokens, (block + 1) * queries));
        }
    }
}

}  // namespace

// What Python calls ---------------------------------------------------------------------------------------------------

extern "C" {

int64_t lanes() { return LANES; }

// Whether x of 8 bits is multiplied in bytes.
int64_t multiplies_bytes() {
#ifdef MULTIPLIES_BYTES
    return 1;
#else
    return 0;
#endif
}

// Whether weights of bfloat16 meet x in bfloat16.
int64_t multiplies_bfloat16() {
#ifdef MULTIPLIES_BFLOAT16
    return 1;
#else
    return 0;
#endif
}

// Of the threads' numbers, which are 0 to threads - 1.
int64_t sum_of_threads(int64_t threads) {
    int64_t total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    total += omp_get_thread_num();
    return total;
}

// Tokens to x (n, dim), as it is after the last norm. Returns how many tokens there were before one that is no row of the
// embedding: n, if all is well.
int64_t run_blocks(const Block* blocks, int64_t count, const Step* step, float* x) {
    int64_t n = step->rows * step->tokens, dim = step->dim;
    for (int64_t i = 0; i < n; i++) {
        if (step->ids[i] < 0 || step->ids[i] >= step->vocabulary) return i;
        Matrix table{step->embedding, nullptr, nullptr, step->embedding_kind, 0, dim, 0};
        decode_row(table, step->ids[i], x + i * dim);
    }
    together(step->threads, [&](Thread& me) {
        for (int64_t i = 0; i < count; i++) {
            attention(me, blocks[i], *step, x, {x, dim, true});
            feed_forward(me, blocks[i], *step, x, {x, dim, true});
        }
    });
    for (int64_t i = 0; i < n; i++) normalise(x + i * dim, step->norm, dim, step->eps, x + i * dim);
    return n;
}

// What a block's attention, or its feed-forward, adds to x: this rank's part of the sum, to out (n, dim).
void run_half(const Block* block, int64_t is_attention, const Step* step, const float* x, float* out) {
    together(step->threads, [&](Thread& me) {
        (is_attention ? attention : feed_forward)(me, *block, *step, x, {out, step->dim, false});
    });
}

// softmax(q·k / sqrt(D))·v of a prompt, each token of which sees the slots up to its own.
void attend_prompt(const Prompt* prompt) {
#ifdef HAS_TILES
    if (prompt->kind == BFLOAT16 && prompt->head_dim % 32 == 0 && may_use_tiles()) return attend_to<TiledAttention>(*prompt);
#endif
    prompt->kind == FLOAT32 ? attend_to<Attention<float>>(*prompt) : attend_to<Attention<uint16_t>>(*prompt);
}

// Of bfloat16, (rows, T, heads, D): pairs of neighbours turned by the angles of their token, cos and sin (T, D/2) or, with
// an `angle_row` between rows, (rows, T, D/2). D is a multiple of 2 * LANES.
void turn(uint16_t* x, int64_t rows, int64_t tokens, int64_t heads, int64_t head_dim, int64_t token_stride, const float* cos,
          const float* sin, int64_t angle_row, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * tokens > 1)
    for (int64_t token = 0; token < rows * tokens; token++) {
        int64_t angles = token / tokens * angle_row + token % tokens * head_dim / 2;
        for (int64_t head = 0; head < heads; head++)
            for (int64_t pair = 0; pair < head_dim / 2; pair += LANES) {
                uint16_t* at = x + token * token_stride + head * head_dim + 2 * pair;
                Words words = load<Words>(at);
                Floats even = Floats(words << 16), odd = Floats(words & 0xffff0000u);
                Floats c = load<Floats>(cos + angles + pair), s = load<Floats>(sin + angles + pair);
                Words turned = narrowed(even * c - odd * s) | narrowed(even * s + odd * c) << 16;
                std::memcpy(at, &turned, sizeof turned);
            }
    }
}

// Of bfloat16, x (n, 2 * hidden) to out (n, hidden): the first half's silu times the second. `hidden` is a multiple of LANES.
void gate(const uint16_t* x, int64_t n, int64_t hidden, uint16_t* out, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (n > 1)
    for (int64_t token = 0; token < n; token++)
        for (int64_t i = 0; i < hidden; i += LANES) {
            const uint16_t* at = x + 2 * token * hidden + i;
            Floats g = widened(at);
            put(out + token * hidden + i, silu(g) * widened(at + hidden));
        }
}

// x (n, C) times a weight (N, C), transposed: out (n, N).
void multiply(const Matrix* m, const float* x, int64_t n, float* out, int64_t threads) {
    if (n) together(threads, [&](Thread& me) { product(me, *m, x, n, {out, m->rows, false}); });
}

// Whether `multiply_many` can be had: by matrix tiles.
int64_t has_tiles() {
#ifdef HAS_TILES
    return may_use_tiles();
#else
    return 0;
#endif
}

// x (n, C) times a weight (N, C) of 16, 8 or 4 bits, transposed: out (n, N), all of bfloat16. C is a multiple of 64.
void multiply_many(const Matrix* m, const uint16_t* x, int64_t n, uint16_t* out, int64_t threads) {
#ifdef HAS_TILES
    with_kind(*m, [&](auto kind) {
        using W = decltype(kind);
        if constexpr (!std::is_same<W, Float32>::value) multiply_many<W>(*m, x, n, out, threads);
    });
#endif
}

// Rows first to first + count of a weight of 4 bits, as numbers of a kind (count, C).
void decode(const Matrix* m, int64_t first, int64_t count, void* out, int64_t kind, int64_t threads) {
    with_four_bits(*m, [&](auto codes) {
#pragma omp parallel for num_threads(threads)
        for (int64_t row = 0; row < count; row++)
            kind == FLOAT32 ? decode_row(codes, *m, first + row, static_cast<float*>(out) + row * m->columns)
                            : decode_row(codes, *m, first + row, static_cast<uint16_t*>(out) + row * m->columns);
    });
}

}  // extern "C"
