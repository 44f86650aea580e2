/* Lists: Rice codes of unsigned integers. numpy_lists.py gives the layout. */

typedef struct {
    u8 *next, *end;
    u64 waiting;
    u32 count; /* bits in `waiting`, fewer than 8 between two calls */
} BitWriter;

static inline void put(BitWriter *out, u64 value, u32 width) /* width <= 32 */
{
    out->waiting |= value << out->count;
    out->count += width;
    if (out->end - out->next >= 8) {
        memcpy(out->next, &out->waiting, 8);
        out->next += out->count / 8;
        out->waiting >>= out->count & ~7u;
        out->count &= 7;
    } else
        for (; out->count >= 8; out->count -= 8, out->waiting >>= 8)
            if (out->next < out->end) *out->next++ = (u8)out->waiting;
}

static void flush(BitWriter *out)
{
    if (out->count && out->next < out->end) *out->next++ = (u8)out->waiting;
}

typedef struct {
    const u8 *data;
    u64 size, bit; /* `bit` is the next one */
} BitReader;

static inline u64 peek(const BitReader *in) /* 57 bits at least; zeros after the end */
{
    u64 byte = in->bit / 8;
    u64 word = 0;
    if (byte + 8 <= in->size) memcpy(&word, in->data + byte, 8);
    else if (byte < in->size) memcpy(&word, in->data + byte, in->size - byte);
    return word >> (in->bit % 8);
}

static inline u32 take(BitReader *in, int width) /* width <= 32 */
{
    u32 value = (u32)(peek(in) & (((u64)1 << width) - 1));
    in->bit += width;
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
static i64 pack_list(const u32 *values, i64 count, u8 *parameters, u8 *out, i64 room)
{
    i64 groups = (count + GROUP - 1) / GROUP;
    Cost total = {0, 0, 0};
    for (i64 g = 0; g < groups; g++)
        parameters[g] = (u8)choose_parameter(values + g * GROUP, least(GROUP, count - g * GROUP), &total);
    i64 parameter_bytes = bytes_of(groups * PARAMETER_BITS), quotient_bytes = bytes_of(total.quotient_bits);
    i64 remainder_bytes = bytes_of(total.remainder_bits);
    i64 size = HEADER_BYTES + parameter_bytes + quotient_bytes + remainder_bytes + 4 * total.escapes;
    if (size > room) return ERROR_ROOM;
    u32 header = (u32)quotient_bytes;
    memcpy(out, &header, 4);
    u8 *at = out + HEADER_BYTES;
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
            put(&unary, (u64)1 << quotient, quotient + 1);
            put(&binary, values[i] & (((u64)1 << k) - 1), (u32)k);
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
        u64 bits = peek(unary);
        u32 quotient = bits ? (u32)__builtin_ctzll(bits) : MAX_QUOTIENT + 1;
        if (quotient > MAX_QUOTIENT) return ERROR_QUOTIENTS;
        unary->bit += quotient + 1;
        if (quotient == MAX_QUOTIENT) {
            if (end - *escapes < 4) return ERROR_CUT;
            memcpy(&quotient, *escapes, 4);
            *escapes += 4;
            if (quotient < MAX_QUOTIENT) return ERROR_RANGE;
        }
        if (quotient > UINT32_MAX >> k) return ERROR_RANGE;
        values[i] = quotient << k | take(binary, k);
    }
    return 0;
}

/* Scratch: parameters [groups]. Returns the bytes read. */
static i64 unpack_list(const u8 *data, i64 size, i64 count, u8 *parameters, u32 *values)
{
    i64 groups = (count + GROUP - 1) / GROUP, parameter_bytes = bytes_of(groups * PARAMETER_BITS);
    i64 remainder_bits = 0, status = 0;
    if (size < HEADER_BYTES + parameter_bytes) return ERROR_CUT;
    u32 quotient_bytes;
    memcpy(&quotient_bytes, data, 4);
    const u8 *at = data + HEADER_BYTES, *end = data + size;
    BitReader heads = {at, (u64)parameter_bytes, 0};
    for (i64 g = 0; g < groups; g++) {
        i64 in_group = least(GROUP, count - g * GROUP);
        parameters[g] = (u8)take(&heads, PARAMETER_BITS);
        if (parameters[g] != ALL_ZERO) remainder_bits += in_group * parameters[g];
    }
    if (peek(&heads)) return ERROR_PADDING;
    at += parameter_bytes;
    if (quotient_bytes > end - at) return ERROR_CUT;
    BitReader unary = {at, quotient_bytes, 0};
    at += quotient_bytes;
    if (bytes_of(remainder_bits) > end - at) return ERROR_CUT;
    BitReader binary = {at, (u64)bytes_of(remainder_bits), 0};
    at += bytes_of(remainder_bits);
    for (i64 g = 0; g < groups && status == 0; g++) {
        i64 in_group = least(GROUP, count - g * GROUP);
        if (parameters[g] == ALL_ZERO) memset(values + g * GROUP, 0, (size_t)in_group * sizeof *values);
        else status = unpack_group(&unary, &binary, parameters[g], values + g * GROUP, in_group, &at, end);
    }
    if (status) return status;
    if (peek(&unary) || bytes_of((i64)unary.bit) != quotient_bytes) return ERROR_QUOTIENTS;
    return peek(&binary) ? ERROR_PADDING : at - data;
}
