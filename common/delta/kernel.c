/* The compiled twin of primitives.py: same functions, same bytes. That file describes them; this one is fast.
 *
 * No function allocates, and none writes outside the arrays it is given, whatever the input. Decoding functions treat
 * their input as hostile: they return an ERROR_ instead of a count.
 */
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "lists are written in little-endian order"
#endif

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int64_t i64;

enum { GROUP = 128, PARAMETER_BITS = 5, ALL_ZERO = 31, MAX_PARAMETER = 30, MAX_QUOTIENT = 20, NUM_CLASSES = 16 };
enum { SEARCH_BELOW = 2, SEARCH_ABOVE = 1, LIST_HEADER_BYTES = 4, TILE = 512 };
enum { ERROR_CUT = -1, ERROR_QUOTIENTS = -2, ERROR_PADDING = -3, ERROR_RANGE = -4, ERROR_ROOM = -5, ERROR_ORDER = -6 };

static inline i64 least(i64 a, i64 b) { return a < b ? a : b; }
static inline i64 bytes_of(i64 bits) { return (bits + 7) / 8; }

/* ---- masks of 64 comparisons, bit i for element i ---- */

static inline u64 gather_bits(const u8 *flags) /* 64 bytes of 0 or 1 */
{
    u64 mask = 0;
    for (int i = 0; i < 8; i++) {
        u64 word;
        memcpy(&word, flags + 8 * i, 8);
        mask |= (word * 0x0102040810204080u >> 56) << (8 * i);
    }
    return mask;
}

static inline u64 equal_bytes(const u8 *a, u8 value)
{
#if defined(__AVX512BW__)
    return _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(a), _mm512_set1_epi8((char)value));
#elif defined(__SSE2__)
    u64 mask = 0;
    for (int i = 0; i < 4; i++) {
        __m128i same = _mm_cmpeq_epi8(_mm_loadu_si128((const __m128i *)(a + 16 * i)), _mm_set1_epi8((char)value));
        mask |= (u64)_mm_movemask_epi8(same) << (16 * i);
    }
    return mask;
#else
    u8 flags[64];
    for (int i = 0; i < 64; i++) flags[i] = a[i] == value;
    return gather_bits(flags);
#endif
}

static inline u64 differing_16(const u16 *a, const u16 *b)
{
#if defined(__AVX512BW__)
    u64 low = _mm512_cmpneq_epi16_mask(_mm512_loadu_si512(a), _mm512_loadu_si512(b));
    u64 high = _mm512_cmpneq_epi16_mask(_mm512_loadu_si512(a + 32), _mm512_loadu_si512(b + 32));
    return low | high << 32;
#else
    u8 flags[64];
    for (int i = 0; i < 64; i++) flags[i] = a[i] != b[i];
    return gather_bits(flags);
#endif
}

static inline u64 differing_32(const u32 *a, const u32 *b)
{
    u8 flags[64];
    for (int i = 0; i < 64; i++) flags[i] = a[i] != b[i];
    return gather_bits(flags);
}

/* ---- finding changes ---- */

#define FIND_CHANGES(BITS)                                                                                             \
    i64 find_changes_##BITS(const u##BITS *old, const u##BITS *new, i64 n, u32 *positions, u32 *codes)                 \
    {                                                                                                                  \
        i64 found = 0;                                                                                                 \
        for (i64 start = 0; start < n; start += 64) {                                                                  \
            u64 mask = 0;                                                                                              \
            if (n - start >= 64) mask = differing_##BITS(old + start, new + start);                                    \
            else                                                                                                       \
                for (i64 i = start; i < n; i++) mask |= (u64)(old[i] != new[i]) << (i - start);                        \
            for (; mask; mask &= mask - 1) {                                                                           \
                i64 i = start + __builtin_ctzll(mask);                                                                 \
                u##BITS difference = (u##BITS)(new[i] - old[i]), sign = difference >> (BITS - 1);                      \
                positions[found] = (u32)i;                                                                             \
                codes[found++] = (u32)(u##BITS)((u##BITS)(difference << 1) ^ (u##BITS)(0 - sign)) - 1;                 \
            }                                                                                                          \
        }                                                                                                              \
        return found;                                                                                                  \
    }
FIND_CHANGES(16)
FIND_CHANGES(32)

/* ---- exponent order ---- */

typedef struct {
    const void *words; /* n old elements */
    i64 n;
    int bits, shift, mask, top;
} Block;

/* Classes of the elements from `start` on, at most TILE; the rest of the tile is filled with a class that is none. */
static void classify(const Block *block, i64 start, u8 *classes)
{
    i64 count = least(TILE, block->n - start);
    int shift = block->shift, mask = block->mask, above = block->top + 1;
    if (block->bits == 16) {
        const u16 *words = (const u16 *)block->words + start;
        for (i64 i = 0; i < count; i++) {
            int16_t class = (int16_t)(above - ((words[i] >> shift) & mask));
            class = class < 0 ? 0 : class;
            classes[i] = (u8)(class > NUM_CLASSES - 1 ? NUM_CLASSES - 1 : class);
        }
    } else {
        const u32 *words = (const u32 *)block->words + start;
        for (i64 i = 0; i < count; i++) {
            int class = above - (int)((words[i] >> shift) & (u32)mask);
            class = class < 0 ? 0 : class;
            classes[i] = (u8)(class > NUM_CLASSES - 1 ? NUM_CLASSES - 1 : class);
        }
    }
    memset(classes + count, 0xFF, (size_t)(TILE - count));
}

static void count_classes(const u8 *tile, i64 *counts)
{
    for (int class = 0; class < NUM_CLASSES; class++)
        for (int i = 0; i < TILE; i += 64) counts[class] += __builtin_popcountll(equal_bytes(tile + i, (u8)class));
}

/* How many of the first `end` elements of the tile have the class. */
static i64 count_before(const u8 *tile, i64 end, u8 class)
{
    i64 count = 0, i = 0;
    for (; i + 64 <= end; i += 64) count += __builtin_popcountll(equal_bytes(tile + i, class));
    if (i < end) count += __builtin_popcountll(equal_bytes(tile + i, class) & (~(u64)0 >> (64 - (end - i))));
    return count;
}

/* Needs ascending positions below n. Scratch: ranks [m], classes [m]. */
i64 into_order(const void *words, i64 n, int bits, int shift, int mask, int top, const u32 *positions,
               const u32 *codes, i64 m, u32 *ranks, u8 *classes, u32 *places, u32 *codes_out)
{
    Block block = {words, n, bits, shift, mask, top};
    i64 totals[NUM_CLASSES] = {0}, changed[NUM_CLASSES] = {0}, next[NUM_CLASSES], first[NUM_CLASSES];
    u8 tile[TILE];
    i64 at = 0;
    for (i64 start = 0; start < n; start += TILE) {
        classify(&block, start, tile);
        for (; at < m && positions[at] < (u64)(start + TILE); at++) {
            i64 offset = (i64)positions[at] - start;
            if (offset < 0 || offset >= n - start) return ERROR_ORDER;
            classes[at] = tile[offset];
            ranks[at] = (u32)(totals[classes[at]] + count_before(tile, offset, classes[at]));
            changed[classes[at]]++;
        }
        count_classes(tile, totals);
    }
    if (at < m) return ERROR_ORDER;
    for (i64 class = 0, place = 0, slot = 0; class < NUM_CLASSES; class++) {
        first[class] = place, next[class] = slot;
        place += totals[class], slot += changed[class];
    }
    for (i64 i = 0; i < m; i++) {
        i64 slot = next[classes[i]]++;
        places[slot] = (u32)(first[classes[i]] + ranks[i]);
        codes_out[slot] = codes[i];
    }
    return m;
}

/* Position in the tile of the element number `rank` of the class; TILE when there are not so many. */
static i64 find_in_tile(const u8 *tile, u8 class, i64 rank)
{
    for (i64 i = 0; i < TILE; i += 64) {
        u64 mask = equal_bytes(tile + i, class);
        i64 count = __builtin_popcountll(mask);
        if (rank < count) {
            while (rank--) mask &= mask - 1;
            return i + __builtin_ctzll(mask);
        }
        rank -= count;
    }
    return TILE;
}

/* Needs ascending places below n. Scratch: tiles [n rounded up to TILE], counts [n / TILE rounded up][NUM_CLASSES],
 * marks [n / 64 rounded up], before [the same], unsorted [m]. */
i64 out_of_order(const void *words, i64 n, int bits, int shift, int mask, int top, const u32 *places, const u32 *codes,
                 i64 m, u8 *tiles, u16 *counts, u64 *marks, u32 *before, u32 *unsorted, u32 *positions, u32 *codes_out)
{
    Block block = {words, n, bits, shift, mask, top};
    i64 num_tiles = (n + TILE - 1) / TILE, num_marks = (n + 63) / 64, at = 0, passed = 0;
    for (i64 t = 0; t < num_tiles; t++) {
        i64 in_tile[NUM_CLASSES] = {0};
        classify(&block, t * TILE, tiles + t * TILE);
        count_classes(tiles + t * TILE, in_tile);
        for (int class = 0; class < NUM_CLASSES; class++) counts[t * NUM_CLASSES + class] = (u16)in_tile[class];
    }
    memset(marks, 0, (size_t)num_marks * sizeof *marks);
    for (int class = 0; class < NUM_CLASSES && at < m; class++)
        for (i64 t = 0; t < num_tiles && at < m; passed += counts[t++ * NUM_CLASSES + class])
            for (; at < m && places[at] < passed + counts[t * NUM_CLASSES + class]; at++) {
                if (places[at] < passed) return ERROR_ORDER;
                i64 offset = find_in_tile(tiles + t * TILE, (u8)class, places[at] - passed);
                i64 position = t * TILE + offset;
                if (offset >= TILE || position >= n) return ERROR_ORDER;
                unsorted[at] = (u32)position;
                marks[position / 64] |= (u64)1 << (position % 64);
            }
    if (at < m) return ERROR_ORDER;
    u32 seen = 0;
    for (i64 i = 0; i < num_marks; i++) before[i] = seen, seen += (u32)__builtin_popcountll(marks[i]);
    if (seen != m) return ERROR_ORDER; /* a place was named twice */
    for (i64 i = 0; i < m; i++) {
        u32 position = unsorted[i];
        u64 below = marks[position / 64] & (((u64)1 << (position % 64)) - 1);
        u32 slot = before[position / 64] + (u32)__builtin_popcountll(below);
        positions[slot] = position;
        codes_out[slot] = codes[i];
    }
    return m;
}

/* ---- lists ---- */

typedef struct {
    u8 *next, *end;
    u64 waiting;
    int count;
} BitWriter;

static inline void put(BitWriter *out, u64 value, int width) /* width <= 32 */
{
    out->waiting |= value << out->count;
    out->count += width;
    if (out->count >= 32) {
        u32 word = (u32)out->waiting;
        if (out->end - out->next >= 4) memcpy(out->next, &word, 4);
        out->next += 4;
        out->waiting >>= 32;
        out->count -= 32;
    }
}

static void flush(BitWriter *out)
{
    for (; out->count > 0; out->count -= 8, out->waiting >>= 8, out->next++)
        if (out->next < out->end) *out->next = (u8)out->waiting;
}

typedef struct {
    const u8 *next, *end;
    u64 waiting;
    int count; /* bits in `waiting` */
} BitReader;

static inline void refill(BitReader *in)
{
    if (in->end - in->next >= 8) {
        u64 word;
        memcpy(&word, in->next, 8);
        in->waiting |= word << in->count;
        int taken = (63 - in->count) / 8;
        in->next += taken;
        in->count += 8 * taken;
        in->waiting &= ~(u64)0 >> (64 - in->count);
    } else
        for (; in->count <= 56 && in->next < in->end; in->count += 8) in->waiting |= (u64)*in->next++ << in->count;
}

static inline u64 take(BitReader *in, int width) /* width <= 32; zeros after the end */
{
    if (in->count < width) refill(in);
    u64 value = in->waiting & (((u64)1 << width) - 1);
    in->waiting >>= width;
    in->count -= width;
    return value;
}

static int bit_length(u32 value) { return value ? 32 - __builtin_clz(value) : 0; }

typedef struct {
    i64 quotient_bits, remainder_bits, escapes;
} Cost;

static Cost cost_of(const u32 *values, i64 count, int k)
{
    u32 quotients = 0, escapes = 0;
    for (i64 i = 0; i < count; i++) {
        u32 quotient = values[i] >> k;
        quotients += quotient < MAX_QUOTIENT ? quotient : MAX_QUOTIENT;
        escapes += quotient >= MAX_QUOTIENT;
    }
    return (Cost){quotients + count, k * count, escapes};
}

static int choose_parameter(const u32 *values, i64 count, Cost *total)
{
    i64 lengths = 0, best_bits = INT64_MAX;
    int best = 0;
    Cost best_cost = {0, 0, 0};
    for (i64 i = 0; i < count; i++) lengths += bit_length(values[i]);
    if (lengths == 0) return ALL_ZERO;
    for (int k = (int)(lengths / count) - SEARCH_BELOW, last = k + SEARCH_BELOW + SEARCH_ABOVE; k <= last; k++) {
        if (k < 0 || k > MAX_PARAMETER) continue;
        Cost cost = cost_of(values, count, k);
        i64 bits = cost.quotient_bits + cost.remainder_bits + 32 * cost.escapes;
        if (bits < best_bits) best_bits = bits, best = k, best_cost = cost;
    }
    total->quotient_bits += best_cost.quotient_bits;
    total->remainder_bits += best_cost.remainder_bits;
    total->escapes += best_cost.escapes;
    return best;
}

/* Scratch: parameters [groups]. Returns the bytes written. */
i64 pack_list(const u32 *values, i64 count, u8 *parameters, u8 *out, i64 room)
{
    i64 groups = (count + GROUP - 1) / GROUP;
    Cost total = {0, 0, 0};
    for (i64 g = 0; g < groups; g++)
        parameters[g] = (u8)choose_parameter(values + g * GROUP, least(GROUP, count - g * GROUP), &total);
    i64 parameter_bytes = bytes_of(groups * PARAMETER_BITS), quotient_bytes = bytes_of(total.quotient_bits);
    i64 remainder_bytes = bytes_of(total.remainder_bits);
    i64 size = LIST_HEADER_BYTES + parameter_bytes + quotient_bytes + remainder_bytes + 4 * total.escapes;
    if (size > room) return ERROR_ROOM;
    u32 header = (u32)quotient_bytes;
    memcpy(out, &header, 4);
    u8 *at = out + LIST_HEADER_BYTES;
    BitWriter heads = {at, at + parameter_bytes, 0, 0};
    at += parameter_bytes;
    BitWriter unary = {at, at + quotient_bytes, 0, 0};
    at += quotient_bytes;
    BitWriter binary = {at, at + remainder_bytes, 0, 0};
    u8 *escapes = at + remainder_bytes;
    for (i64 g = 0; g < groups; g++) {
        int k = parameters[g];
        put(&heads, (u64)k, PARAMETER_BITS);
        if (k == ALL_ZERO) continue;
        for (i64 i = g * GROUP, end = least(count, i + GROUP); i < end; i++) {
            u32 quotient = values[i] >> k;
            if (quotient >= MAX_QUOTIENT) {
                memcpy(escapes, &quotient, 4);
                escapes += 4;
                quotient = MAX_QUOTIENT;
            }
            put(&unary, (u64)1 << quotient, (int)quotient + 1);
            put(&binary, values[i] & (((u64)1 << k) - 1), k);
        }
    }
    flush(&heads), flush(&unary), flush(&binary);
    return size;
}

/* The group's values, of which at least `count` quotients and remainders must be there; escapes from `*escapes` on. */
static i64 unpack_group(BitReader *unary, BitReader *binary, int k, u32 *values, i64 count, const u8 **escapes,
                        const u8 *end)
{
    for (i64 i = 0; i < count; i++) {
        if (unary->count <= MAX_QUOTIENT) refill(unary);
        if (unary->waiting == 0) return ERROR_QUOTIENTS;
        u32 quotient = (u32)__builtin_ctzll(unary->waiting);
        if (quotient > MAX_QUOTIENT) return ERROR_QUOTIENTS;
        take(unary, (int)quotient + 1);
        if (quotient == MAX_QUOTIENT) {
            if (end - *escapes < 4) return ERROR_CUT;
            memcpy(&quotient, *escapes, 4);
            *escapes += 4;
            if (quotient < MAX_QUOTIENT) return ERROR_RANGE;
        }
        if (quotient > UINT32_MAX >> k) return ERROR_RANGE;
        values[i] = quotient << k | (u32)take(binary, k);
    }
    return 0;
}

/* Scratch: parameters [groups]. Returns the bytes read. */
i64 unpack_list(const u8 *data, i64 size, i64 count, u8 *parameters, u32 *values)
{
    i64 groups = (count + GROUP - 1) / GROUP, parameter_bytes = bytes_of(groups * PARAMETER_BITS);
    i64 remainder_bits = 0, written = 0, status = 0;
    if (size < LIST_HEADER_BYTES + parameter_bytes) return ERROR_CUT;
    u32 quotient_bytes;
    memcpy(&quotient_bytes, data, 4);
    const u8 *at = data + LIST_HEADER_BYTES, *end = data + size;
    BitReader heads = {at, at + parameter_bytes, 0, 0};
    for (i64 g = 0; g < groups; g++) {
        i64 in_group = least(GROUP, count - g * GROUP);
        parameters[g] = (u8)take(&heads, PARAMETER_BITS);
        if (parameters[g] != ALL_ZERO) written += in_group, remainder_bits += in_group * parameters[g];
    }
    if (heads.waiting) return ERROR_PADDING;
    at += parameter_bytes;
    if (quotient_bytes > end - at || quotient_bytes > bytes_of(written * (MAX_QUOTIENT + 1))) return ERROR_QUOTIENTS;
    BitReader unary = {at, at + quotient_bytes, 0, 0};
    at += quotient_bytes;
    if (bytes_of(remainder_bits) > end - at) return ERROR_CUT;
    BitReader binary = {at, at + bytes_of(remainder_bits), 0, 0};
    at += bytes_of(remainder_bits);
    for (i64 g = 0; g < groups && status == 0; g++) {
        i64 in_group = least(GROUP, count - g * GROUP);
        if (parameters[g] == ALL_ZERO) memset(values + g * GROUP, 0, (size_t)in_group * sizeof *values);
        else status = unpack_group(&unary, &binary, parameters[g], values + g * GROUP, in_group, &at, end);
    }
    if (status) return status;
    if (unary.waiting || unary.next != unary.end || unary.count >= 8) return ERROR_QUOTIENTS;
    return binary.waiting ? ERROR_PADDING : at - data;
}
