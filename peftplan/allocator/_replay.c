/* Replays a program (peftplan/allocator/program.py) through torch's CUDA caching allocator with default options.

   The same decisions as `interpret` there and `Allocator` in peftplan/allocator, which name torch's source; here they are
   compiled, because a step of a large model has 140,000 events. Only the limited API of Python 3.10 is used: one build serves all.
*/

#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

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

enum { PHASE, TAKE, HOLD, LET_GO, MAKE, ADD, FREE, OUTPUTS, END_OUTPUTS, BEHIND, REPEAT, LAYER, OWN, END_OWN, HAND, EMPTY, END, LEAVE, EVENTS };

enum { RUNS, DEVICE_FULL, HOST_FULL, TOO_LARGE, MALFORMED };

#define NONE (-1)  /* no block: of zero bytes, or before the first of a segment */
#define NOWHERE ((size_t)-1)

typedef struct {
    int64_t address, size;
    int32_t before, after;
    uint32_t hint;
    char free, large;
} Block;

typedef struct {
    int64_t size;
    int32_t block;
} Place;

typedef struct {
    Place *at;
    size_t length, room;
} Pool;

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
    int32_t unused;  /* the first of a chain of blocks that were merged away */
    Pool pools[2];
    int64_t allocated, reserved, peak, most_reserved, above, below, capacity;
    int downwards, phase, had_events;
    int64_t *peaks;
    /* what the program holds */
    const int64_t *sizes;
    size_t num_sizes, num_storages, num_handles, num_phases;
    int32_t *handles, *behind, *places, *handed;
    uint32_t *hints;  /* size -> where the pool held its best fit last */
    size_t num_handed;
    Blocks *live, *own, outputs;
    Spare *spare;
    size_t num_spare, room_spare;
} Run;

/* -- memory of this machine ---------------------------------------------------------------------------------------------------- */

static int grow(Run *run, void **at, size_t *room, size_t length, size_t itemsize)
{
    if (length < *room)
        return 1;
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

static void push(Run *run, Blocks *blocks, int32_t block)
{
    if (grow(run, (void **)&blocks->at, &blocks->room, blocks->length, sizeof(int32_t)))
        blocks->at[blocks->length++] = block;
}

/* -- pools of free blocks, by size and then address ---------------------------------------------------------------------------- */

/* The first place with at least this size, from one that is likely near it, in growing steps. */
static size_t at_least(const Pool *pool, size_t near, int64_t size)
{
    size_t low = 0, high = pool->length;
    if (near > high)
        near = high;
    if (near < high && pool->at[near].size < size) {
        low = near + 1;
        for (size_t step = 1; low + step <= high; step *= 2) {
            if (pool->at[low + step - 1].size >= size) {
                high = low + step - 1;
                break;
            }
            low += step;
        }
    } else {
        high = near;
        for (size_t step = 1; step <= high; step *= 2) {
            if (pool->at[high - step].size < size) {
                low = high - step + 1;
                break;
            }
            high -= step;
        }
    }
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (pool->at[middle].size < size)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* The first such place that does not come before a block of this size at this address. */
static size_t lower_bound(const Run *run, const Pool *pool, size_t near, int64_t size, int64_t address)
{
    size_t low = at_least(pool, near, size);
    if (low == pool->length || pool->at[low].size != size || run->blocks[pool->at[low].block].address >= address)
        return low;
    size_t high = at_least(pool, low, size + 1);
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (run->blocks[pool->at[middle].block].address < address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static void take_out(Pool *pool, size_t at)
{
    pool->length--;
    memmove(&pool->at[at], &pool->at[at + 1], (pool->length - at) * sizeof(Place));
}

static void insert(Run *run, Pool *pool, int32_t number)
{
    Block *block = &run->blocks[number];
    if (!grow(run, (void **)&pool->at, &pool->room, pool->length, sizeof(Place)))
        return;
    size_t at = lower_bound(run, pool, block->hint, block->size, block->address);
    memmove(&pool->at[at + 1], &pool->at[at], (pool->length - at) * sizeof(Place));
    pool->at[at] = (Place){block->size, number};
    block->hint = (uint32_t)at;
    pool->length++;
}

/* A block in place of the smaller one at `at`, or of the larger one. */
static void move_up(Run *run, Pool *pool, size_t at, int32_t number)
{
    Block *block = &run->blocks[number];
    size_t to = lower_bound(run, pool, at + 1, block->size, block->address) - 1;
    memmove(&pool->at[at], &pool->at[at + 1], (to - at) * sizeof(Place));
    pool->at[to] = (Place){block->size, number};
    block->hint = (uint32_t)to;
}

static void move_down(Run *run, Pool *pool, size_t at, int32_t number)
{
    Block *block = &run->blocks[number];
    size_t to = lower_bound(run, pool, at, block->size, block->address);
    memmove(&pool->at[to + 1], &pool->at[to], (at - to) * sizeof(Place));
    pool->at[to] = (Place){block->size, number};
    block->hint = (uint32_t)to;
}

static size_t place_of(const Run *run, const Pool *pool, int32_t number)
{
    const Block *block = &run->blocks[number];
    size_t near = block->hint > 3 ? block->hint - 3 : 0;
    for (size_t at = near; at < near + 8 && at < pool->length; at++)
        if (pool->at[at].block == number)
            return at;
    return lower_bound(run, pool, block->hint, block->size, block->address);
}

/* -- blocks -------------------------------------------------------------------------------------------------------------------- */

static int32_t new_block(Run *run, int64_t address, int64_t size, int large)
{
    int32_t number = run->unused;
    if (number != NONE) {
        run->unused = run->blocks[number].after;
    } else {
        if (run->length >= INT32_MAX) {
            run->failed = TOO_LARGE;
            return NONE;
        }
        if (!grow(run, (void **)&run->blocks, &run->room, run->length, sizeof(Block)))
            return NONE;
        number = (int32_t)run->length++;
    }
    run->blocks[number] = (Block){address, size, NONE, NONE, 0, 0, (char)large};
    return number;
}

static void drop_block(Run *run, int32_t number)
{
    run->blocks[number].after = run->unused;
    run->unused = number;
}

static void link_blocks(Run *run, int32_t number, int32_t before, int32_t after)
{
    run->blocks[number].before = before;
    run->blocks[number].after = after;
    if (before != NONE)
        run->blocks[before].after = number;
    if (after != NONE)
        run->blocks[after].before = number;
}

static int is_free(const Run *run, int32_t number)
{
    return number != NONE && run->blocks[number].free;
}

/* -- the device ---------------------------------------------------------------------------------------------------------------- */

static int64_t whole(int64_t size, int64_t unit)
{
    return (size + unit - 1) / unit * unit;
}

static void release_cached(Run *run)
{
    for (int large = 0; large < 2; large++) {
        Pool *pool = &run->pools[large];
        size_t kept = 0;
        for (size_t at = 0; at < pool->length; at++) {
            int32_t number = pool->at[at].block;
            Block *block = &run->blocks[number];
            if (block->before == NONE && block->after == NONE) {
                run->reserved -= block->size;
                drop_block(run, number);
            } else {
                pool->at[kept++] = pool->at[at];
            }
        }
        pool->length = kept;
    }
}

static int32_t new_segment(Run *run, int64_t size, int large)
{
    int64_t wanted = !large ? SMALL_BUFFER : size < MIN_LARGE ? LARGE_SEGMENT : whole(size, ROUND_LARGE);
    if (run->capacity >= 0 && run->reserved + wanted > run->capacity) {
        release_cached(run);
        if (run->reserved + wanted > run->capacity) {
            run->failed = DEVICE_FULL;
            return NONE;
        }
    }
    run->reserved += wanted;
    if (run->reserved > run->most_reserved)
        run->most_reserved = run->reserved;
    int64_t address;
    if (run->downwards && wanted > LARGE_SEGMENT) {
        run->below -= wanted;
        address = run->below;
    } else {
        address = run->above;
        run->above += wanted;
    }
    if (run->above > LARGEST || TOP - run->below > LARGEST) {
        run->failed = TOO_LARGE;
        return NONE;
    }
    return new_block(run, address, wanted, large);
}

/* -- the allocator's two calls -------------------------------------------------------------------------------------------------- */

static int32_t allocate(Run *run, int64_t index)
{
    const int64_t nbytes = run->sizes[index];
    run->had_events = 1;
    if (nbytes == 0)
        return NONE;
    if (nbytes > LARGEST) {
        run->failed = TOO_LARGE;
        return NONE;
    }
    int64_t size = whole(nbytes, MIN_BLOCK);
    int large = size > SMALL_SIZE;
    Pool *pool = &run->pools[large];
    size_t at = run->hints[index] = (uint32_t)at_least(pool, run->hints[index], size);
    int fresh = at == pool->length;
    int32_t number = fresh ? new_segment(run, size, large) : pool->at[at].block;
    if (number == NONE)
        return NONE;
    int64_t rest = run->blocks[number].size - size;
    if (large ? rest > SMALL_SIZE : rest >= MIN_BLOCK) {
        int32_t front = new_block(run, run->blocks[number].address, size, large);
        if (front == NONE)
            return NONE;
        Block *behind = &run->blocks[number];
        link_blocks(run, front, behind->before, number);
        behind->address += size;
        behind->size = rest;
        behind->free = 1;
        if (fresh)
            insert(run, pool, number);
        else
            move_down(run, pool, at, number);
        number = front;
    } else if (!fresh) {
        take_out(pool, at);
    }
    run->blocks[number].free = 0;
    run->allocated += run->blocks[number].size;
    if (run->allocated > run->peak)
        run->peak = run->allocated;
    return number;
}

static void release(Run *run, int32_t number)
{
    run->had_events = 1;
    if (number == NONE)
        return;
    Block *block = &run->blocks[number];
    Pool *pool = &run->pools[(int)block->large];
    int32_t before = block->before, after = block->after;
    run->allocated -= block->size;
    block->free = 1;
    size_t at = NOWHERE;
    if (is_free(run, before)) {
        at = place_of(run, pool, before);
        block->address = run->blocks[before].address;
        block->size += run->blocks[before].size;
        link_blocks(run, number, run->blocks[before].before, after);
    }
    if (is_free(run, after)) {
        size_t other = place_of(run, pool, after);
        if (at != NOWHERE) {
            take_out(pool, other);
            at -= other < at;
        } else {
            at = other;
        }
        block->size += run->blocks[after].size;
        link_blocks(run, number, block->before, run->blocks[after].after);
        drop_block(run, after);
    }
    if (at == NOWHERE)
        insert(run, pool, number);
    else
        move_up(run, pool, at, number);
    if (is_free(run, before))
        drop_block(run, before);
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

static void allocate_into(Run *run, Blocks *blocks, int64_t size, int64_t count)
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
            if (!grow(run, (void **)&run->spare, &run->room_spare, run->num_spare, sizeof(Spare)))
                return;
            run->spare[run->num_spare++] = (Spare){run->sizes[size], (int32_t)storage};
        }
    }
    blocks->known = 1;
    allocate_into(run, blocks, size, count);
}

static Blocks *standing_for(Run *run, int64_t storage, int64_t size)
{
    int32_t behind = run->behind[storage];
    Blocks *blocks = &run->live[behind == NONE ? storage : behind];
    if (blocks->length)
        return blocks;
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
        run->behind[storage] = NONE;
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

/* Whether operands are places in the tables. */
static int fits(Run *run, int64_t what, int64_t a, int64_t b, int64_t c)
{
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
    case ADD:
    case FREE:
    case OWN:
        return a >= 0 && a < storages && b >= 0 && b < sizes;
    case OUTPUTS:
    case LEAVE:
    case END_OWN:
        return a >= 0 && a < storages;
    case BEHIND:
        return a >= 0 && a < storages && b >= 0 && b < storages;
    case HAND:
        return a >= 0 && a < storages && b >= 0 && b < storages && c >= 0 && c < sizes && run->num_handed < run->num_storages;
    case REPEAT:
        return a > 0;
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
        if (!fits(run, what, a, b, c)) {
            run->failed = MALFORMED;
            break;
        }
        switch (what) {
        case OWN:
            run->own[a].length = 0;
            allocate_into(run, &run->own[a], b, c);
            break;
        case END_OWN:
            release_all(run, &run->own[a]);
            break;
        case MAKE:
            make(run, a, b, c);
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
            run->handles[a] = NONE;
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
        case BEHIND:
            run->behind[a] = (int32_t)b;
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
    run->handles = filled(run->num_handles, sizeof(int32_t), 0xFF); /* all NONE */
    run->behind = filled(n, sizeof(int32_t), 0xFF);
    run->places = filled(n, sizeof(int32_t), 0xFF);
    run->handed = filled(n, sizeof(int32_t), 0);
    run->hints = filled(run->num_sizes, sizeof(uint32_t), 0);
    run->peaks = filled(run->num_phases, sizeof(int64_t), 0xFF);
    run->live = filled(n, sizeof(Blocks), 0);
    run->own = filled(n, sizeof(Blocks), 0);
    return run->handles && run->behind && run->places && run->handed && run->hints && run->peaks && run->live && run->own;
}

static void clear(Run *run)
{
    for (size_t storage = 0; storage < run->num_storages; storage++) {
        if (run->live)
            free(run->live[storage].at);
        if (run->own)
            free(run->own[storage].at);
    }
    void *all[] = {run->handles, run->behind, run->places,     run->handed, run->hints,       run->peaks,       run->live,
                   run->own,     run->spare,  run->outputs.at, run->blocks, run->pools[0].at, run->pools[1].at};
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
    int downwards;
    long long capacity;
    if (!PyArg_ParseTuple(arguments, "SSnnnpL:replay", &events_object, &sizes_object, &storages, &handles, &phases, &downwards,
                          &capacity) ||
        PyBytes_AsStringAndSize(events_object, &events, &events_bytes) < 0 ||
        PyBytes_AsStringAndSize(sizes_object, &sizes, &sizes_bytes) < 0)
        return NULL;
    const size_t length = (size_t)events_bytes / sizeof(int64_t);
    if (length % WIDTH || storages < 0 || handles < 0 || phases < 0 || storages >= INT32_MAX) {
        PyErr_SetString(PyExc_ValueError, "no program");
        return NULL;
    }
    Run run = {0};
    run.unused = run.phase = NONE;
    run.above = ROUND_LARGE;
    run.below = TOP;
    run.capacity = capacity;
    run.downwards = downwards;
    run.sizes = (const int64_t *)sizes;
    run.num_sizes = (size_t)sizes_bytes / sizeof(int64_t);
    run.num_storages = (size_t)storages;
    run.num_handles = (size_t)handles;
    run.num_phases = (size_t)phases;
    if (prepare(&run)) {
        run_events(&run, (const int64_t *)events, 0, length);
        close_phase(&run);
    } else {
        run.failed = HOST_FULL;
    }
    PyObject *peaks = answer(&run);
    clear(&run);
    return peaks;
}

static PyMethodDef methods[] = {
    {"replay", replay, METH_VARARGS,
     "replay(events, sizes, storages, handles, phases, downwards, capacity) -> (reserved, allocated of each phase or -1, ...)"},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_replay", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__replay(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module != NULL && PyModule_AddIntConstant(module, "EVENTS", EVENTS) < 0)
        Py_CLEAR(module);
    return module;
}
