/* Programs that begin with the same events, such as those of ranks whose optimizers have states of unlike tensors. These events run once; what
   follows runs for each program from a copy of the blocks as they were then. Events that all end with are read from the first one, so that they
   stay in the processor's cache. Included by _replay.c. */

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

/* The bytes of all that changes while events run, copied to a buffer or back. `chunks`: how many there were when they were copied. */
static size_t carry_all(Run *run, char *buffer, size_t chunks, int how)
{
    char *at = buffer;
    if (how == RESTORE) {
        for (unsigned word = 0; word < run->pools * BINS / 64; word++)
            for (uint64_t filled = run->filled[word]; filled; filled &= filled - 1)
                make_ring(&run->bins[64 * word + (unsigned)__builtin_ctzll(filled)]);
        size_t further = 0;
        for (Chunk *chunk = run->chunks; chunk != NULL; chunk = chunk->next)
            further++;
        for (further -= chunks; further > 0; further--) {
            Chunk *chunk = run->chunks;
            run->chunks = chunk->next;
            chunk->next = run->spare_chunks;
            run->spare_chunks = chunk;
        }
        const Run now = {.chunks = run->chunks, .spare_chunks = run->spare_chunks, .spare = run->spare, .room_spare = run->room_spare,
                         .layers = run->layers, .before = run->before, .looked_at = run->looked_at};
        at = carry(at, run, offsetof(Run, unmapped), how);
        run->chunks = now.chunks;
        run->spare_chunks = now.spare_chunks;
        run->spare = now.spare;
        run->room_spare = now.room_spare;
        run->layers = now.layers;
        run->before = now.before;
        run->before.first = NULL;
        run->looked_at = now.looked_at;
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

/* -- Python ------------------------------------------------------------------------------------------------------------------------ */

/* One of the programs: its events, and its table of sizes. */
typedef struct {
    const Event *events;
    size_t length;
    const int64_t *sizes;
    size_t num_sizes;
} Program;

/* Run programs of which the first `prefix` events are the same, and the last `suffix`. Adds a tuple for each to `answers`. */
static void run_alike(Run *run, const Program *programs, size_t number, size_t prefix, size_t suffix, PyObject *answers)
{
    const Event *end = programs[0].events + programs[0].length;
    char *saved = NULL;
    size_t chunks = 0;
    for (size_t at = 0; at < number && !run->failed; at++) {
        const Program *program = &programs[at];
        if (at == 0) {
            run_events(run, program->events, program->events + prefix);
            for (const Chunk *chunk = run->chunks; chunk != NULL; chunk = chunk->next)
                chunks++;
            if (!run->failed && (saved = malloc(carry_all(run, NULL, chunks, COUNT))) == NULL)
                run->failed = HOST_FULL;
            if (!run->failed)
                carry_all(run, saved, chunks, SAVE);
        } else {
            carry_all(run, saved, chunks, RESTORE);
            run->sizes = program->sizes;
            run->num_sizes = program->num_sizes;
            make_requests(run);
        }
        run_events(run, program->events + prefix, program->events + program->length - suffix);
        run_events(run, end - suffix, end);
        close_phase(run);
        PyObject *peaks = run->failed ? NULL : answer(run);
        if (!run->failed && (peaks == NULL || PyList_Append(answers, peaks) < 0))
            run->failed = HOST_FULL;
        Py_XDECREF(peaks);
    }
    free(saved);
}

static PyObject *replay_alike(PyObject *module, PyObject *arguments)
{
    PyObject *all_events, *all_sizes;
    Py_ssize_t prefix, suffix, same_sizes, storages, handles, phases;
    int downwards, grows;
    if (!PyArg_ParseTuple(arguments, "O!O!nnnnnnpp:replay_alike", &PyList_Type, &all_events, &PyList_Type, &all_sizes, &prefix, &suffix,
                          &same_sizes, &storages, &handles, &phases, &downwards, &grows))
        return NULL;
    const Py_ssize_t number = PyList_Size(all_events);
    if (number < 1 || number > MOST_ALIKE || PyList_Size(all_sizes) != number || prefix < 0 || suffix < 0 || same_sizes < 0) {
        PyErr_SetString(PyExc_ValueError, "no programs");
        return NULL;
    }
    PyObject *answers = PyList_New(0);
    Run *run = answers == NULL ? NULL : new_run();
    Program programs[MOST_ALIKE];
    if (run == NULL) {
        Py_XDECREF(answers);
        return PyErr_NoMemory();
    }
    begin_run(run, storages, handles, phases, downwards, grows, -1);
    for (Py_ssize_t at = 0; at < number && !run->failed; at++) {
        char *events, *sizes;
        Py_ssize_t events_bytes, sizes_bytes;
        PyObject *events_object = PyList_GetItem(all_events, at);
        if (PyBytes_AsStringAndSize(events_object, &events, &events_bytes) < 0 ||
            PyBytes_AsStringAndSize(PyList_GetItem(all_sizes, at), &sizes, &sizes_bytes) < 0) {
            PyErr_Clear();
            run->failed = MALFORMED;
            break;
        }
        const size_t length = (size_t)events_bytes / sizeof(int64_t);
        run->num_sizes = (size_t)sizes_bytes / sizeof(int64_t);
        find_events(run, events_object, (const int64_t *)events, length);
        programs[at] = (Program){run->events, length / WIDTH, (const int64_t *)sizes, run->num_sizes};
        if ((size_t)(prefix + suffix) > programs[at].length || (size_t)same_sizes > run->num_sizes ||
            memcmp(programs[at].sizes, programs[0].sizes, (size_t)same_sizes * sizeof(int64_t)) != 0)
            run->failed = MALFORMED;
    }
    for (Py_ssize_t at = 0; at < number && !run->failed; at++)
        if (programs[at].num_sizes > run->num_sizes)
            run->num_sizes = programs[at].num_sizes;
    const size_t most_sizes = run->num_sizes;
    run->sizes = programs[0].sizes;
    run->num_sizes = programs[0].num_sizes;
    if (!run->failed && !prepare(run, most_sizes))
        run->failed = HOST_FULL;
    if (!run->failed)
        run_alike(run, programs, (size_t)number, (size_t)prefix, (size_t)suffix, answers);
    const int failed = run->failed;
    clear(run);
    if (!failed)
        return answers;
    Py_DECREF(answers);
    PyErr_Clear();
    Py_RETURN_NONE;
}
