/* Types, errors, the numbers of the code, and masks of 64 comparisons. */
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

enum { GROUP = 128, PARAMETER_BITS = 5, ALL_ZERO = 31, MAX_PARAMETER = 30, MAX_QUOTIENT = 20 };
enum { SEARCH_BELOW = 1, SEARCH_ABOVE = 3, HEADER_BYTES = 4, NUM_CLASSES = 16, TILE = 512, WORDS = TILE / 64, NUM_LEVELS = 2 };
enum {
    ERROR_CUT = -1,
    ERROR_QUOTIENTS = -2,
    ERROR_PADDING = -3,
    ERROR_RANGE = -4,
    ERROR_ROOM = -5,
    ERROR_ORDER = -6,
    ERROR_POSITION = -7,
    ERROR_COUNT = -8,
    ERROR_REST = -9
};

static inline i64 least(i64 a, i64 b) { return a < b ? a : b; }
static inline i64 bytes_of(i64 bits) { return (bits + 7) / 8; }

static inline u64 gather_bits(const u8 *flags) /* 64 bytes of 0 or 1; bit i for byte i */
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
#elif defined(__SSE2__)
    u64 same = 0;
    for (int i = 0; i < 64; i += 16) {
        const __m128i *left = (const __m128i *)(a + i), *right = (const __m128i *)(b + i);
        __m128i low = _mm_cmpeq_epi16(_mm_loadu_si128(left), _mm_loadu_si128(right));
        __m128i high = _mm_cmpeq_epi16(_mm_loadu_si128(left + 1), _mm_loadu_si128(right + 1));
        same |= (u64)_mm_movemask_epi8(_mm_packs_epi16(low, high)) << i;
    }
    return ~same;
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
