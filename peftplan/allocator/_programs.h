/* Programs as they run: cut behind the end of each step, and in each of these segments with sizes, storages and slots numbered in the order in
   which it names them. So two programs whose steps do the same have the same events there, whatever they did before. Included by _replay.c. */

/* One or more steps: events, and the sizes that they name. */
typedef struct {
    size_t begin, end, first_size, end_size;
} Segment;

/* The programs that were read last: a job at many sizes replays one, or that of each rank. */
typedef struct {
    PyObject *bytes;
    size_t num_sizes, num_storages, num_handles, num_phases; /* of the tables in which its operands are places */
    Event *events;
    Segment *segments;
    int32_t *size_at; /* where in the table of sizes are those of all segments */
    int32_t *named_at; /* the event that names each of them first, from the beginning of its segment */
    size_t num_segments, stacks, slots;
    unsigned pools;
    int layered;
    uint64_t used, number; /* when it was last looked for; of the program */
} Read;

#define MOST_READ (4 * MOST_ALIKE)

static Read programs_read[MOST_READ];
static uint64_t looked_for;

static void forget(Read *read)
{
    free(read->events);
    free(read->segments);
    free(read->size_at);
    free(read->named_at);
    Py_XDECREF(read->bytes);
    *read = (Read){0};
}

/* Whether the operands of an event are places in the tables. */
static int fits(const Read *read, const Event *event)
{
    const size_t a = (size_t)event->a, b = (size_t)event->b, c = (size_t)event->c;
    switch (event->what) {
    case OWN:
    case FREE:
    case ADD:
        return a < read->num_storages && b < read->num_sizes;
    case END_OWN:
    case OUTPUTS:
    case LEAVE:
        return a < read->num_storages;
    case MAKE:
        return a < read->num_storages && b < read->num_sizes && event->d < STREAMS;
    case HAND:
        return a < read->num_storages && b < read->num_storages && c < read->num_sizes;
    case TAKE:
        return a < read->num_sizes;
    case HOLD:
        return a < read->num_handles && b < read->num_sizes;
    case LET_GO:
        return a < read->num_handles;
    case PHASE:
        return a < read->num_phases;
    case REPEAT:
        return a > 0;
    default:
        return event->what == LAYER || event->what == END_OUTPUTS || event->what == EMPTY || event->what == END;
    }
}

/* Read the events of a program, each in 16 bytes. */
static int read_events(Read *read, const int64_t *from, size_t length)
{
    Event *event = read->events;
    for (const int64_t *end = from + length; from < end; from += WIDTH, event++) {
        if ((from[0] | from[1] | from[2] | from[3] | from[4]) < 0)
            return MALFORMED;
        if ((from[1] | from[2] | from[3]) > INT32_MAX || (from[0] | from[4]) > UINT16_MAX)
            return TOO_LARGE;
        *event = (Event){(int32_t)from[1], (int32_t)from[2], (int32_t)from[3], (uint16_t)from[0], (uint16_t)from[4]};
        if (!fits(read, event))
            return MALFORMED;
        if (event->what == MAKE && 2 * (unsigned)event->d >= read->pools)
            read->pools = 2 * (unsigned)event->d + 2;
        read->layered |= event->what == OWN || event->what == END_OWN || event->what == HAND || event->what == REPEAT;
    }
    return RUNS;
}

/* Where an event names a size; NULL where it does not. */
static int32_t *size_of(Event *event)
{
    switch (event->what) {
    case TAKE:
        return &event->a;
    case HOLD:
    case MAKE:
    case ADD:
    case FREE:
    case OWN:
        return &event->b;
    case HAND:
        return &event->c;
    default:
        return NULL;
    }
}

/* Number the sizes of a segment in the order in which it names them. `numbers`: of each size, NONE before. */
static void number_sizes(Read *read, Segment *segment, int32_t *numbers)
{
    segment->end_size = segment->first_size;
    for (size_t at = segment->begin; at < segment->end; at++) {
        int32_t *size = size_of(&read->events[at]);
        if (size == NULL)
            continue;
        if (numbers[*size] == NONE) {
            read->size_at[segment->end_size] = *size;
            read->named_at[segment->end_size] = (int32_t)(at - segment->begin);
            numbers[*size] = (int32_t)(segment->end_size++ - segment->first_size);
        }
        *size = numbers[*size];
    }
    for (size_t at = segment->first_size; at < segment->end_size; at++)
        numbers[read->size_at[at]] = NONE;
}

/* Of a storage in a segment: how often it is made and freed, whether it is more than one tensor, and its number. */
typedef struct {
    int32_t made, freed, several, number;
} Use;

static int names_storage(const Event *event)
{
    return event->what == MAKE || event->what == FREE || event->what == ADD || event->what == OUTPUTS || event->what == LEAVE;
}

/* Give each storage that is one tensor a slot from when it is made until it is freed, and number the others. `spare`: for their slots. */
static void number_storages(Read *read, const Segment *segment, Use *uses, int32_t *spare)
{
    size_t stacks = 0, slots = 0, num_spare = 0;
    for (Event *event = read->events + segment->begin; event < read->events + segment->end; event++) {
        if (!names_storage(event))
            continue;
        Use *use = &uses[event->a];
        use->several |= (event->what != MAKE && event->what != FREE) || event->c != 1 || (event->what == FREE && use->made == 0);
        use->made += event->what == MAKE;
        use->freed += event->what == FREE;
        use->several |= use->made > 1 || use->freed > 1;
        use->number = NONE;
    }
    for (Event *event = read->events + segment->begin; event < read->events + segment->end; event++) {
        if (!names_storage(event))
            continue;
        Use *use = &uses[event->a];
        const int one = !use->several && use->freed == 1;
        if (use->number == NONE)
            use->number = one ? num_spare ? spare[--num_spare] : (int32_t)slots++ : (int32_t)stacks++;
        event->a = use->number;
        if (one && event->what == FREE) {
            spare[num_spare++] = use->number;
            event->what = FREE_ONE;
            event->b = 0;
        } else if (one) {
            event->what = event->d ? MAKE_THERE : MAKE_ONE;
        }
    }
    if (stacks > read->stacks)
        read->stacks = stacks;
    if (slots > read->slots)
        read->slots = slots;
}

/* Cut a program, and number what its segments name. Layers that run again are known by how their storages are numbered: those stay. */
static int number(Read *read, size_t length)
{
    size_t ends = 1;
    for (size_t at = 0; at < length && !read->layered; at++)
        ends += read->events[at].what == END;
    const size_t most = ends * read->num_sizes < length ? ends * read->num_sizes : length;
    int32_t *numbers = malloc(read->num_sizes * sizeof(int32_t) + 1), *spare = malloc(read->num_storages * sizeof(int32_t) + 1);
    Use *uses = malloc(read->num_storages * sizeof(Use) + 1);
    read->segments = malloc(ends * sizeof(Segment));
    read->size_at = malloc(most * sizeof(int32_t) + 1);
    read->named_at = malloc(most * sizeof(int32_t) + 1);
    const int enough = numbers && spare && uses && read->segments && read->size_at && read->named_at;
    if (enough)
        memset(numbers, 0xFF, read->num_sizes * sizeof(int32_t));
    size_t begin = 0, first_size = 0;
    while (enough && (begin < length || read->num_segments == 0)) {
        Segment *segment = &read->segments[read->num_segments++];
        size_t end = begin;
        while (end < length && (read->layered || read->events[end].what != END))
            end++;
        *segment = (Segment){begin, end + (end < length), first_size, first_size};
        number_sizes(read, segment, numbers);
        if (!read->layered) {
            memset(uses, 0, read->num_storages * sizeof(Use));
            number_storages(read, segment, uses, spare);
        }
        begin = segment->end;
        first_size = segment->end_size;
    }
    if (read->layered)
        read->stacks = read->num_storages;
    free(numbers);
    free(spare);
    free(uses);
    return enough ? RUNS : HOST_FULL;
}

/* A program as it was read before, or is now; NULL, with why in `failed`, where it cannot be. */
static const Read *find_program(PyObject *bytes, const Read *like, const int64_t *from, size_t length, int *failed)
{
    Read *oldest = programs_read;
    looked_for++;
    for (Read *read = programs_read; read < programs_read + MOST_READ; read++) {
        if (read->used < oldest->used)
            oldest = read;
        if (read->bytes == bytes && read->num_sizes == like->num_sizes && read->num_storages == like->num_storages &&
            read->num_handles == like->num_handles && read->num_phases == like->num_phases) {
            read->used = looked_for;
            return read;
        }
    }
    forget(oldest);
    *oldest = *like;
    oldest->pools = 2; /* of the default stream */
    oldest->events = malloc(length / WIDTH * sizeof(Event) + 1);
    *failed = oldest->events == NULL ? HOST_FULL : read_events(oldest, from, length);
    if (!*failed)
        *failed = number(oldest, length / WIDTH);
    if (*failed) {
        forget(oldest);
        return NULL;
    }
    Py_INCREF(bytes);
    oldest->bytes = bytes;
    oldest->used = oldest->number = looked_for;
    return oldest;
}
