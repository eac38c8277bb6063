// A step of a few tokens: the transformer's blocks, and products by weights of 32, 16, 8 and 4 bits.
//
// Writing a token multiplies a few vectors by every weight of the model. What takes the time is to read the weights, as
// long as nothing else gets in the way; and with a framework's operators something does: each costs some microseconds to
// begin, and few of them read 16, 8 or 4 bits at the speed of memory on every processor. So here a whole step is one call.
// Its threads stay together from the first block to the last and meet where one needs what the others made. All sums are
// in float32, whatever the weights are kept in: they are widened in registers, on their way from memory.
//
// Nothing here depends on PyTorch or on a processor: vectors are GCC's (Clang has them too), LANES numbers wide, and the
// compiler turns them into what there is. Letters are those of model.py: B rows of T new tokens each, n = B * T tokens,
// H query heads, K kv heads, D head dim, S slots.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <vector>

#ifndef LANES
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
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

enum Kind : int64_t { FLOAT32, BFLOAT16, INT8, INT4, NF4 };

// Vectors -------------------------------------------------------------------------------------------------------------

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

template <class V>
inline V load(const void* at) {  // from any address
    V v;
    std::memcpy(&v, at, sizeof v);
    return v;
}

// Keeps the compiler from reading a number anew from memory for each use of it.
inline Floats once(Floats v) {
#if (LANES == 16 && defined(__AVX512F__)) || (LANES == 8 && defined(__AVX__)) || (LANES == 4 && defined(__SSE__))
    asm("" : "+x"(v));
#endif
    return v;
}

inline void store(float* at, Floats v) { std::memcpy(at, &v, sizeof v); }

inline float widen(uint16_t half) {  // bfloat16 is the upper half of a float32
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

inline float sum(Floats v) {
    typedef float Four __attribute__((vector_size(16)));
    Four parts[LANES / 4];
    std::memcpy(parts, &v, sizeof v);
    Four four = parts[0];
    for (int i = 1; i < LANES / 4; i++) four += parts[i];
    return (four[0] + four[2]) + (four[1] + four[3]);
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

inline Floats lane_sums(const float* x, int64_t count) {
    Floats total = {};
    for (int64_t i = 0; i < count; i += LANES) total += load<Floats>(x + i);
    return total;
}

// Weights -------------------------------------------------------------------------------------------------------------
//
// Each kind says how a STEP of columns is read: VECTORS times LANES numbers, in whatever order and size cost least to get
// from its bytes. x is brought into that order once (`place`), and made smaller where they are `larger` than the weights.
// `at` is one weight by its column: it is what the others must agree with, and does what is left of a row whose columns
// are no whole number of steps. What all weights of a group (GROUP columns; 0: a row) have in common is left out of them,
// and multiplied by the sum of the group's x: `offset`.

struct Float32 {
    static constexpr int VECTORS = 1, STEP = LANES;
    static constexpr bool GROUPED = false, OFFSET = false, TALL = false;
    static int place(int vector, int lane) { return lane; }
    static float larger(int vector) { return 1; }
    static Floats get(const uint8_t* row, int64_t step, int vector) { return load<Floats>(row + step * 4 * LANES); }
    static void place_sums(const float*, int64_t, int64_t, float*) {}
    static int64_t bytes(int64_t columns) { return 4 * columns; }
    static float at(const Matrix& m, int64_t row, int64_t column) {
        return static_cast<const float*>(m.codes)[row * m.columns + column];
    }
    static float finish(const Matrix& m, int64_t row, float sum) { return sum; }
};

struct Bfloat16 {  // of two neighbours in 32 bits, the second is a float32 once the first is taken off it
    static constexpr int VECTORS = 2, STEP = 2 * LANES;
    static constexpr bool GROUPED = false, OFFSET = false, TALL = false;
    static int place(int vector, int lane) { return 2 * lane + vector; }
    static float larger(int vector) { return 1; }
    static Floats get(const uint8_t* row, int64_t step, int vector) {
        Words pairs = load<Words>(row + step * 4 * LANES);
        pairs = vector ? pairs & 0xffff0000u : pairs << 16;
        return load<Floats>(&pairs);
    }
    static void place_sums(const float*, int64_t, int64_t, float*) {}
    static int64_t bytes(int64_t columns) { return 2 * columns; }
    static float at(const Matrix& m, int64_t row, int64_t column) {
        return widen(static_cast<const uint16_t*>(m.codes)[row * m.columns + column]);
    }
    static float finish(const Matrix& m, int64_t row, float sum) { return sum; }
};

struct Int8 {  // four neighbours in 32 bits, each left where it stands; with 128 more they have no sign
    static constexpr int VECTORS = 4, STEP = 4 * LANES;
    static constexpr bool GROUPED = false, OFFSET = true, TALL = false;
    static int place(int vector, int lane) { return 4 * lane + vector; }
    static float larger(int vector) { return vector < 3 ? float(1 << 8 * vector) : 1; }
    static Floats get(const uint8_t* row, int64_t step, int vector) {
        Words fours = load<Words>(row + step * 4 * LANES) ^ 0x80808080u;
        fours = vector < 3 ? fours & 255u << 8 * vector : fours >> 24;
        return __builtin_convertvector(load<Ints>(&fours), Floats);
    }
    static void place_sums(const float* x, int64_t whole, int64_t, float* placed) { store(placed, lane_sums(x, whole)); }
    static Floats offset(const Matrix&, int64_t, const float* sums) { return -128.0f * load<Floats>(sums); }
    static int64_t bytes(int64_t columns) { return columns; }
    static float at(const Matrix& m, int64_t row, int64_t column) {
        return static_cast<const int8_t*>(m.codes)[row * m.columns + column];
    }
    static float finish(const Matrix& m, int64_t row, float sum) { return sum * widen(m.scale[row]); }
};

// 4 bits, two in a byte, the first in the upper half. A lane reads eight neighbours in its 32 bits; they are multiplied as
// they are, and a step's sums by the scale of each lane's group.
template <int GROUP>
struct FourBits {
    static constexpr int VECTORS = 8, STEP = 8 * LANES;
    static constexpr bool GROUPED = true;
    static int place(int vector, int lane) { return 8 * lane + (vector ^ 1); }
    static int64_t bytes(int64_t columns) { return columns / 2; }
    static int code_at(const Matrix& m, int64_t row, int64_t column) {
        int64_t index = row * m.columns + column;
        uint8_t pair = static_cast<const uint8_t*>(m.codes)[index / 2];
        return index % 2 ? pair & 15 : pair >> 4;
    }
    static float finish(const Matrix& m, int64_t row, float sum) { return sum; }

    // A step's scales, in the lanes of their groups. Two bfloat16 are read at once, and each is shifted to where a float32
    // has its upper half.
    static Floats scales(const uint16_t* of_row, int64_t step) {
        constexpr int lanes = GROUP / 8;
        if constexpr (lanes >= LANES) return Floats{} + widen(of_row[step / (lanes / LANES)]);
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
    static constexpr bool OFFSET = true, TALL = true;
    static float larger(int vector) { return vector < 7 ? float(1 << 4 * vector) : 1; }
    static Floats get(const uint8_t* row, int64_t step, int vector) {
        Words eights = load<Words>(row + step * 4 * LANES);
        eights = vector < 7 ? eights & 15u << 4 * vector : eights >> 28;
        return __builtin_convertvector(load<Ints>(&eights), Floats);
    }
    // Where a group's sum is placed: Bfloat16 reads a row of scales as it reads a row of weights.
    static int64_t placed_group(int64_t g) { return g / (2 * LANES) * (2 * LANES) + g % 2 * LANES + g % (2 * LANES) / 2; }

    static void place_sums(const float* x, int64_t whole, int64_t columns, float* placed) {
        std::fill(placed, placed + (columns / GROUP + 2 * LANES - 1) / (2 * LANES) * (2 * LANES), 0.0f);
        for (int64_t g = 0; g < whole / GROUP; g++) placed[placed_group(g)] = sum(lane_sums(x + g * GROUP, GROUP));
    }
    // Of (code - 8) * scale + zero, what is not code * scale. There are zeros behind the sums, so that numbers of the next
    // row, which are finite, do no harm; behind the last row there are none.
    static Floats offset(const Matrix& m, int64_t row, const float* sums) {
        int64_t groups = m.columns / GROUP, first = row * groups, steps = (groups + Bfloat16::STEP - 1) / Bfloat16::STEP;
        const uint16_t *scale = m.scale + first, *zero = m.zero + first;
        if (first + steps * Bfloat16::STEP > m.rows * groups) {
            float rest = 0;
            for (int64_t g = 0; g < groups; g++) rest += (widen(zero[g]) - 8 * widen(scale[g])) * sums[placed_group(g)];
            return Floats{rest};
        }
        Floats total = {};
        for (int64_t s = 0; s < steps; s++)
            for (int v = 0; v < Bfloat16::VECTORS; v++, sums += LANES) {
                auto read = [&](const uint16_t* of) { return Bfloat16::get(reinterpret_cast<const uint8_t*>(of), s, v); };
                total += (read(zero) - 8.0f * read(scale)) * load<Floats>(sums);
            }
        return total;
    }
    static float at(const Matrix& m, int64_t row, int64_t column) {
        int64_t group = (row * m.columns + column) / GROUP;
        return float(FourBits<GROUP>::code_at(m, row, column) - 8) * widen(m.scale[group]) + widen(m.zero[group]);
    }
};

// The 16 levels of QLoRA's NormalFloat (arXiv 2305.14314, appendix E).
constexpr float NORMAL[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
    -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

template <int GROUP>
struct Nf4 : FourBits<GROUP> {  // level(code) * scale
    static constexpr bool OFFSET = false, TALL = false;
    static void place_sums(const float*, int64_t, int64_t, float*) {}
    static float larger(int vector) { return 1; }
    static Floats get(const uint8_t* row, int64_t step, int vector) {
        Words found = load<Words>(row + step * 4 * LANES) >> uint32_t(4 * vector) & 15u;
#if LANES == 8 && !defined(__clang__)
        return __builtin_shuffle(load<Floats>(NORMAL), load<Floats>(NORMAL + 8), load<Ints>(&found));
#elif LANES == 16 && !defined(__clang__)
        return __builtin_shuffle(load<Floats>(NORMAL), load<Ints>(&found));
#else
        float levels[LANES];
        for (int i = 0; i < LANES; i++) levels[i] = NORMAL[found[i]];
        return load<Floats>(levels);
#endif
    }
    static float at(const Matrix& m, int64_t row, int64_t column) {
        return NORMAL[FourBits<GROUP>::code_at(m, row, column)] * widen(m.scale[(row * m.columns + column) / GROUP]);
    }
};

// Products ------------------------------------------------------------------------------------------------------------

// x as W wants it: step by step, what is left of a row, and the sums of groups, in the order in which Bfloat16 reads the
// groups' numbers.
template <class W>
void place(const Matrix& m, const float* x, float* placed) {
    int64_t steps = m.columns / W::STEP, whole = steps * W::STEP;
    for (int64_t s = 0; s < steps; s++)
#pragma GCC unroll 8
        for (int v = 0; v < W::VECTORS; v++)
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) *placed++ = x[s * W::STEP + W::place(v, i)] * (1 / W::larger(v));
    placed = std::copy(x + whole, x + m.columns, placed);
    W::place_sums(x, whole, m.columns, placed);
}

template <class W>
int64_t placed_size(const Matrix& m) {
    return m.columns + (m.group ? m.columns / m.group : 0) + 2 * LANES;
}

// R rows of a weight times X vectors. Each pair adds up in the same order in whatever tile it is, so that what comes out
// for a token does not depend on those beside it.
template <class W, int R, int X>
inline void tile(const Matrix& m, int64_t row, const float* x, int64_t stride, float (&out)[R][X]) {
    int64_t size = W::bytes(m.columns), steps = m.columns / W::STEP, whole = steps * W::STEP;
    int64_t groups = W::GROUPED ? m.columns / m.group : 0;
    const uint8_t *codes = static_cast<const uint8_t*>(m.codes) + row * size, *next = codes + R * size;
    const uint16_t* scale = m.scale + row * groups;
    Floats sums[R][X] = {};
    for (int64_t s = 0; s < steps; s++) {
        const float* here = x + s * W::STEP;
        Floats own[R][X] = {};
        auto& into = *(W::GROUPED ? &own : &sums);
        // The next tile, asked for in the order in which it lies: memory is quickest so.
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) __builtin_prefetch(next + (R * s + r) * 4 * LANES, 0, 2);
#pragma GCC unroll 8
        for (int v = 0; v < W::VECTORS; v++) {
            Floats w[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) w[r] = W::get(codes + r * size, s, v);
#pragma GCC unroll 4
            for (int j = 0; j < X; j++) {
                Floats number = once(load<Floats>(here + j * stride + v * LANES));
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) into[r][j] += w[r] * number;
            }
        }
        if constexpr (W::GROUPED) {
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                Floats of_lanes = W::scales(scale + r * groups, s);
#pragma GCC unroll 4
                for (int j = 0; j < X; j++) sums[r][j] += of_lanes * own[r][j];
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < X; j++) {
            const float* rest = x + j * stride;
            if constexpr (W::OFFSET) sums[r][j] += W::offset(m, row + r, rest + m.columns);
            float total = sum(sums[r][j]);
            for (int64_t c = whole; c < m.columns; c++) total += W::at(m, row + r, c) * rest[c];
            out[r][j] = W::finish(m, row + r, total);
        }
}

struct Target {
    float* out;
    int64_t stride;
    bool add;
    void operator()(int64_t token, int64_t row, float value) const {
        float& place = out[token * stride + row];
        place = add ? place + value : value;
    }
};

template <class W, int R, int X>
inline void tile_to(const Matrix& m, int64_t row, const float* x, int64_t stride, int64_t token, Target target) {
    float out[R][X];
    tile<W, R, X>(m, row, x + token * stride, stride, out);
    for (int j = 0; j < X; j++)
        for (int r = 0; r < R; r++) target(token + j, row + r, out[r][j]);
}

template <class W, int R, int MOST>
inline void rows_times(const Matrix& m, int64_t row, const float* x, int64_t stride, int64_t n, Target target) {
    int64_t token = 0;
    for (; token + MOST <= n; token += MOST) tile_to<W, R, MOST>(m, row, x, stride, token, target);
    for (; token < n; token++) tile_to<W, R, 1>(m, row, x, stride, token, target);
}

// Some rows of a weight, and where what they make goes.
struct Part {
    int64_t first, last;
    Target target;
};

template <class W>
void products(const Matrix& m, const float* x, int64_t n, std::initializer_list<Part> parts) {
    static thread_local std::vector<float> room;
    int64_t stride = (placed_size<W>(m) + 15) / 32 * 32 + 16;  // vectors begin in different lines of a cache
    room.resize(n * stride + 16);
    float* placed = room.data() + (16 - reinterpret_cast<uintptr_t>(room.data()) / 4 % 16);
    for (int64_t j = 0; j < n; j++) place<W>(m, x + j * m.columns, placed + j * stride);
    for (const Part& part : parts) {
        int64_t row = part.first;
        // Tall tiles widen a weight for two vectors, and keep up with memory; wide ones for four, which is less work a
        // vector, but not where a group's sums fill the registers as well (docs/LOG.md).
        if (n < 4 || W::TALL)
            for (; row + 4 <= part.last; row += 4) rows_times<W, 4, 2>(m, row, placed, stride, n, part.target);
        for (; row + 2 <= part.last; row += 2) rows_times<W, 2, 4>(m, row, placed, stride, n, part.target);
        for (; row < part.last; row++) rows_times<W, 1, 1>(m, row, placed, stride, n, part.target);
    }
}

template <class Use>
void with_kind(const Matrix& m, Use use) {
    switch (m.kind) {
        case FLOAT32: return use(Float32{});
        case BFLOAT16: return use(Bfloat16{});
        case INT8: return use(Int8{});
        case INT4: return m.group == 32 ? use(Int4<32>{}) : m.group == 64 ? use(Int4<64>{}) : use(Int4<128>{});
        case NF4: return use(Nf4<64>{});
    }
}

// Rows of a weight times n vectors (n, C).
void product(const Matrix& m, const float* x, int64_t n, std::initializer_list<Part> parts) {
    with_kind(m, [&](auto kind) { products<decltype(kind)>(m, x, n, parts); });
}

void decode_row(const Matrix& m, int64_t row, float* out) {
    with_kind(m, [&](auto kind) {
        for (int64_t c = 0; c < m.columns; c++) out[c] = kind.finish(m, row, kind.at(m, row, c));
    });
}

// The parts of a block ------------------------------------------------------------------------------------------------

struct Thread {
    int64_t index, count;
    // Its part of a range, in whole sixteens: whole tiles, and whole vectors, so that nothing depends on how many share.
    void share(int64_t whole, int64_t& first, int64_t& last) const {
        int64_t parts = (whole + 15) / 16;
        first = std::min(whole, parts * index / count * 16);
        last = std::min(whole, parts * (index + 1) / count * 16);
    }
};

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
    normed.resize(n * dim);
    for (int64_t i = 0; i < n; i++) normalise(x + i * dim, weight, dim, eps, normed.data() + i * dim);
    return normed.data();
}

void rotate(float* x, const float* cos, const float* sin, int64_t pairs) {
    for (int64_t i = 0; i < pairs; i++) {
        float even = x[2 * i], odd = x[2 * i + 1];
        x[2 * i] = even * cos[i] - odd * sin[i];
        x[2 * i + 1] = even * sin[i] + odd * cos[i];
    }
}

// Of a cache, keys and values are read like rows of weights.
template <class W>
void write(void* store, int64_t at, const float* x, int64_t D) {
    if constexpr (sizeof(typename W::Number) == 4) std::copy(x, x + D, static_cast<float*>(store) + at);
    else for (int64_t i = 0; i < D; i++) static_cast<uint16_t*>(store)[at + i] = narrow(x[i]);
}

struct Float32Cache : Float32 { using Number = float; };
struct Bfloat16Cache : Bfloat16 { using Number = uint16_t; };

constexpr int AT_ONCE = 64;  // slots: their scores are made before the softmax goes on
constexpr float NEVER = -3e38f;

// STEPS steps of `count` values, each by its slot's weight, to what there is of them.
template <class W, int STEPS>
inline void mix(const uint8_t* values, int64_t size, int64_t step, int64_t count, const float* weights, float fade, float* sums) {
    constexpr int ALL = STEPS * W::VECTORS;
    float* place = sums + step * W::STEP;
    Floats mixed[ALL];
#pragma GCC unroll 4
    for (int u = 0; u < ALL; u++) mixed[u] = load<Floats>(place + u * LANES) * fade;
    for (int64_t i = 0; i < count; i++)
#pragma GCC unroll 4
        for (int u = 0; u < ALL; u++)
            mixed[u] += weights[i] * W::get(values + i * size, step + u / W::VECTORS, u % W::VECTORS);
#pragma GCC unroll 4
    for (int u = 0; u < ALL; u++) store(place + u * LANES, mixed[u]);
}

struct Query {
    const float* q;  // (D), placed and scaled
    int64_t seen;    // slots that it sees
    float *sums, *out;
    float most, total;
};

// One query, and slots first to first + count of those it sees.
template <class W>
void attend(Query& query, const uint8_t* keys, const uint8_t* values, int64_t first, int64_t count, int64_t D) {
    int64_t size = W::bytes(D), steps = D / W::STEP;
    float scores[AT_ONCE], before = query.most;
    for (int64_t i = 0; i < count; i++) {
        const uint8_t* key = keys + (first + i) * size;
        Floats score = {};
        for (int64_t s = 0; s < steps; s++)
#pragma GCC unroll 2
            for (int v = 0; v < W::VECTORS; v++)
                score += W::get(key, s, v) * load<Floats>(query.q + s * W::STEP + v * LANES);
        scores[i] = sum(score);
        query.most = std::max(query.most, scores[i]);
    }
    for (int64_t i = count; i % LANES; i++) scores[i] = NEVER;
    Floats weights = {};
    for (int64_t i = 0; i < count; i += LANES) {
        Floats weight = exponential(load<Floats>(scores + i) - query.most);
        if (i + LANES > count)
            for (int lane = int(count - i); lane < LANES; lane++) weight[lane] = 0;
        store(scores + i, weight);
        weights += weight;
    }
    float fade = before == NEVER ? 0.0f : std::exp(before - query.most);
    query.total = query.total * fade + sum(weights);
    int64_t s = 0;
    for (; s + 4 / W::VECTORS <= steps; s += 4 / W::VECTORS)
        mix<W, 4 / W::VECTORS>(values + first * size, size, s, count, scores, fade, query.sums);
    for (; s < steps; s++) mix<W, 1>(values + first * size, size, s, count, scores, fade, query.sums);
}

template <class W>
void remember(Thread me, const Block& block, const Step& s) {
    int64_t D = s.head_dim, width = (s.heads + 2 * s.kv_heads) * D;
    for (int64_t item = me.index; item < s.rows * s.tokens * s.kv_heads; item += me.count) {
        int64_t token = item / s.kv_heads, head = item % s.kv_heads, row = token / s.tokens;
        int64_t position = s.starts[row] + token % s.tokens, at = ((row * s.kv_heads + head) * s.slots + position) * D;
        float* key = s.qkv + token * width + (s.heads + head) * D;
        rotate(key, s.cos + position * D / 2, s.sin + position * D / 2, D / 2);
        write<W>(block.keys, at, key, D);
        write<W>(block.values, at, key + s.kv_heads * D, D);
    }
}

// Softmax in one pass (online: arXiv 1805.02867). All queries of a kv head go through its keys and values together, some
// slots at a time, which are then in the thread's cache.
template <class W>
void look(Thread me, const Block& block, const Step& s) {
    int64_t D = s.head_dim, width = (s.heads + 2 * s.kv_heads) * D, group = s.heads / s.kv_heads, all = group * s.tokens;
    int64_t parts = 1;  // of a kv head's queries, where there are more threads than kv heads
    while (s.rows * s.kv_heads * parts < me.count && parts * 2 <= all) parts *= 2;
    static thread_local std::vector<float> room;
    static thread_local std::vector<Query> queries;
    room.resize(2 * all * D);
    for (int64_t item = me.index; item < s.rows * s.kv_heads * parts; item += me.count) {
        int64_t row = item / (s.kv_heads * parts), kv_head = item / parts % s.kv_heads, part = item % parts;
        int64_t longest = 0;
        queries.clear();
        for (int64_t i = all * part / parts; i < all * (part + 1) / parts; i++) {
            int64_t head = kv_head * group + i / s.tokens, token = row * s.tokens + i % s.tokens;
            int64_t position = s.starts[row] + i % s.tokens;
            float *q = s.qkv + token * width + head * D, *placed = room.data() + 2 * i * D;
            rotate(q, s.cos + position * D / 2, s.sin + position * D / 2, D / 2);
            for (int64_t step = 0; step < D / W::STEP; step++)
                for (int v = 0; v < W::VECTORS; v++)
                    for (int lane = 0; lane < LANES; lane++)
                        placed[step * W::STEP + v * LANES + lane] =
                            q[step * W::STEP + W::place(v, lane)] * (1 / std::sqrt(float(D)));
            std::fill(placed + D, placed + 2 * D, 0.0f);
            queries.push_back({placed, position + 1, placed + D, s.mixed + (token * s.heads + head) * D, NEVER, 0});
            longest = std::max(longest, position + 1);
        }
        int64_t from = (row * s.kv_heads + kv_head) * s.slots * W::bytes(D);
        const auto *keys = static_cast<const uint8_t*>(block.keys) + from;
        const auto *values = static_cast<const uint8_t*>(block.values) + from;
        for (int64_t first = 0; first < longest; first += AT_ONCE)
            for (Query& query : queries)
                if (first < query.seen)
                    attend<W>(query, keys, values, first, std::min<int64_t>(AT_ONCE, query.seen - first), D);
        for (const Query& query : queries)
            for (int64_t step = 0; step < D / W::STEP; step++)
                for (int v = 0; v < W::VECTORS; v++)
                    for (int lane = 0; lane < LANES; lane++)
                        query.out[step * W::STEP + W::place(v, lane)] =
                            query.sums[step * W::STEP + v * LANES + lane] / query.total;
    }
}

void attention(Thread me, const Block& block, const Step& s, const float* x, Target target) {
    int64_t n = s.rows * s.tokens, D = s.head_dim, first, last;
    const float* normed = normalised(x, block.attention_norm, n, s.dim, s.eps);
    me.share(block.wqkv.rows, first, last);
    product(block.wqkv, normed, n, {{first, last, {s.qkv, (s.heads + 2 * s.kv_heads) * D, false}}});
#pragma omp barrier
    s.cache_kind == FLOAT32 ? remember<Float32Cache>(me, block, s) : remember<Bfloat16Cache>(me, block, s);
#pragma omp barrier
    s.cache_kind == FLOAT32 ? look<Float32Cache>(me, block, s) : look<Bfloat16Cache>(me, block, s);
#pragma omp barrier
    me.share(block.wo.rows, first, last);
    product(block.wo, s.mixed, n, {{first, last, target}});
#pragma omp barrier
}

void feed_forward(Thread me, const Block& block, const Step& s, const float* x, Target target) {
    int64_t n = s.rows * s.tokens, first, last;
    const float* normed = normalised(x, block.ffn_norm, n, s.dim, s.eps);
    me.share(s.hidden, first, last);
    float* proposed = s.gated + n * s.hidden;  // behind the gates
    product(block.w13, normed, n,
            {{first, last, {s.gated, s.hidden, false}},
             {s.hidden + first, s.hidden + last, {proposed - s.hidden, s.hidden, false}}});
    for (int64_t token = 0; token < n; token++) {
        float *gate = s.gated + token * s.hidden, *value = proposed + token * s.hidden;
        int64_t i = first;
        for (; i + LANES <= last; i += LANES) {
            Floats g = load<Floats>(gate + i);
            store(gate + i, g / (1.0f + exponential(-g)) * load<Floats>(value + i));
        }
        for (; i < last; i++) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * value[i];
    }
#pragma omp barrier
    me.share(block.w2.rows, first, last);
    product(block.w2, s.gated, n, {{first, last, target}});
#pragma omp barrier
}

}  // namespace

// What Python calls ---------------------------------------------------------------------------------------------------

extern "C" {

int64_t lanes() { return LANES; }

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
#pragma omp parallel num_threads(step->threads)
    {
        Thread me{omp_get_thread_num(), omp_get_num_threads()};
        for (int64_t i = 0; i < count; i++) {
            attention(me, blocks[i], *step, x, {x, step->dim, true});
            feed_forward(me, blocks[i], *step, x, {x, step->dim, true});
        }
    }
    for (int64_t i = 0; i < n; i++) normalise(x + i * dim, step->norm, dim, step->eps, x + i * dim);
    return n;
}

// What a block's attention, or its feed-forward, adds to x: this rank's part of the sum, to out (n, dim).
void run_half(const Block* block, int64_t is_attention, const Step* step, const float* x, float* out) {
#pragma omp parallel num_threads(step->threads)
    {
        Thread me{omp_get_thread_num(), omp_get_num_threads()};
        (is_attention ? attention : feed_forward)(me, *block, *step, x, {out, step->dim, false});
    }
}

// x (n, C) times a weight (N, C), transposed: out (n, N).
void multiply(const Matrix* m, const float* x, int64_t n, float* out, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        int64_t first, last;
        Thread{omp_get_thread_num(), omp_get_num_threads()}.share(m->rows, first, last);
        product(*m, x, n, {{first, last, {out, m->rows, false}}});
    }
}

// Rows first to first + count of a weight, as float32 (count, C).
void decode(const Matrix* m, int64_t first, int64_t count, float* out, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < count; row++) decode_row(*m, first + row, out + row * m->columns);
}

}  // extern "C"
