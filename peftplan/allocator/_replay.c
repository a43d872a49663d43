/* Replays a program (peftplan/allocator/program.py) through torch's CUDA caching allocator, with default options or in segments that grow
   (`expandable_segments:True`).

   The same decisions as `interpret` there and `Allocator` in peftplan/allocator, which name torch's source; here they are
   compiled, because a step of a large model has 140,000 events. Only the limited API of Python 3.10 is used: one build serves all.
*/

#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define SELDOM static __attribute__((noinline, cold))
#define RARE(x) __builtin_expect(!!(x), 0)

#define MIB ((int64_t)1 << 20)
#define MIN_BLOCK ((int64_t)512)
#define SMALL_SIZE MIB
#define SMALL_BUFFER (2 * MIB)
#define MIN_LARGE (10 * MIB)
#define LARGE_SEGMENT (20 * MIB)
#define ROUND_LARGE (2 * MIB)
#define TOP ((int64_t)1 << 60)  /* where downward addresses begin */
#define LARGEST ((int64_t)1 << 56)  /* of one allocation, and of all segments ever taken */
#define WIDTH 5
#define PER_DOUBLING 8  /* bins of each doubling of a block's size */
#define BINS 448  /* of a pool: from 512 bytes to more than LARGEST */
#define STREAMS 4  /* each has a pool of small blocks and one of large ones: a free block serves its own stream only */
#define POOLS (2 * STREAMS)
#define RANGE (((int64_t)1 << 46) / LARGE_SEGMENT * LARGE_SEGMENT)  /* addresses of a segment that grows; a second one in a pool is refused */

enum { PHASE, TAKE, HOLD, LET_GO, MAKE, ADD, FREE, OUTPUTS, END_OUTPUTS, REPEAT, LAYER, OWN, END_OWN, HAND, EMPTY, END, LEAVE, EVENTS };

enum { RUNS, DEVICE_FULL, HOST_FULL, TOO_LARGE, MALFORMED };

#define NONE (-1)  /* no storage, no phase */
#define UNMAPPED_OF (POOLS * BINS)  /* the first of the heads of unmapped ranges */
#define NO_BLOCK (UNMAPPED_OF + POOLS)  /* of zero bytes, before the first of a segment, behind the last; it is always live */

enum { LIVE, CACHED, UNMAPPED };  /* what a block is; unmapped: addresses of a segment that grows without memory behind them */

/* The first blocks are the heads of bins, of each stream those of the pool of small blocks and then those of large ones: each begins and ends the
   ring of the cached blocks in its bin, sorted by size and then address. Then one for each pool heads the ring of its unmapped ranges, by address.
   Behind them comes NO_BLOCK, then those of the device. */
typedef struct {
    int64_t address, size;
    int32_t before, after;  /* in the segment */
    int32_t smaller, larger;  /* in the ring */
    int16_t bin;
    char state, pool;
} Block;

typedef struct {
    int64_t size, unsplit;  /* unsplit: the most that a block may have beyond its request and still be handed out whole */
    int bin;
    char large;
} Request;

typedef struct {
    int32_t *at;
    size_t length, room;
    char known;  /* made in this step, even if all of it is gone */
} Blocks;

typedef struct {
    int64_t size;
    int32_t storage;
} Spare;

typedef struct {
    int failed;
    /* the allocator */
    Block *blocks;
    size_t length, room;
    int32_t unused;  /* the first of a chain of blocks that were merged away, or NO_BLOCK */
    uint64_t filled[POOLS * BINS / 64];  /* bins that may hold a block */
    int64_t allocated, reserved, peak, most_reserved, above, below, capacity;
    int downwards, grows, phase, had_events, stream;
    int64_t *peaks;
    /* what the program holds */
    const int64_t *sizes;
    Request *requests;  /* each size as the allocator rounds it */
    size_t num_sizes, num_storages, num_handles, num_phases;
    int32_t *handles, *places, *handed;
    size_t num_handed;
    Blocks *live, *own, outputs;
    Spare *spare;
    size_t num_spare, room_spare;
} Run;

/* -- memory of this machine ---------------------------------------------------------------------------------------------------- */

SELDOM int grow(Run *run, void **at, size_t *room, size_t itemsize)
{
    size_t wanted = *room ? 2 * *room : 16;
    void *moved = realloc(*at, wanted * itemsize);
    if (moved == NULL) {
        run->failed = HOST_FULL;
        return 0;
    }
    *at = moved;
    *room = wanted;
    return 1;
}

INLINE void push(Run *run, Blocks *blocks, int32_t block)
{
    if (blocks->length < blocks->room || grow(run, (void **)&blocks->at, &blocks->room, sizeof(int32_t)))
        blocks->at[blocks->length++] = block;
}

/* -- pools of cached blocks ------------------------------------------------------------------------------------------------------- */

INLINE int bin_of(int64_t size, int pool)
{
    uint64_t units = (uint64_t)size / (uint64_t)MIN_BLOCK;
    int doublings = 63 - __builtin_clzll(units);
    return pool * BINS + PER_DOUBLING * doublings + (int)((units * PER_DOUBLING >> doublings) % PER_DOUBLING);
}

/* This block, or if it is the head of a bin the smallest in the bins above it and below `end`. */
INLINE int32_t from_bin(Run *run, int32_t number, int bin, int end)
{
    while (number == bin) { /* none */
        int word = ++bin / 64;
        if (bin == end)
            return NO_BLOCK;
        uint64_t filled = run->filled[word] & ~(uint64_t)0 << bin % 64;
        while (filled == 0) {
            if (++word == end / 64)
                return NO_BLOCK;
            filled = run->filled[word];
        }
        bin = 64 * word + __builtin_ctzll(filled);
        number = run->blocks[bin].larger;
        if (number == bin)
            run->filled[word] &= ~((uint64_t)1 << bin % 64);
    }
    return number;
}

static int64_t size_grown(const Block *blocks, int32_t number)
{
    const Block *after = &blocks[blocks[number].after];
    return blocks[number].size + (after->state == UNMAPPED ? after->size : 0);
}

/* From the best fit on, the block that with the unmapped range behind it is smaller than its successor. */
static int32_t least_grown(Run *run, int32_t number, int end)
{
    const Block *blocks = run->blocks;
    while (blocks[blocks[number].after].state == UNMAPPED) {
        int32_t larger = from_bin(run, blocks[number].larger, blocks[number].bin, end);
        if (larger == NO_BLOCK || size_grown(blocks, larger) >= size_grown(blocks, number))
            break;
        number = larger;
    }
    return number;
}

/* The smallest cached block of at least this size, of those the one at the lowest address. */
INLINE int32_t best_fit(Run *run, const Request *request)
{
    const Block *blocks = run->blocks;
    const int first = 2 * BINS * run->stream;
    int bin = first + request->bin, end = first + (request->large ? 2 * BINS : BINS);
    int32_t number = blocks[bin].larger;
    while (blocks[number].size < request->size)
        number = blocks[number].larger;
    number = from_bin(run, number, bin, end);
    return RARE(run->grows) && number != NO_BLOCK ? least_grown(run, number, end) : number;
}

INLINE int comes_before(const Block *one, const Block *other)
{
    return one->size < other->size || (one->size == other->size && one->address < other->address);
}

static __attribute__((noinline)) int32_t next_larger(const Block *blocks, int bin, const Block *block)
{
    int32_t larger = blocks[bin].larger, smaller = blocks[bin].smaller;
    if (block->address - blocks[larger].address > blocks[smaller].address - block->address) { /* likely nearer to the end */
        while (comes_before(block, &blocks[smaller]))
            smaller = blocks[smaller].smaller;
        return blocks[smaller].larger;
    }
    while (comes_before(&blocks[larger], block))
        larger = blocks[larger].larger;
    return larger;
}

INLINE void put_in(Run *run, int32_t number)
{
    Block *blocks = run->blocks, *block = &blocks[number];
    int bin = block->bin = (int16_t)bin_of(block->size, block->pool);
    int32_t larger = blocks[bin].larger;
    if (RARE(comes_before(&blocks[larger], block)))
        larger = next_larger(blocks, bin, block);
    block->larger = larger;
    block->smaller = blocks[larger].smaller;
    blocks[block->smaller].larger = number;
    blocks[larger].smaller = number;
    run->filled[bin / 64] |= (uint64_t)1 << bin % 64;
}

INLINE void take_out(Run *run, int32_t number)
{
    const Block *block = &run->blocks[number];
    run->blocks[block->smaller].larger = block->larger;
    run->blocks[block->larger].smaller = block->smaller;
}

/* -- blocks -------------------------------------------------------------------------------------------------------------------- */

INLINE int32_t new_block(Run *run, int64_t address, int64_t size, int pool)
{
    int32_t number = run->unused;
    if (number != NO_BLOCK) {
        run->unused = run->blocks[number].after;
    } else {
        if (run->length >= INT32_MAX) {
            run->failed = TOO_LARGE;
            return NO_BLOCK;
        }
        if (run->length == run->room && !grow(run, (void **)&run->blocks, &run->room, sizeof(Block)))
            return NO_BLOCK;
        number = (int32_t)run->length++;
    }
    run->blocks[number] = (Block){address, size, NO_BLOCK, NO_BLOCK, 0, 0, 0, 0, (char)pool};
    return number;
}

INLINE void drop_block(Run *run, int32_t number)
{
    run->blocks[number].after = run->unused;
    run->unused = number;
}

INLINE void link_blocks(Run *run, int32_t number, int32_t before, int32_t after)
{
    run->blocks[number].before = before;
    run->blocks[number].after = after;
    run->blocks[before].after = number;
    run->blocks[after].before = number;
}

/* -- the device ---------------------------------------------------------------------------------------------------------------- */

static int64_t whole(int64_t size, int64_t unit)
{
    return (size + unit - 1) / unit * unit;
}

static void reserve(Run *run, int64_t size)
{
    run->reserved += size;
    if (run->reserved > run->most_reserved)
        run->most_reserved = run->reserved;
}

static int has(const Run *run, int64_t size)
{
    return run->capacity < 0 || run->reserved + size <= run->capacity;
}

/* Take a neighbour in the same state into a block that is in no ring. */
static void merge(Run *run, int32_t number, int32_t neighbour)
{
    Block *block = &run->blocks[number];
    const Block *other = &run->blocks[neighbour];
    if (other->state != block->state)
        return;
    take_out(run, neighbour);
    if (neighbour == block->before) {
        block->address = other->address;
        link_blocks(run, number, other->before, block->after);
    } else {
        link_blocks(run, number, block->before, other->after);
    }
    block->size += other->size;
    drop_block(run, neighbour);
}

/* -- segments that grow: peftplan/allocator/expandable.py ------------------------------------------------------------------------ */

static int64_t page_of(int pool)
{
    return pool % 2 ? LARGE_SEGMENT : SMALL_BUFFER;
}

static void put_in_unmapped(Run *run, int32_t number)
{
    Block *blocks = run->blocks, *block = &blocks[number];
    const int32_t head = UNMAPPED_OF + block->pool;
    int32_t larger = blocks[head].larger;
    while (larger != head && blocks[larger].address < block->address)
        larger = blocks[larger].larger;
    block->larger = larger;
    block->smaller = blocks[larger].smaller;
    blocks[block->smaller].larger = number;
    blocks[larger].smaller = number;
}

/* Put a new block between two others. */
static int32_t splice(Run *run, int64_t address, int64_t size, int32_t before, int32_t after, int state, int pool)
{
    int32_t number = new_block(run, address, size, pool);
    if (number == NO_BLOCK)
        return number;
    link_blocks(run, number, before, after);
    run->blocks[number].state = (char)state;
    if (state == UNMAPPED)
        put_in_unmapped(run, number);
    else
        put_in(run, number);
    return number;
}

/* Give back the whole pages of a cached block; the ends that share a page with a neighbour stay. */
static void unmap(Run *run, int32_t number)
{
    const Block block = run->blocks[number];
    const int64_t page = page_of(block.pool), end = block.address + block.size;
    const int64_t first = whole(block.address, page), last = end / page * page;
    if (first >= last)
        return;
    take_out(run, number);
    if (first > block.address)
        splice(run, block.address, first - block.address, block.before, number, CACHED, block.pool);
    if (end > last)
        splice(run, last, end - last, number, block.after, CACHED, block.pool);
    Block *unmapped = &run->blocks[number];
    unmapped->address = first;
    unmapped->size = last - first;
    unmapped->state = UNMAPPED;
    merge(run, number, unmapped->before);
    merge(run, number, unmapped->after);
    run->reserved -= last - first;
    if (unmapped->before == NO_BLOCK && unmapped->after == NO_BLOCK)
        drop_block(run, number); /* nothing of the segment is mapped: its addresses go too */
    else
        put_in_unmapped(run, number);
}

/* Back the first pages of an unmapped range; all of them or, where the device cannot give so many, none. */
static int map(Run *run, int32_t number, int64_t size)
{
    const Block range = run->blocks[number];
    const int64_t length = whole(size, page_of(range.pool));
    if (!has(run, length))
        return 0;
    take_out(run, number);
    run->blocks[number].state = CACHED;
    if (length < range.size) {
        run->blocks[number].size = length;
        if (splice(run, range.address + length, range.size - length, number, range.after, UNMAPPED, range.pool) == NO_BLOCK)
            return 0;
    }
    merge(run, number, run->blocks[number].before);
    merge(run, number, run->blocks[number].after);
    put_in(run, number);
    reserve(run, length);
    return 1;
}

static int has_room(const Run *run, int32_t number, int64_t size)
{
    for (; size > 0 && run->blocks[number].state != LIVE; number = run->blocks[number].after)
        size -= run->blocks[number].size;
    return size <= 0;
}

/* The lowest unmapped range of a pool, with the cached block right before it, that has room for so many bytes; else a new segment. */
static int32_t room_for(Run *run, int64_t size, int pool)
{
    const Block *blocks = run->blocks;
    const int32_t head = UNMAPPED_OF + pool;
    for (int32_t number = blocks[head].larger; number != head; number = blocks[number].larger) {
        int32_t start = blocks[blocks[number].before].state == CACHED ? blocks[number].before : number;
        if (has_room(run, start, size))
            return start;
    }
    if (blocks[head].larger != head || size > RANGE) {
        run->failed = TOO_LARGE;
        return NO_BLOCK;
    }
    run->above += RANGE;
    return splice(run, run->above - RANGE, RANGE, NO_BLOCK, NO_BLOCK, UNMAPPED, pool);
}

/* A cached block of at least this size that is in no ring, with what is missing of it mapped; pages mapped before a failure stay. */
static int32_t grow_segment(Run *run, int64_t size, int pool)
{
    int32_t number = room_for(run, size, pool);
    if (number == NO_BLOCK)
        return NO_BLOCK;
    const Block *block = &run->blocks[number];
    if (block->state == UNMAPPED && !map(run, number, size < block->size ? size : block->size))
        return NO_BLOCK;
    while ((block = &run->blocks[number])->size < size) {
        const int32_t after = block->after;
        const int64_t missing = size - block->size, range = run->blocks[after].size;
        if (!map(run, after, missing < range ? missing : range))
            return NO_BLOCK;
        number = after;
    }
    take_out(run, number);
    return number;
}

SELDOM void release_cached(Run *run)
{
    for (int bin = 0; bin < POOLS * BINS; bin++) {
        for (int32_t number = run->blocks[bin].larger, larger; number != bin; number = larger) {
            const Block *block = &run->blocks[number];
            larger = block->larger;
            if (run->grows) {
                unmap(run, number);
            } else if (block->before == NO_BLOCK && block->after == NO_BLOCK) {
                run->reserved -= block->size;
                take_out(run, number);
                drop_block(run, number);
            }
        }
    }
}

static int32_t new_segment(Run *run, int64_t size, int large)
{
    int64_t wanted = !large ? SMALL_BUFFER : size < MIN_LARGE ? LARGE_SEGMENT : whole(size, ROUND_LARGE);
    int64_t address;
    if (!has(run, wanted))
        return NO_BLOCK;
    reserve(run, wanted);
    if (run->downwards && wanted > LARGE_SEGMENT) {
        run->below -= wanted;
        address = run->below;
    } else {
        address = run->above;
        run->above += wanted;
    }
    if (run->above > LARGEST || TOP - run->below > LARGEST) {
        run->failed = TOO_LARGE;
        return NO_BLOCK;
    }
    return new_block(run, address, wanted, 2 * run->stream + large);
}

/* What no cached block serves: memory of the device, if need be after all that is cached went back to it. */
SELDOM int32_t miss(Run *run, int64_t size, int large)
{
    for (int again = 0; again < 2 && !run->failed; again++) {
        int32_t number = run->grows ? grow_segment(run, size, 2 * run->stream + large) : new_segment(run, size, large);
        if (number != NO_BLOCK)
            return number;
        if (!again && !run->failed)
            release_cached(run);
    }
    if (!run->failed)
        run->failed = DEVICE_FULL;
    return NO_BLOCK;
}

/* -- the allocator's two calls -------------------------------------------------------------------------------------------------- */

static inline int32_t allocate(Run *run, int64_t index)
{
    const Request *request = &run->requests[index];
    const int64_t size = request->size;
    const int large = request->large;
    run->had_events = 1;
    if (RARE(size == 0))
        return NO_BLOCK;
    if (RARE(size > LARGEST)) {
        run->failed = TOO_LARGE;
        return NO_BLOCK;
    }
    int32_t number = best_fit(run, request);
    if (number != NO_BLOCK)
        take_out(run, number);
    else if ((number = miss(run, size, large)) == NO_BLOCK)
        return NO_BLOCK;
    int64_t rest = run->blocks[number].size - size;
    if (rest > request->unsplit) {
        int32_t front = new_block(run, run->blocks[number].address, size, 2 * run->stream + large);
        if (front == NO_BLOCK)
            return NO_BLOCK;
        Block *behind = &run->blocks[number];
        link_blocks(run, front, behind->before, number);
        behind->address += size;
        behind->size = rest;
        behind->state = CACHED;
        put_in(run, number);
        number = front;
    }
    run->blocks[number].state = LIVE;
    run->allocated += run->blocks[number].size;
    if (run->allocated > run->peak)
        run->peak = run->allocated;
    return number;
}

static inline void release(Run *run, int32_t number)
{
    run->had_events = 1;
    if (RARE(number == NO_BLOCK))
        return;
    Block *blocks = run->blocks, *block = &blocks[number];
    int32_t before = block->before, after = block->after;
    run->allocated -= block->size;
    block->state = CACHED;
    if (blocks[before].state == CACHED) {
        take_out(run, before);
        block->address = blocks[before].address;
        block->size += blocks[before].size;
        before = blocks[before].before;
        drop_block(run, block->before);
    }
    if (blocks[after].state == CACHED) {
        take_out(run, after);
        block->size += blocks[after].size;
        after = blocks[after].after;
        drop_block(run, block->after);
    }
    link_blocks(run, number, before, after);
    put_in(run, number);
}

/* -- the program ---------------------------------------------------------------------------------------------------------------- */

static void close_phase(Run *run)
{
    if (run->phase != NONE && run->had_events && run->peak > run->peaks[run->phase])
        run->peaks[run->phase] = run->peak;
}

static void begin_phase(Run *run, int phase)
{
    if (phase == run->phase)
        return;
    close_phase(run);
    run->phase = phase;
    run->had_events = 0;
    run->peak = run->allocated;
}

static void release_all(Run *run, Blocks *blocks)
{
    for (size_t at = 0; at < blocks->length; at++)
        release(run, blocks->at[at]);
    blocks->length = 0;
}

INLINE void allocate_into(Run *run, Blocks *blocks, int64_t size, int64_t count)
{
    for (; count > 0 && !run->failed; count--)
        push(run, blocks, allocate(run, size));
}

static void move_blocks(Run *run, Blocks *from, Blocks *to)
{
    for (size_t at = 0; at < from->length; at++)
        push(run, to, from->at[at]);
    from->length = 0;
}

static void make(Run *run, int64_t storage, int64_t size, int64_t count)
{
    Blocks *blocks = &run->live[storage];
    if (blocks->known) {
        size_t at = 0;
        while (at < run->num_spare && (run->spare[at].storage != storage || run->spare[at].size != run->sizes[size]))
            at++;
        if (at == run->num_spare) {
            if (run->num_spare == run->room_spare && !grow(run, (void **)&run->spare, &run->room_spare, sizeof(Spare)))
                return;
            run->spare[run->num_spare++] = (Spare){run->sizes[size], (int32_t)storage};
        }
    }
    blocks->known = 1;
    allocate_into(run, blocks, size, count);
}

static Blocks *standing_for(Run *run, int64_t storage, int64_t size)
{
    if (run->live[storage].length)
        return &run->live[storage];
    for (size_t at = 0; at < run->num_spare; at++) {
        Blocks *spare = &run->live[run->spare[at].storage];
        if (run->spare[at].size == run->sizes[size] && spare->length)
            return spare;
    }
    return NULL;
}

static void free_some(Run *run, int64_t storage, int64_t size, int64_t count)
{
    for (; count > 0; count--) {
        Blocks *blocks = standing_for(run, storage, size);
        if (blocks == NULL)
            return;
        release(run, blocks->at[--blocks->length]);
    }
}

static void hand(Run *run, int64_t storage, int64_t new, int64_t size, int64_t count)
{
    int32_t place = run->places[storage] == NONE ? (int32_t)new : run->places[storage];
    if (run->live[storage].length)
        place = (int32_t)storage;
    else if (!run->live[place].length)
        place = (int32_t)new;
    if (run->num_handed == run->num_storages) {
        run->failed = MALFORMED;
        return;
    }
    run->places[new] = place;
    run->handed[run->num_handed++] = (int32_t)new;
    free_some(run, place, size, count);
}

static void end_layer(Run *run)
{
    for (size_t at = 0; at < run->num_handed; at++) {
        int32_t new = run->handed[at];
        Blocks *place = &run->live[run->places[new]];
        place->known = 1;
        move_blocks(run, &run->own[new], place);
    }
    run->num_handed = 0;
}

static void end_step(Run *run)
{
    for (size_t storage = 0; storage < run->num_storages; storage++) {
        release_all(run, &run->live[storage]);
        run->live[storage].known = 0;
    }
    run->num_spare = 0;
}

static size_t run_events(Run *run, const int64_t *events, size_t start, size_t stop);

static size_t repeat(Run *run, const int64_t *events, size_t kinds, size_t at, size_t stop)
{
    size_t behind = at;
    int64_t most = 0;
    for (size_t kind = 0; kind < kinds; kind++) {
        if (behind >= stop || events[behind] != LAYER) {
            run->failed = MALFORMED;
            return stop;
        }
        if (events[behind + 1] > most)
            most = events[behind + 1];
        behind += WIDTH + WIDTH * (size_t)events[behind + 2];
    }
    if (behind > stop) {
        run->failed = MALFORMED;
        return stop;
    }
    for (int64_t turn = 0; turn < most && !run->failed; turn++) {
        size_t layer = at;
        for (size_t kind = 0; kind < kinds && !run->failed; kind++) {
            size_t first = layer + WIDTH, end = first + WIDTH * (size_t)events[layer + 2];
            if (turn < events[layer + 1]) {
                run_events(run, events, first, end);
                end_layer(run);
            }
            layer = end;
        }
    }
    return behind;
}

/* Whether the operands of an event are places in the tables. */
static int fits(const Run *run, const int64_t *event)
{
    const int64_t what = event[0], a = event[1], b = event[2], c = event[3];
    const int64_t storages = (int64_t)run->num_storages, sizes = (int64_t)run->num_sizes;
    const int64_t handles = (int64_t)run->num_handles, phases = (int64_t)run->num_phases;
    switch (what) {
    case PHASE:
        return a >= 0 && a < phases;
    case TAKE:
        return a >= 0 && a < sizes;
    case HOLD:
        return a >= 0 && a < handles && b >= 0 && b < sizes;
    case LET_GO:
        return a >= 0 && a < handles;
    case MAKE:
        return a >= 0 && a < storages && b >= 0 && b < sizes && event[4] >= 0 && event[4] < STREAMS;
    case ADD:
    case FREE:
    case OWN:
        return a >= 0 && a < storages && b >= 0 && b < sizes;
    case OUTPUTS:
    case LEAVE:
    case END_OWN:
        return a >= 0 && a < storages;
    case HAND:
        return a >= 0 && a < storages && b >= 0 && b < storages && c >= 0 && c < sizes;
    case REPEAT:
        return a > 0;
    case LAYER:
        return a >= 0 && b >= 0 && b <= INT32_MAX;
    default:
        return what == END_OUTPUTS || what == EMPTY || what == END;
    }
}

static size_t run_events(Run *run, const int64_t *events, size_t start, size_t stop)
{
    size_t at = start;
    while (at < stop && !run->failed) {
        int64_t what = events[at], a = events[at + 1], b = events[at + 2], c = events[at + 3], d = events[at + 4];
        at += WIDTH;
        switch (what) {
        case OWN:
            run->own[a].length = 0;
            allocate_into(run, &run->own[a], b, c);
            break;
        case END_OWN:
            release_all(run, &run->own[a]);
            break;
        case MAKE:
            run->stream = (int)d;
            make(run, a, b, c);
            run->stream = 0;
            break;
        case FREE:
            free_some(run, a, b, c);
            break;
        case HAND:
            hand(run, a, b, c, d);
            break;
        case HOLD:
            run->handles[a] = allocate(run, b);
            break;
        case LET_GO:
            release(run, run->handles[a]);
            run->handles[a] = NO_BLOCK;
            break;
        case TAKE:
            for (; b > 0 && !run->failed; b--)
                allocate(run, a);
            break;
        case ADD:
            run->live[a].known = 1;
            allocate_into(run, &run->live[a], b, 1);
            break;
        case REPEAT:
            at = repeat(run, events, (size_t)a, at, stop);
            break;
        case OUTPUTS:
            move_blocks(run, &run->live[a], &run->outputs);
            run->live[a].known = 0;
            break;
        case END_OUTPUTS:
            release_all(run, &run->outputs);
            break;
        case LEAVE:
            run->live[a].length = 0;
            run->live[a].known = 0;
            break;
        case PHASE:
            begin_phase(run, (int)a);
            break;
        case EMPTY:
            run->had_events = 1;
            release_cached(run);
            break;
        case END:
            end_step(run);
            break;
        default:
            run->failed = MALFORMED;
        }
    }
    return at;
}

/* -- Python --------------------------------------------------------------------------------------------------------------------- */

static void *filled(size_t length, size_t itemsize, int byte)
{
    void *at = malloc(length * itemsize + 1);
    if (at != NULL)
        memset(at, byte, length * itemsize);
    return at;
}

static int prepare(Run *run)
{
    const size_t n = run->num_storages;
    run->handles = filled(run->num_handles, sizeof(int32_t), 0);
    run->places = filled(n, sizeof(int32_t), 0xFF); /* all NONE */
    run->handed = filled(n, sizeof(int32_t), 0);
    run->requests = filled(run->num_sizes, sizeof(Request), 0);
    run->peaks = filled(run->num_phases, sizeof(int64_t), 0xFF);
    run->live = filled(n, sizeof(Blocks), 0);
    run->own = filled(n, sizeof(Blocks), 0);
    run->room = NO_BLOCK + 6 * BINS;
    run->blocks = filled(run->room, sizeof(Block), 0);
    if (!(run->handles && run->places && run->handed && run->requests && run->peaks && run->live && run->own &&
          run->blocks))
        return 0;
    for (size_t at = 0; at < run->num_sizes; at++) {
        int64_t size = run->sizes[at] < 0 || run->sizes[at] > LARGEST ? LARGEST + MIN_BLOCK : whole(run->sizes[at], MIN_BLOCK);
        int large = size > SMALL_SIZE;
        run->requests[at] = (Request){size, large && !run->grows ? SMALL_SIZE : MIN_BLOCK - 1, size ? bin_of(size, large) : 0, (char)large};
    }
    for (size_t at = 0; at < run->num_handles; at++)
        run->handles[at] = NO_BLOCK;
    for (int32_t head = 0; head < NO_BLOCK; head++)
        run->blocks[head] = (Block){.size = INT64_MAX, .smaller = head, .larger = head};
    run->blocks[NO_BLOCK] = (Block){.size = 0};
    run->length = NO_BLOCK + 1;
    run->unused = NO_BLOCK;
    return 1;
}

static void clear(Run *run)
{
    for (size_t storage = 0; storage < run->num_storages; storage++) {
        if (run->live)
            free(run->live[storage].at);
        if (run->own)
            free(run->own[storage].at);
    }
    void *all[] = {run->handles, run->places, run->handed, run->requests, run->peaks,
                   run->live,    run->own,    run->spare,  run->outputs.at, run->blocks};
    for (size_t at = 0; at < sizeof(all) / sizeof(*all); at++)
        free(all[at]);
}

static PyObject *answer(Run *run)
{
    switch (run->failed) {
    case RUNS:
        break;
    case DEVICE_FULL:
        PyErr_SetString(PyExc_MemoryError, "the device cannot give so many bytes");
        return NULL;
    case TOO_LARGE:
        PyErr_SetString(PyExc_OverflowError, "more bytes than 64 bits hold");
        return NULL;
    case MALFORMED:
        PyErr_SetString(PyExc_ValueError, "an event names what is not in its tables");
        return NULL;
    default:
        return PyErr_NoMemory();
    }
    PyObject *peaks = PyTuple_New((Py_ssize_t)run->num_phases + 1);
    for (size_t at = 0; peaks != NULL && at <= run->num_phases; at++) {
        PyObject *value = PyLong_FromLongLong(at == 0 ? run->most_reserved : run->peaks[at - 1]);
        if (value == NULL || PyTuple_SetItem(peaks, (Py_ssize_t)at, value) < 0)
            Py_CLEAR(peaks);
    }
    return peaks;
}

static PyObject *replay(PyObject *module, PyObject *arguments)
{
    PyObject *events_object, *sizes_object;
    char *events, *sizes;
    Py_ssize_t events_bytes, sizes_bytes, storages, handles, phases;
    int downwards, grows = 0;
    long long capacity;
    if (!PyArg_ParseTuple(arguments, "SSnnnpL|p:replay", &events_object, &sizes_object, &storages, &handles, &phases, &downwards,
                          &capacity, &grows) ||
        PyBytes_AsStringAndSize(events_object, &events, &events_bytes) < 0 ||
        PyBytes_AsStringAndSize(sizes_object, &sizes, &sizes_bytes) < 0)
        return NULL;
    const size_t length = (size_t)events_bytes / sizeof(int64_t);
    if (length % WIDTH || storages < 0 || handles < 0 || phases < 0 || storages >= INT32_MAX) {
        PyErr_SetString(PyExc_ValueError, "no program");
        return NULL;
    }
    Run run = {0};
    run.phase = NONE;
    run.above = LARGE_SEGMENT; /* a whole number of pages */
    run.below = TOP;
    run.capacity = capacity;
    run.downwards = downwards;
    run.grows = grows;
    run.sizes = (const int64_t *)sizes;
    run.num_sizes = (size_t)sizes_bytes / sizeof(int64_t);
    run.num_storages = (size_t)storages;
    run.num_handles = (size_t)handles;
    run.num_phases = (size_t)phases;
    if (!prepare(&run))
        run.failed = HOST_FULL;
    for (size_t at = 0; at < length && !run.failed; at += WIDTH)
        if (!fits(&run, (const int64_t *)events + at))
            run.failed = MALFORMED;
    run_events(&run, (const int64_t *)events, 0, length);
    close_phase(&run);
    PyObject *peaks = answer(&run);
    clear(&run);
    return peaks;
}

static PyMethodDef methods[] = {
    {"replay", replay, METH_VARARGS,
     "replay(events, sizes, storages, handles, phases, downwards, capacity, grows=False) -> (reserved, allocated of each phase or -1, ...)"},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_replay", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__replay(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module != NULL && (PyModule_AddIntConstant(module, "EVENTS", EVENTS) < 0 ||
                           PyModule_AddIntConstant(module, "STREAMS", STREAMS) < 0 ||
                           PyModule_AddIntConstant(module, "GROWS", 1) < 0))
        Py_CLEAR(module);
    return module;
}
