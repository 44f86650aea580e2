/* The compiled twin of NumpyPrimitives: the same functions with the same results, which are described there.
 *
 * No function allocates, and none writes outside the arrays it is given, whatever the input. Those that decode treat
 * their input as hostile: they return an ERROR_ instead of a count.
 */
#include "basics.h"
#include "lists.h"
#include "changes.h"
#include "order.h"

/* Branches are taken for the second change of 64 elements and those after it: mostly there is one at most. */
#define FIND_CHANGES(BITS)                                                                                             \
    static inline i64 note_##BITS(const u##BITS *old, const u##BITS *new, i64 i, u32 *position, u32 *code)             \
    {                                                                                                                  \
        u##BITS difference = (u##BITS)(new[i] - old[i]), sign = difference >> (BITS - 1);                              \
        *position = (u32)i;                                                                                            \
        *code = (u32)(u##BITS)((u##BITS)(difference << 1) ^ (u##BITS)(0 - sign)) - 1;                                  \
        return 1;                                                                                                      \
    }                                                                                                                  \
    /* positions and codes: n */                                                                                       \
    i64 find_changes_##BITS(const u##BITS *old, const u##BITS *new, i64 n, u32 *positions, u32 *codes)                 \
    {                                                                                                                  \
        i64 found = 0, start = 0;                                                                                      \
        for (; start + 64 <= n; start += 64) {                                                                         \
            u64 mask = differing_##BITS(old + start, new + start);                                                     \
            i64 first = start + __builtin_ctzll(mask | (u64)1 << 63);                                                  \
            note_##BITS(old, new, first, positions + found, codes + found);                                            \
            found += mask != 0;                                                                                        \
            for (mask &= mask - 1; mask; mask &= mask - 1, found++)                                                    \
                note_##BITS(old, new, start + __builtin_ctzll(mask), positions + found, codes + found);                \
        }                                                                                                              \
        for (; start < n; start++)                                                                                     \
            if (old[start] != new[start]) found += note_##BITS(old, new, start, positions + found, codes + found);     \
        return found;                                                                                                  \
    }                                                                                                                  \
    /* values: m. Positions must be below n. */                                                                        \
    i64 new_values_##BITS(const u##BITS *base, i64 n, const u32 *positions, const u32 *codes, i64 m, u##BITS *values)  \
    {                                                                                                                  \
        for (i64 i = 0; i < m; i++) {                                                                                  \
            u##BITS zigzag = (u##BITS)(codes[i] + 1);                                                                  \
            if (positions[i] >= n) return ERROR_POSITION;                                                              \
            values[i] = (u##BITS)(base[positions[i]] + ((zigzag >> 1) ^ (u##BITS)(0 - (zigzag & 1))));                 \
        }                                                                                                              \
        return m;                                                                                                      \
    }
FIND_CHANGES(16)
FIND_CHANGES(32)
