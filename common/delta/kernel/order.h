/* Exponent order: ExponentOrder in formats.py says what it is. */

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

