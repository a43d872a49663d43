/* Copies of a run, from which it goes on in another way, and whether two runs go on alike. Included by _replay.c. */

/* -- a copy of a run ------------------------------------------------------------------------------------------------------------- */

enum { COUNT, SAVE, RESTORE };

static char *carry(char *buffer, void *part, size_t nbytes, int how)
{
    if (how == SAVE)
        memcpy(buffer, part, nbytes);
    else if (how == RESTORE)
        memcpy(part, buffer, nbytes);
    return buffer + nbytes;
}

static size_t num_chunks(const Run *run)
{
    size_t number = 0;
    for (const Chunk *chunk = run->chunks; chunk != NULL; chunk = chunk->next)
        number++;
    return number;
}

/* As many chunks as there were: those beyond wait as spare ones, and come back in the same order. */
static void have_chunks(Run *run, size_t wanted)
{
    size_t number = num_chunks(run);
    for (; number > wanted; number--) {
        Chunk *chunk = run->chunks;
        run->chunks = chunk->next;
        chunk->next = run->spare_chunks;
        run->spare_chunks = chunk;
    }
    for (; number < wanted; number++) {
        Chunk *chunk = run->spare_chunks;
        run->spare_chunks = chunk->next;
        chunk->next = run->chunks;
        run->chunks = chunk;
    }
}

/* The bytes of all that changes while events run, copied to a buffer or back. */
static size_t carry_all(Run *run, char *buffer, int how)
{
    size_t chunks = num_chunks(run);
    char *at = carry(buffer, &chunks, sizeof(chunks), how);
    if (how == RESTORE) {
        for (unsigned word = 0; word < run->pools * BINS / 64; word++)
            for (uint64_t filled = run->filled[word]; filled; filled &= filled - 1)
                make_ring(&run->bins[64 * word + (unsigned)__builtin_ctzll(filled)]);
        have_chunks(run, chunks);
        const Run *const now = run;
        Chunk *const in_use = now->chunks, *const spare_chunks = now->spare_chunks;
        Spare *const spare = now->spare;
        const size_t room_spare = now->room_spare;
        const Layers layers = now->layers, before = now->before;
        const int32_t looked_at = now->looked_at;
        at = carry(at, run, offsetof(Run, unmapped), how);
        run->chunks = in_use;
        run->spare_chunks = spare_chunks;
        run->spare = spare;
        run->room_spare = room_spare;
        run->layers = layers;
        run->before = before;
        run->before.first = NULL;
        run->looked_at = looked_at;
    } else {
        at = carry(at, run, offsetof(Run, unmapped), how);
    }
    for (unsigned word = 0; word < run->pools * BINS / 64; word++)
        for (uint64_t filled = run->filled[word]; filled; filled &= filled - 1)
            at = carry(at, &run->bins[64 * word + (unsigned)__builtin_ctzll(filled)], sizeof(Block), how);
    at = carry(at, run->unmapped, run->pools * sizeof(Block), how);
    for (Chunk *chunk = run->chunks; chunk != NULL; chunk = chunk->next)
        at = carry(at, chunk, sizeof(Chunk), how);
    at = carry(at, run->tables, run->tables_bytes, how);
    at = carry(at, run->spare, run->num_spare * sizeof(Spare), how);
    return (size_t)(at - buffer);
}

typedef struct {
    char *start;
    size_t room;
} Copy;

static Copy spare_copies[2 * MOST_ALIKE]; /* memory of copies that nobody needs any more */

static Copy saved(Run *run)
{
    const size_t nbytes = carry_all(run, NULL, COUNT);
    Copy copy = {NULL, 0};
    for (int at = 0; at < 2 * MOST_ALIKE && copy.start == NULL; at++) {
        if (spare_copies[at].room >= nbytes) {
            copy = spare_copies[at];
            spare_copies[at] = (Copy){NULL, 0};
        }
    }
    if (copy.start == NULL)
        copy = (Copy){malloc(nbytes + nbytes / 2), nbytes + nbytes / 2};
    if (copy.start == NULL)
        run->failed = HOST_FULL;
    else
        carry_all(run, copy.start, SAVE);
    return copy;
}

static void let_go(Copy copy)
{
    for (int at = 0; at < 2 * MOST_ALIKE; at++) {
        if (spare_copies[at].start == NULL) {
            spare_copies[at] = copy;
            return;
        }
    }
    free(copy.start);
}

/* -- whether runs go on alike ------------------------------------------------------------------------------------------------------ */

typedef struct {
    int64_t *words;
    size_t number, room;
} Words;

static void add_word(Run *run, Words *words, int64_t word)
{
    if (words->number == words->room) {
        int64_t *moved = realloc(words->words, (2 * words->room + 1024) * sizeof(int64_t));
        if (moved == NULL) {
            run->failed = HOST_FULL;
            return;
        }
        words->words = moved;
        words->room = 2 * words->room + 1024;
    }
    words->words[words->number++] = word;
}

static void add_block(Run *run, Words *words, const Block *block)
{
    add_word(run, words, block->address);
    add_word(run, words, block->size);
    add_word(run, words, block->pool | (block->before == &run->none) << 30 | (block->after == &run->none) << 29);
}

static void add_ring(Run *run, Words *words, const Block *head)
{
    for (const Block *block = head->larger; block != head; block = block->larger)
        add_block(run, words, block);
    add_word(run, words, NONE);
}

/* All that the next step depends on, where the last one has ended: blocks that are cached, unmapped or still wait to be freed. */
static void describe(Run *run, Words *words)
{
    const int64_t totals[] = {run->allocated, run->reserved, run->above, run->below, run->phase};
    words->number = 0;
    for (size_t at = 0; at < sizeof(totals) / sizeof(*totals); at++)
        add_word(run, words, totals[at]);
    for (unsigned word = 0; word < run->pools * BINS / 64; word++)
        for (uint64_t filled = run->filled[word]; filled; filled &= filled - 1)
            add_ring(run, words, &run->bins[64 * word + (unsigned)__builtin_ctzll(filled)]);
    for (unsigned pool = 0; pool < run->pools; pool++)
        add_ring(run, words, &run->unmapped[pool]);
    for (const Block *block = run->outputs.top; block != NULL; block = block->smaller)
        add_block(run, words, block);
    add_word(run, words, NONE);
    for (size_t at = 0; at < run->num_handles; at++) {
        if (run->handles[at] != NULL) {
            add_word(run, words, (int64_t)at);
            add_block(run, words, run->handles[at]);
        }
    }
}
