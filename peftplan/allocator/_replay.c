/* Replays a program (peftplan/allocator/program.py) through torch's CUDA caching allocator, with default options or in segments that grow
   (`expandable_segments:True`).

   The same decisions as `interpret` there and `Allocator` in peftplan/allocator, which name torch's source; here they are
   compiled, because a step of a large model has 140,000 events. Only the limited API of Python 3.10 is used: one build serves all.
*/

#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define APART static __attribute__((noinline))
#define OFTEN __attribute__((hot))
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
#define MOST_ALIKE 16  /* programs that run together */
#define MOST_SEGMENTS 8  /* of each of them */
#define STREAMS 64  /* each has a pool of small blocks and one of large ones: a free block serves its own stream only */
#define POOLS (2 * STREAMS)
#define UNMAPPED_BIN (POOLS * BINS)  /* a bit that nobody reads */
#define LINE 64  /* bytes of a line of the processor's cache: a block is one */
#define CHUNK 256  /* blocks that are asked of this machine at a time */
#define RANGE (((int64_t)1 << 46) / LARGE_SEGMENT * LARGE_SEGMENT)  /* addresses of a segment that grows; a second one in a pool is refused */

enum { PHASE, TAKE, HOLD, LET_GO, MAKE, ADD, FREE, OUTPUTS, END_OUTPUTS, REPEAT, LAYER, OWN, END_OWN, HAND, EMPTY, END, LEAVE, EVENTS };

/* Written in place of MAKE and FREE where a storage is one tensor, made and freed once in a step: a slot, that of others later. */
enum { MAKE_ONE = EVENTS, MAKE_THERE, FREE_ONE };

enum { LIVE, CACHED, UNMAPPED };  /* what a block is; unmapped: addresses of a segment that grows without memory behind them */

enum { RUNS, DEVICE_FULL, HOST_FULL, TOO_LARGE, MALFORMED };

#define NONE (-1)  /* no storage, no phase */

typedef struct {
    int32_t a, b, c;
    uint16_t what, d;
} Event;

typedef struct Block Block;
struct __attribute__((aligned(LINE))) Block {
    int64_t address, size;
    Block *before, *after;  /* in the segment */
    Block *smaller, *larger;  /* in a ring; of a live block `smaller` is the one below it in the stack of its storage */
    uint16_t state, pool, first, bin;  /* first: the first bin of its pool; bin: where it is cached, or the bit of the unmapped ranges */
};

typedef struct Chunk Chunk;
struct Chunk {
    Chunk *next;
    Block blocks[CHUNK];
};

typedef struct {
    int64_t size, unsplit;  /* unsplit: the most that a block may have beyond its request and still be handed out whole */
    unsigned bin, end;  /* of its stream: the bin of this size, and the one behind the last of the pool */
    unsigned large;
} Request;

typedef struct {
    Block *top;
    int64_t spare;  /* of what size the last one was that was made while it was known, or NONE */
    char known;  /* made in this step, even if all of it is gone */
} Stack;

typedef struct {
    int64_t size;
    int32_t storage;
} Spare;

typedef struct {
    int64_t address, size;
} Place;

/* Copied layers that free all that they allocate, as they were run last, and the blocks that were there before. */
typedef struct {
    const Event *first, *behind;  /* NULL: none */
    int64_t allocated, peak;  /* before them, and the most while they ran */
    Place *places;
    size_t num_places, room_places;
} Layers;

/* The cached blocks of a bin are a ring, sorted by size and then address, that begins and ends at the bin's head; so are the unmapped ranges of a
   pool, by address. Of each stream the bins of the pool of small blocks come first, then those of large ones. */
typedef struct {
    int failed;
    /* the allocator */
    unsigned pools;  /* of the streams on which the program makes something */
    Block none, taken;  /* always live: what is before the first of a segment and behind the last; what stays for good */
    uint64_t filled[POOLS * BINS / 64 + 1];  /* bins that hold a block */
    Chunk *chunks, *spare_chunks;  /* those in use; those of an earlier run */
    Block *unused;  /* the first of a chain */
    int64_t allocated, reserved, peak, most_reserved, above, below, capacity;
    int downwards, grows, phase, had_events;
    unsigned pool, first;  /* of the stream that allocates: its pool of small blocks, and that one's first bin */
    int64_t *peaks;
    /* what the program holds */
    char *tables;  /* the memory of all arrays by handle, storage, phase or size, but for what grows */
    size_t tables_bytes, tables_room;  /* bytes of what changes while events run, at the beginning; bytes that there are */
    int layered;  /* whether it has events of single layers */
    const int64_t *sizes;
    const Request *requests;  /* each size as the allocator rounds it */
    size_t num_storages, num_slots, num_handles, num_phases;
    Block **handles, **slots;
    int32_t *places, *handed;
    size_t num_handed;
    Stack *live, *own, outputs;
    Spare *spare;
    size_t num_spare, room_spare;
    Layers layers, before;  /* those about to run, and those that ran last */
    int32_t *open, looked_at;  /* of storages, the last layers that allocate them and have not freed them yet */
    int64_t misses;
    Block unmapped[POOLS], bins[POOLS * BINS];  /* last, since they are many: those of streams that are not used stay untouched */
} Run;

/* -- pools of cached blocks ------------------------------------------------------------------------------------------------------ */

/* Within its pool. Each doubling but the first three is PER_DOUBLING bins wide: the bits behind the leading one number them. */
INLINE unsigned bin_of(int64_t size)
{
    uint64_t units = (uint64_t)size / (uint64_t)MIN_BLOCK * PER_DOUBLING;
    unsigned doublings = 60 - (unsigned)__builtin_clzll(units);
    return PER_DOUBLING * (doublings - 1) + (unsigned)(units >> doublings);
}

/* This block, or if it is the head of its bin the smallest in the bins above it and below `end`. */
INLINE Block *from_bin(Run *run, Block *block, unsigned bin, unsigned end)
{
    if (block != &run->bins[bin])
        return block;
    if (++bin == end)
        return NULL;
    unsigned word = bin / 64;
    uint64_t filled = run->filled[word] & ~(uint64_t)0 << bin % 64;
    while (filled == 0) {
        if (++word == end / 64)
            return NULL;
        filled = run->filled[word];
    }
    return run->bins[64 * word + (unsigned)__builtin_ctzll(filled)].larger;
}

static int64_t size_grown(const Block *block)
{
    return block->size + (block->after->state == UNMAPPED ? block->after->size : 0);
}

/* From the best fit on, the block that with the unmapped range behind it is smaller than its successor. */
static Block *least_grown(Run *run, Block *block, unsigned end)
{
    while (block->after->state == UNMAPPED) {
        Block *larger = from_bin(run, block->larger, block->bin, end);
        if (larger == NULL || size_grown(larger) >= size_grown(block))
            break;
        block = larger;
    }
    return block;
}

/* The smallest cached block of at least this size, of those the one at the lowest address. */
INLINE Block *best_fit(Run *run, const Request *request)
{
    const unsigned bin = run->first + request->bin, end = run->first + request->end;
    Block *block = run->bins[bin].larger;
    while (block->size < request->size)
        block = block->larger;
    block = from_bin(run, block, bin, end);
    return RARE(run->grows) && block != NULL ? least_grown(run, block, end) : block;
}

INLINE int comes_before(const Block *one, const Block *other)
{
    return one->size < other->size || (one->size == other->size && one->address < other->address);
}

APART Block *next_larger(Block *head, const Block *block)
{
    Block *larger = head->larger, *smaller = head->smaller;
    if (block->address - larger->address > smaller->address - block->address) { /* likely nearer to the end */
        while (comes_before(block, smaller))
            smaller = smaller->smaller;
        return smaller->larger;
    }
    while (comes_before(larger, block))
        larger = larger->larger;
    return larger;
}

INLINE void put_before(Block *block, Block *larger)
{
    Block *smaller = larger->smaller;
    block->larger = larger;
    block->smaller = smaller;
    smaller->larger = block;
    larger->smaller = block;
}

INLINE void put_in(Run *run, Block *block)
{
    const unsigned bin = block->first + bin_of(block->size);
    Block *head = &run->bins[bin], *larger = head->larger;
    if (RARE(comes_before(larger, block)))
        larger = next_larger(head, block);
    put_before(block, larger);
    block->bin = (uint16_t)bin;
    run->filled[bin / 64] |= (uint64_t)1 << bin % 64;
}

INLINE void take_out(Run *run, Block *block)
{
    Block *smaller = block->smaller, *larger = block->larger;
    smaller->larger = larger;
    larger->smaller = smaller;
    run->filled[block->bin / 64] &= ~((uint64_t)(smaller == larger) << block->bin % 64); /* both are the head: it was alone */
}

/* -- blocks -------------------------------------------------------------------------------------------------------------------- */

INLINE void drop_block(Run *run, Block *block)
{
    block->after = run->unused;
    run->unused = block;
}

APART int more_blocks(Run *run)
{
    Chunk *chunk = run->spare_chunks;
    if (chunk != NULL) {
        run->spare_chunks = chunk->next;
    } else if (posix_memalign((void **)&chunk, LINE, sizeof(Chunk)) != 0) {
        run->failed = HOST_FULL;
        return 0;
    }
    chunk->next = run->chunks;
    run->chunks = chunk;
    for (int at = CHUNK - 1; at >= 0; at--)
        drop_block(run, &chunk->blocks[at]);
    return 1;
}

/* A live block without neighbours. */
INLINE Block *new_block(Run *run, int64_t address, int64_t size, unsigned pool)
{
    if (RARE(run->unused == NULL) && !more_blocks(run))
        return NULL;
    Block *block = run->unused;
    run->unused = block->after;
    block->address = address;
    block->size = size;
    block->before = block->after = &run->none;
    block->state = LIVE;
    block->pool = (uint16_t)pool;
    block->first = (uint16_t)(BINS * pool);
    return block;
}

INLINE void link_blocks(Block *block, Block *before, Block *after)
{
    block->before = before;
    block->after = after;
    before->after = block;
    after->before = block;
}

/* Take a neighbour in the same state into a block that is in no ring. */
INLINE void merge(Run *run, Block *block, Block *neighbour)
{
    if (neighbour->state != block->state)
        return;
    take_out(run, neighbour);
    if (neighbour == block->before) {
        block->address = neighbour->address;
        link_blocks(block, neighbour->before, block->after);
    } else {
        link_blocks(block, block->before, neighbour->after);
    }
    block->size += neighbour->size;
    drop_block(run, neighbour);
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

static Block *new_segment(Run *run, int64_t size, unsigned pool)
{
    int64_t wanted = pool % 2 == 0 ? SMALL_BUFFER : size < MIN_LARGE ? LARGE_SEGMENT : whole(size, ROUND_LARGE);
    int64_t address;
    if (!has(run, wanted))
        return NULL;
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
        return NULL;
    }
    return new_block(run, address, wanted, pool);
}

/* -- segments that grow: peftplan/allocator/expandable.py ------------------------------------------------------------------------ */

static int64_t page_of(unsigned pool)
{
    return pool % 2 ? LARGE_SEGMENT : SMALL_BUFFER;
}

static void put_in_unmapped(Run *run, Block *block)
{
    Block *head = &run->unmapped[block->pool], *larger = head->larger;
    while (larger != head && larger->address < block->address)
        larger = larger->larger;
    put_before(block, larger);
    block->bin = UNMAPPED_BIN;
}

/* Put a new block between two others. */
static Block *splice(Run *run, int64_t address, int64_t size, Block *before, Block *after, unsigned state, unsigned pool)
{
    Block *block = new_block(run, address, size, pool);
    if (block == NULL)
        return NULL;
    link_blocks(block, before, after);
    block->state = state;
    if (state == UNMAPPED)
        put_in_unmapped(run, block);
    else
        put_in(run, block);
    return block;
}

/* Give back the whole pages of a cached block; the ends that share a page with a neighbour stay. */
static void unmap(Run *run, Block *block)
{
    const int64_t page = page_of(block->pool), start = block->address, end = start + block->size;
    const int64_t first = whole(start, page), last = end / page * page;
    if (first >= last)
        return;
    take_out(run, block);
    if (first > start)
        splice(run, start, first - start, block->before, block, CACHED, block->pool);
    if (end > last)
        splice(run, last, end - last, block, block->after, CACHED, block->pool);
    block->address = first;
    block->size = last - first;
    block->state = UNMAPPED;
    merge(run, block, block->before);
    merge(run, block, block->after);
    run->reserved -= last - first;
    if (block->before == &run->none && block->after == &run->none)
        drop_block(run, block); /* nothing of the segment is mapped: its addresses go too */
    else
        put_in_unmapped(run, block);
}

/* Back the first pages of an unmapped range; all of them or, where the device cannot give so many, none. */
static int map(Run *run, Block *range, int64_t size)
{
    const int64_t length = whole(size, page_of(range->pool)), rest = range->size - length;
    if (!has(run, length))
        return 0;
    take_out(run, range);
    range->state = CACHED;
    if (rest > 0) {
        range->size = length;
        if (splice(run, range->address + length, rest, range, range->after, UNMAPPED, range->pool) == NULL)
            return 0;
    }
    merge(run, range, range->before);
    merge(run, range, range->after);
    put_in(run, range);
    reserve(run, length);
    return 1;
}

static int has_room(const Block *block, int64_t size)
{
    for (; size > 0 && block->state != LIVE; block = block->after)
        size -= block->size;
    return size <= 0;
}

/* The lowest unmapped range of a pool, with the cached block right before it, that has room for so many bytes; else a new segment. */
static Block *room_for(Run *run, int64_t size, unsigned pool)
{
    const Block *head = &run->unmapped[pool];
    for (Block *block = head->larger; block != head; block = block->larger) {
        Block *start = block->before->state == CACHED ? block->before : block;
        if (has_room(start, size))
            return start;
    }
    if (head->larger != head || size > RANGE) {
        run->failed = TOO_LARGE;
        return NULL;
    }
    run->above += RANGE;
    return splice(run, run->above - RANGE, RANGE, &run->none, &run->none, UNMAPPED, pool);
}

/* A cached block of at least this size that is in no ring, with what is missing of it mapped; pages mapped before a failure stay. */
static Block *grow_segment(Run *run, int64_t size, unsigned pool)
{
    Block *block = room_for(run, size, pool);
    if (block == NULL)
        return NULL;
    if (block->state == UNMAPPED && !map(run, block, size < block->size ? size : block->size))
        return NULL;
    while (block->size < size) {
        Block *after = block->after;
        const int64_t missing = size - block->size;
        if (!map(run, after, missing < after->size ? missing : after->size))
            return NULL;
        block = after;
    }
    take_out(run, block);
    return block;
}

/* -- the allocator's calls ------------------------------------------------------------------------------------------------------- */

APART void release_cached(Run *run)
{
    for (Block *head = run->bins; head < run->bins + run->pools * BINS; head++) {
        for (Block *block = head->larger, *larger; block != head; block = larger) {
            larger = block->larger;
            if (run->grows) {
                unmap(run, block);
            } else if (block->before == &run->none && block->after == &run->none) {
                run->reserved -= block->size;
                take_out(run, block);
                drop_block(run, block);
            }
        }
    }
}

/* What no cached block serves: memory of the device, if need be after all that is cached went back to it. */
APART Block *miss(Run *run, int64_t size, unsigned pool)
{
    run->misses++;
    for (int again = 0; again < 2 && !run->failed; again++) {
        Block *block = run->grows ? grow_segment(run, size, pool) : new_segment(run, size, pool);
        if (block != NULL)
            return block;
        if (!again && !run->failed)
            release_cached(run);
    }
    if (!run->failed)
        run->failed = DEVICE_FULL;
    return NULL;
}

/* A live block; NULL where the run failed. */
INLINE Block *allocate_here(Run *run, int64_t index)
{
    const Request *request = &run->requests[index];
    const int64_t size = request->size;
    const unsigned pool = run->pool + request->large;
    run->had_events = 1;
    if (RARE((uint64_t)size - 1 >= (uint64_t)LARGEST)) {
        if (size == 0)
            return new_block(run, 0, 0, pool);
        run->failed = TOO_LARGE;
        return NULL;
    }
    Block *block = best_fit(run, request);
    if (block != NULL)
        take_out(run, block);
    else if ((block = miss(run, size, pool)) == NULL)
        return NULL;
    const int64_t rest = block->size - size;
    if (rest > request->unsplit) {
        Block *behind = block;
        block = new_block(run, behind->address, size, pool);
        if (RARE(block == NULL))
            return NULL;
        link_blocks(block, behind->before, behind);
        behind->address += size;
        behind->size = rest;
        behind->state = CACHED;
        put_in(run, behind);
    }
    block->state = LIVE;
    run->allocated += block->size;
    if (run->allocated > run->peak)
        run->peak = run->allocated;
    return block;
}

APART Block *allocate(Run *run, int64_t index)
{
    return allocate_here(run, index);
}

/* Allocate for good: the neighbours know that it lives, and nobody else asks for it. */
static void take(Run *run, int64_t index)
{
    Block *block = allocate(run, index);
    if (block == NULL)
        return;
    if (block->before != &run->none)
        block->before->after = &run->taken;
    if (block->after != &run->none)
        block->after->before = &run->taken;
    drop_block(run, block);
}

INLINE void release_here(Run *run, Block *block)
{
    run->had_events = 1;
    if (RARE(block->size == 0)) {
        drop_block(run, block);
        return;
    }
    run->allocated -= block->size;
    block->state = CACHED;
    merge(run, block, block->before);
    merge(run, block, block->after);
    put_in(run, block);
}

APART void release(Run *run, Block *block)
{
    release_here(run, block);
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

static void release_all(Run *run, Stack *stack)
{
    for (Block *block = stack->top, *below; block != NULL; block = below) {
        below = block->smaller;
        release(run, block);
    }
    stack->top = NULL;
}

INLINE void allocate_onto(Run *run, Stack *stack, int64_t size, int64_t count)
{
    for (; count > 0; count--) {
        Block *block = allocate(run, size);
        if (RARE(block == NULL))
            return;
        block->smaller = stack->top;
        stack->top = block;
    }
}

static void move_blocks(Stack *from, Stack *to)
{
    Block *lowest = from->top;
    if (lowest == NULL)
        return;
    while (lowest->smaller != NULL)
        lowest = lowest->smaller;
    lowest->smaller = to->top;
    to->top = from->top;
    from->top = NULL;
}

/* A storage that is made again may stand for others of its size. */
APART void make_spare(Run *run, int64_t storage, int64_t size)
{
    Stack *stack = &run->live[storage];
    size_t at = 0;
    while (at < run->num_spare && (run->spare[at].storage != storage || run->spare[at].size != size))
        at++;
    stack->spare = size;
    if (at < run->num_spare)
        return;
    if (at == run->room_spare) {
        Spare *moved = realloc(run->spare, (2 * at + 16) * sizeof(Spare));
        if (moved == NULL) {
            run->failed = HOST_FULL;
            return;
        }
        run->spare = moved;
        run->room_spare = 2 * at + 16;
    }
    run->spare[run->num_spare++] = (Spare){size, (int32_t)storage};
}

static void make(Run *run, int64_t storage, int64_t size, int64_t count)
{
    Stack *stack = &run->live[storage];
    if (stack->known && stack->spare != run->sizes[size])
        make_spare(run, storage, run->sizes[size]);
    stack->known = 1;
    allocate_onto(run, stack, size, count);
}

static Stack *standing_for(Run *run, int64_t storage, int64_t size)
{
    if (run->live[storage].top != NULL)
        return &run->live[storage];
    for (size_t at = 0; at < run->num_spare; at++) {
        Stack *spare = &run->live[run->spare[at].storage];
        if (run->spare[at].size == run->sizes[size] && spare->top != NULL)
            return spare;
    }
    return NULL;
}

static void free_some(Run *run, int64_t storage, int64_t size, int64_t count)
{
    for (; count > 0; count--) {
        Stack *stack = standing_for(run, storage, size);
        if (stack == NULL)
            return;
        Block *block = stack->top;
        stack->top = block->smaller;
        release(run, block);
    }
}

static void hand(Run *run, int64_t storage, int64_t new, int64_t size, int64_t count)
{
    int32_t place = run->places[storage] == NONE ? (int32_t)new : run->places[storage];
    if (run->live[storage].top != NULL)
        place = (int32_t)storage;
    else if (run->live[place].top == NULL)
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
        Stack *place = &run->live[run->places[new]];
        place->known = 1;
        move_blocks(&run->own[new], place);
    }
    run->num_handed = 0;
}

static void end_step(Run *run)
{
    for (size_t storage = 0; storage < run->num_storages; storage++) {
        release_all(run, &run->live[storage]);
        run->live[storage].known = 0;
        run->live[storage].spare = NONE;
    }
    run->num_spare = 0;
}

/* -- layers that ran before -----------------------------------------------------------------------------------------------------------------

   The backward of a micro batch often begins with the very blocks with which that of the micro batch before began. What it allocates then finds
   the same places, and it has the same peak. Behind it, those blocks are there that were there before, and those of the tensors that it freed. */

/* Whether layers free all that they allocate, and of what was there before one tensor a turn of some storages. */
static int free_their_own(Run *run, const Event *event, const Event *behind)
{
    const int32_t now = ++run->looked_at;
    int32_t still = 0;
    for (; event < behind; event++) {
        switch (event->what) {
        case LAYER:
            if (still)
                return 0;
            break;
        case OWN:
        case FREE:
            if (event->c != 1 || run->open[event->a] == now)
                return 0;
            run->open[event->a] = now;
            still += event->what == OWN;
            break;
        case END_OWN:
            if (run->open[event->a] != now)
                return 0;
            run->open[event->a] = 0;
            still--;
            break;
        default:
            return 0;
        }
    }
    return !still;
}

static int note_place(Run *run, Layers *layers, int64_t address, int64_t size)
{
    if (layers->num_places == layers->room_places) {
        Place *moved = realloc(layers->places, (2 * layers->room_places + 1024) * sizeof(Place));
        if (moved == NULL) {
            run->failed = HOST_FULL;
            return 0;
        }
        layers->places = moved;
        layers->room_places = 2 * layers->room_places + 1024;
    }
    layers->places[layers->num_places++] = (Place){address, size};
    return 1;
}

/* Note which blocks are there before layers run: the cached ones, the unmapped ranges, and the tensors that the layers will free. */
static int note_places(Run *run, Layers *layers)
{
    int32_t turns = 0;
    layers->num_places = 0;
    for (unsigned word = 0; word < run->pools * BINS / 64; word++) {
        for (uint64_t filled = run->filled[word]; filled; filled &= filled - 1) {
            const Block *head = &run->bins[64 * word + (unsigned)__builtin_ctzll(filled)];
            for (const Block *block = head->larger; block != head; block = block->larger)
                if (!note_place(run, layers, block->address, block->size))
                    return 0;
        }
    }
    for (const Block *head = run->unmapped; head < run->unmapped + (run->grows ? run->pools : 0); head++)
        for (const Block *block = head->larger; block != head; block = block->larger)
            if (!note_place(run, layers, block->address, block->size))
                return 0;
    for (const Event *event = layers->first; event < layers->behind; event++) {
        const Block *block = event->what == FREE ? run->live[event->a].top : NULL;
        if (event->what == LAYER)
            turns = event->a;
        for (int32_t turn = 0; event->what == FREE && turn < turns; turn++, block = block->smaller)
            if (block == NULL || !note_place(run, layers, block->address, block->size))
                return 0;
    }
    return 1;
}

/* Whether layers do what those did that ran last, with other storages, and begin with the same blocks. */
static int run_again(const Run *run)
{
    const Layers *one = &run->before, *other = &run->layers;
    const Event *a = one->first, *b = other->first;
    if (a == NULL || one->behind - a < 2 || one->behind - a != other->behind - b || one->num_places != other->num_places ||
        memcmp(one->places, other->places, one->num_places * sizeof(Place)) != 0)
        return 0;
    const int32_t apart = b[1].a - a[1].a; /* as storages are numbered in the order in which tensors are made */
    for (; a < one->behind; a++, b++) {
        if (a->what != b->what || b->a - a->a != (a->what == LAYER ? 0 : apart) || (a->what == LAYER && a->b != b->b) ||
            (a->what == OWN && run->sizes[a->b] != run->sizes[b->b]))
            return 0;
    }
    return 1;
}

/* Leave behind what layers leave behind that run again. */
static void leave_behind(Run *run)
{
    const int64_t peak = run->before.peak - run->before.allocated + run->allocated;
    int32_t turns = 0;
    run->had_events = 1;
    if (peak > run->peak)
        run->peak = peak;
    for (const Event *event = run->layers.first; event < run->layers.behind; event++) {
        if (event->what == LAYER)
            turns = event->a;
        else if (event->what == OWN)
            run->own[event->a].top = NULL;
        else if (event->what == FREE)
            free_some(run, event->a, event->b, turns);
    }
}

static void run_events(Run *run, const Event *event, const Event *stop);

/* Every turn of layers: those of each kind, while there are any. */
static void take_turns(Run *run, const Event *first, const Event *behind, int32_t most)
{
    for (int32_t turn = 0; turn < most; turn++) {
        for (const Event *layer = first; layer < behind && !run->failed; layer += 1 + layer->b) {
            if (turn < layer->a) {
                run_events(run, layer + 1, layer + 1 + layer->b);
                end_layer(run);
            }
        }
    }
}

/* The layers of each kind in turn; the event behind them. */
static const Event *repeat(Run *run, const Event *first, int32_t kinds, const Event *stop)
{
    const Event *behind = first;
    int32_t most = 0;
    for (int32_t kind = 0; kind < kinds; kind++) {
        if (behind >= stop || behind->what != LAYER || behind->b >= stop - behind) {
            run->failed = MALFORMED;
            return stop;
        }
        if (behind->a > most)
            most = behind->a;
        behind += 1 + behind->b;
    }
    run->layers.first = first;
    run->layers.behind = behind;
    if (!free_their_own(run, first, behind) || !note_places(run, &run->layers)) {
        take_turns(run, first, behind, most);
    } else if (run_again(run)) {
        leave_behind(run);
    } else {
        const int64_t peak = run->peak, misses = run->misses;
        run->layers.allocated = run->peak = run->allocated;
        take_turns(run, first, behind, most);
        run->layers.peak = run->peak;
        if (peak > run->peak)
            run->peak = peak;
        const Layers latest = run->layers;
        run->layers = run->before;
        run->before = latest;
        if (run->misses != misses)
            run->before.first = NULL;
    }
    return behind;
}

/* Nearly all events are tensors of one layer, which come and go here without a call. */
static OFTEN void run_events(Run *run, const Event *event, const Event *stop)
{
    Block *block;
    while (event < stop && !run->failed) {
        const int32_t a = event->a, b = event->b, c = event->c;
        const Event *at = event++;
        switch (at->what) {
        case MAKE_ONE:
            run->slots[a] = allocate_here(run, b);
            break;
        case FREE_ONE:
            release_here(run, run->slots[a]);
            break;
        case MAKE_THERE:
            run->pool = 2 * (unsigned)at->d;
            run->first = BINS * run->pool;
            run->slots[a] = allocate_here(run, b);
            run->pool = run->first = 0;
            break;
        case OWN:
            run->own[a].top = NULL;
            if (RARE(c != 1)) {
                allocate_onto(run, &run->own[a], b, c);
            } else if ((block = allocate_here(run, b)) != NULL) {
                block->smaller = NULL;
                run->own[a].top = block;
            }
            break;
        case END_OWN:
            block = run->own[a].top;
            if (RARE(block == NULL || block->smaller != NULL)) {
                release_all(run, &run->own[a]);
            } else {
                run->own[a].top = NULL;
                release_here(run, block);
            }
            break;
        case MAKE:
            run->pool = 2 * (unsigned)at->d;
            run->first = BINS * run->pool;
            if (RARE(c != 1 || run->live[a].known)) {
                make(run, a, b, c);
            } else if ((block = allocate_here(run, b)) != NULL) {
                run->live[a].known = 1;
                block->smaller = run->live[a].top;
                run->live[a].top = block;
            }
            run->pool = run->first = 0;
            break;
        case FREE:
            block = run->live[a].top;
            if (RARE(c != 1 || block == NULL)) {
                free_some(run, a, b, c);
            } else {
                run->live[a].top = block->smaller;
                release_here(run, block);
            }
            break;
        case HAND:
            hand(run, a, b, c, at->d);
            break;
        case HOLD:
            run->handles[a] = allocate(run, b);
            break;
        case LET_GO:
            if (run->handles[a] != NULL)
                release(run, run->handles[a]);
            run->handles[a] = NULL;
            break;
        case TAKE:
            for (int32_t left = b; left > 0 && !run->failed; left--)
                take(run, a);
            break;
        case ADD:
            run->live[a].known = 1;
            allocate_onto(run, &run->live[a], b, 1);
            break;
        case REPEAT:
            event = repeat(run, event, a, stop);
            break;
        case OUTPUTS:
            move_blocks(&run->live[a], &run->outputs);
            run->live[a].known = 0;
            break;
        case END_OUTPUTS:
            release_all(run, &run->outputs);
            break;
        case LEAVE:
            run->live[a].top = NULL;
            run->live[a].known = 0;
            break;
        case PHASE:
            begin_phase(run, a);
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
}

static void make_ring(Block *head)
{
    head->size = INT64_MAX;
    head->smaller = head->larger = head;
}

/* Sizes as the allocator rounds them. */
static void make_requests(const Run *run, const int64_t *sizes, Request *requests, size_t number)
{
    for (size_t at = 0; at < number; at++) {
        int64_t size = sizes[at] < 0 || sizes[at] > LARGEST ? LARGEST + MIN_BLOCK : whole(sizes[at], MIN_BLOCK);
        unsigned large = size > SMALL_SIZE;
        requests[at] = (Request){.size = size,
                                 .unsplit = large && !run->grows ? SMALL_SIZE : MIN_BLOCK - 1,
                                 .bin = size ? large * BINS + bin_of(size) : 0,
                                 .end = (large + 1) * BINS,
                                 .large = large};
    }
}

#include "_programs.h"
#include "_copies.h"
#include "_alike.h"
#include "_calls.h"
#include "_levels.h"

static PyMethodDef methods[] = {
    {"replay", replay, METH_VARARGS,
     "replay(events, sizes, storages, handles, phases, downwards, capacity, grows=False) -> (reserved, allocated of each phase or -1, ...)"},
    {"replay_several", replay_several, METH_VARARGS,
     "replay_several([(events, sizes, storages, handles, phases), ...], few, downwards, grows) -> [as replay, ...]"},
    {"levels", levels, METH_VARARGS,
     "levels(structure, bytes of each size, products, standing) -> (bytes of each kind, [(highest level, events) of each window]) or None"},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_replay", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__replay(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module != NULL && (PyModule_AddIntConstant(module, "EVENTS", EVENTS) < 0 ||
                           PyModule_AddIntConstant(module, "STREAMS", STREAMS) < 0 ||
                           PyModule_AddIntConstant(module, "GROWS", 1) < 0 ||
                           PyModule_AddIntConstant(module, "MOST_ALIKE", MOST_ALIKE) < 0))
        Py_CLEAR(module);
    return module;
}
