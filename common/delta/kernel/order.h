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

static inline int find_bit(u64 mask, int rank) /* the position of set bit number `rank` */
{
#if defined(__BMI2__)
    return (int)_tzcnt_u64(_pdep_u64((u64)1 << rank, mask));
#else
    while (rank--) mask &= mask - 1;
    return __builtin_ctzll(mask);
#endif
}

static void count_classes(const u8 *tile, i64 *counts)
{
    for (int class = 0; class < NUM_CLASSES; class++)
        for (int i = 0; i < TILE; i += 64) counts[class] += __builtin_popcountll(equal_bytes(tile + i, (u8)class));
}

/* Needs ascending positions below n. Scratch: ranks [m], classes [m]. */
i64 into_order(const void *words, i64 n, int bits, int shift, int mask, int top, const u32 *positions,
               const u32 *codes, i64 m, u32 *ranks, u8 *classes, u32 *places, u32 *codes_out)
{
    Block block = {words, n, bits, shift, mask, top};
    i64 totals[NUM_CLASSES] = {0}, changed[NUM_CLASSES] = {0}, next[NUM_CLASSES], first[NUM_CLASSES];
    u8 tile[TILE];
    u64 before[2 * WORDS]; /* `before + WORDS - w` masks what lies before an element of word w; its own word is set below */
    for (int w = 0; w < 2 * WORDS; w++) before[w] = w < WORDS ? ~(u64)0 : 0;
    i64 at = 0;
    for (i64 start = 0; start < n; start += TILE) {
        classify(&block, start, tile);
        for (; at < m && positions[at] < (u64)(start + TILE); at++) {
            i64 offset = (i64)positions[at] - start;
            if (offset < 0 || offset >= n - start) return ERROR_ORDER;
            u8 class = classes[at] = tile[offset];
            i64 rank = totals[class];
            before[WORDS] = ((u64)1 << (offset % 64)) - 1;
            for (int w = 0; w < WORDS; w++)
                rank += __builtin_popcountll(equal_bytes(tile + 64 * w, class) & before[w + WORDS - offset / 64]);
            ranks[at] = (u32)rank;
            changed[class]++;
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

/* Position in the tile of element number `rank` of the class, of which there are more than `rank`. */
static i64 find_in_tile(const u8 *tile, u8 class, i64 rank)
{
    u64 masks[WORDS];
    i64 word = 0, before = 0, passed = 0;
    for (int w = 0; w < WORDS; w++) masks[w] = equal_bytes(tile + 64 * w, class);
    for (int w = 0; w < WORDS - 1; w++) {
        passed += __builtin_popcountll(masks[w]);
        word += passed <= rank;
        before = passed <= rank ? passed : before;
    }
    return 64 * word + find_bit(masks[word], (int)(rank - before));
}

static inline u32 head_of(const u32 *places, i64 next, i64 stop) { return next < stop ? places[next] : UINT32_MAX; }

/* Needs ascending places below n. Scratch: counts [tiles][NUM_CLASSES]. */
i64 out_of_order(const void *words, i64 n, int bits, int shift, int mask, int top, const u32 *places, const u32 *codes,
                 i64 m, u16 *counts, u32 *positions, u32 *codes_out)
{
    Block block = {words, n, bits, shift, mask, top};
    i64 totals[NUM_CLASSES] = {0}, next[NUM_CLASSES], stop[NUM_CLASSES], found = 0;
    u32 passed[NUM_CLASSES], heads[NUM_CLASSES]; /* places before the tile; the next one that changes */
    u8 tile[TILE];
    for (i64 start = 0; start < n; start += TILE) {
        i64 in_tile[NUM_CLASSES] = {0};
        classify(&block, start, tile);
        count_classes(tile, in_tile);
        for (int class = 0; class < NUM_CLASSES; class++) {
            totals[class] += in_tile[class];
            counts[start / TILE * NUM_CLASSES + class] = (u16)in_tile[class];
        }
    }
    for (i64 class = 0, place = 0, i = 0; class < NUM_CLASSES; class++) {
        passed[class] = (u32)place, next[class] = i;
        place += totals[class];
        while (i < m && places[i] < place) i++;
        stop[class] = i;
    }
    for (int class = 0; class < NUM_CLASSES; class++) heads[class] = head_of(places, next[class], stop[class]);
    for (i64 start = 0; start < n; start += TILE) {
        u32 code_at[TILE], ends[NUM_CLASSES], present = 0;
        u64 changed[WORDS] = {0};
        for (int class = 0; class < NUM_CLASSES; class++) {
            ends[class] = passed[class] + counts[start / TILE * NUM_CLASSES + class];
            present |= (u32)(heads[class] < ends[class]) << class;
        }
        if (present) classify(&block, start, tile);
        for (; present; present &= present - 1) {
            int class = __builtin_ctz(present);
            do {
                if (heads[class] < passed[class]) return ERROR_ORDER;
                i64 offset = find_in_tile(tile, (u8)class, heads[class] - passed[class]);
                code_at[offset] = codes[next[class]++];
                changed[offset / 64] |= (u64)1 << (offset % 64);
                heads[class] = head_of(places, next[class], stop[class]);
            } while (heads[class] < ends[class]);
        }
        memcpy(passed, ends, sizeof passed);
        for (int w = 0; w < WORDS; w++)
            for (u64 mask = changed[w]; mask; mask &= mask - 1, found++) {
                int offset = 64 * w + __builtin_ctzll(mask);
                positions[found] = (u32)(start + offset);
                codes_out[found] = code_at[offset];
            }
    }
    return found == m ? m : ERROR_ORDER; /* else a place was named twice, or is not below n */
}
