/* The changes of a block as bytes: numpy_changes.py gives the layout. */

static int is_complemented(i64 count, i64 universe) { return 2 * count > universe; }

/* Returns the number of gaps, which is at most `count`. Loops over complements take no branches: it is the common case
 * that they could not be foretold. */
static i64 gaps_of_set(const u32 *members, i64 count, i64 universe, u32 *gaps)
{
    if (!is_complemented(count, universe)) {
        u32 next = 0;
        for (i64 i = 0; i < count; i++) gaps[i] = members[i] - next, next = members[i] + 1;
        return count;
    }
    u32 run = 0; /* members since the last element that is none */
    i64 written = 0, next = 0;
    for (i64 i = 0; i < count; next++) {
        u32 is_member = members[i] == next;
        gaps[written] = run;
        written += !is_member;
        run = (run + 1) & (0 - is_member);
        i += is_member;
    }
    for (; next < universe; next++, run = 0) gaps[written++] = run;
    return written;
}

typedef struct {
    u8 *next, *end;
    u8 *parameters; /* scratch of pack_list */
    u32 *gaps;      /* scratch of write_set */
    i64 status;     /* 0, or the first error */
} Writer;

static void write_list(Writer *out, const u32 *values, i64 count)
{
    if (count == 0 || out->status) return;
    i64 size = pack_list(values, count, out->parameters, out->next, out->end - out->next);
    if (size < 0) out->status = size;
    else out->next += size;
}

static void write_set(Writer *out, const u32 *members, i64 count, i64 universe)
{
    write_list(out, out->gaps, gaps_of_set(members, count, universe, out->gaps));
}

static u8 *reserve(Writer *out, i64 size)
{
    if (!out->status && out->end - out->next < size) out->status = ERROR_ROOM;
    if (out->status) return 0;
    out->next += size;
    return out->next - size;
}

static void write_signs(Writer *out, const u32 *codes, i64 count)
{
    u8 *signs = reserve(out, bytes_of(count));
    if (!signs) return;
    for (i64 i = 0; i + 8 <= count; i += 8) {
        u32 byte = 0;
        for (int j = 0; j < 8; j++) byte |= (codes[i + j] & 1) << j;
        signs[i / 8] = (u8)byte;
    }
    if (count % 8) signs[count / 8] = 0;
    for (i64 i = count & ~7; i < count; i++) signs[i / 8] |= (u8)((codes[i] & 1) << (i % 8));
}

/* Moves the magnitudes above zero to the front, less 1. Returns the number of gaps: between those above zero if `wanted`
 * is 1, else between the others. */
static i64 split(u32 *magnitudes, i64 count, u32 wanted, u32 *gaps)
{
    i64 larger = 0, written = 0;
    u32 gap = 0;
    for (i64 i = 0; i < count; i++) {
        u32 magnitude = magnitudes[i], is_larger = magnitude != 0, is_wanted = is_larger == wanted;
        magnitudes[larger] = magnitude - 1;
        larger += is_larger;
        gaps[written] = gap;
        written += is_wanted;
        gap = (gap + 1) & (is_wanted - 1);
    }
    return written;
}

/* places: ascending, below universe. Scratch: 2 * count, and a byte for each GROUP. Returns the bytes written. */
i64 pack_changes(const u32 *places, const u32 *codes, i64 count, i64 universe, u32 *scratch, u8 *parameters, u8 *data,
                 i64 room)
{
    Writer out = {data, data + room, parameters, scratch, 0};
    u32 *magnitudes = scratch + count;
    write_set(&out, places, count, universe);
    write_signs(&out, codes, count);
    for (i64 i = 0; i < count; i++) magnitudes[i] = codes[i] >> 1;
    for (int level = 0; level < NUM_LEVELS; level++) {
        u32 larger = 0;
        for (i64 i = 0; i < count; i++) larger += magnitudes[i] != 0;
        u8 *at = reserve(&out, sizeof larger);
        if (at) memcpy(at, &larger, sizeof larger);
        write_list(&out, out.gaps, split(magnitudes, count, !is_complemented(larger, count), out.gaps));
        count = larger;
    }
    write_list(&out, magnitudes, count);
    return out.status ? out.status : out.next - data;
}

typedef struct {
    const u8 *next, *end;
    u8 *parameters;
    u32 *gaps;
    i64 status;
} Reader;

static void read_list(Reader *in, i64 count, u32 *values)
{
    if (count == 0 || in->status) return;
    i64 used = unpack_list(in->next, in->end - in->next, count, in->parameters, values);
    if (used < 0) in->status = used;
    else in->next += used;
}

static void read_set(Reader *in, i64 count, i64 universe, u32 *members)
{
    int complemented = is_complemented(count, universe);
    i64 coded = complemented ? universe - count : count, end = 0;
    u32 *listed = complemented ? in->gaps : members;
    read_list(in, coded, in->gaps);
    if (in->status) return;
    for (i64 i = 0; i < coded; i++) {
        i64 position = end + in->gaps[i];
        listed[i] = (u32)position;
        end = position + 1;
    }
    if (end > universe) in->status = ERROR_POSITION; /* the ends only grow: the last one tells */
    if (in->status || !complemented) return;
    for (i64 found = 0, i = 0, next = 0; found < count; next++) {
        int is_listed = i < coded && listed[i] == next;
        members[found] = (u32)next;
        found += !is_listed;
        i += is_listed;
    }
}

static const u8 *read_bytes(Reader *in, i64 size)
{
    if (!in->status && in->end - in->next < size) in->status = ERROR_CUT;
    if (in->status) return 0;
    in->next += size;
    return in->next - size;
}

static i64 read_count(Reader *in, i64 at_most)
{
    u32 count = 0;
    const u8 *at = read_bytes(in, sizeof count);
    if (at) memcpy(&count, at, sizeof count);
    if (count > at_most) in->status = ERROR_COUNT;
    return in->status ? 0 : count;
}

/* Replaces the values of the members by what lies in `larger`, plus one, and all others by zero. In place: members are
 * ascending, so that the value of number i never lies behind its place. */
static void spread(u32 *values, i64 count, const u32 *members, i64 num_members)
{
    i64 i = count - 1;
    for (i64 next = num_members - 1; next >= 0; i--) {
        u32 is_member = members[next] == i;
        values[i] = (values[next] + 1) & (0 - is_member);
        next -= is_member;
    }
    memset(values, 0, (size_t)(i + 1) * sizeof *values);
}

/* Scratch: 3 * count, and a byte for each GROUP. Returns 0. */
i64 unpack_changes(const u8 *data, i64 size, i64 universe, i64 count, int bits, u32 *scratch, u8 *parameters,
                   u32 *places, u32 *codes)
{
    Reader in = {data, data + size, parameters, scratch, 0};
    u32 *members[NUM_LEVELS] = {scratch + count, scratch + 2 * count};
    i64 sizes[NUM_LEVELS + 1] = {count};
    u32 largest = (u32)(((u64)1 << bits) - 2), too_large = 0; /* the largest code */
    read_set(&in, count, universe, places);
    const u8 *signs = read_bytes(&in, bytes_of(count));
    if (signs && count % 8 && signs[count / 8] >> (count % 8)) return ERROR_PADDING;
    for (int level = 0; level < NUM_LEVELS; level++) {
        sizes[level + 1] = read_count(&in, sizes[level]);
        read_set(&in, sizes[level + 1], sizes[level], members[level]);
    }
    read_list(&in, sizes[NUM_LEVELS], codes);
    if (in.status) return in.status;
    if (in.next != in.end) return ERROR_REST;
    for (i64 i = 0; i < sizes[NUM_LEVELS]; i++) too_large |= codes[i] > largest / 2 - NUM_LEVELS;
    for (int level = NUM_LEVELS - 1; level >= 0; level--) spread(codes, sizes[level], members[level], sizes[level + 1]);
    for (i64 i = 0; i < count; i++) {
        codes[i] = codes[i] << 1 | (signs[i / 8] >> (i % 8) & 1);
        too_large |= codes[i] > largest;
    }
    return too_large ? ERROR_RANGE : 0;
}
