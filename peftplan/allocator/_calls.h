/* What Python calls: replays of one program and of several. Included by _replay.c. */

/* The next part of the tables, each byte of which is set. */
static void *part(char **at, size_t length, size_t itemsize, int byte)
{
    void *start = *at;
    memset(start, byte, length * itemsize);
    *at += whole((int64_t)(length * itemsize), sizeof(int64_t));
    return start;
}

/* The tables of a run of these programs, for as many storages, slots, handles and phases as any of them has. */
static int prepare(Run *run, Program *programs, int number)
{
    size_t sizes = 0;
    run->pools = 2;
    for (const Program *program = programs; program < programs + number; program++) {
        const Read *read = program->read;
        run->num_storages = read->stacks > run->num_storages ? read->stacks : run->num_storages;
        run->num_slots = read->slots > run->num_slots ? read->slots : run->num_slots;
        run->num_handles = read->num_handles > run->num_handles ? read->num_handles : run->num_handles;
        run->num_phases = read->num_phases > run->num_phases ? read->num_phases : run->num_phases;
        run->pools = read->pools > run->pools ? read->pools : run->pools;
        run->layered |= read->layered;
        sizes += read->segments[read->num_segments - 1].end_size;
    }
    const size_t n = run->num_storages, of_layers = run->layered ? n : 0;
    const size_t most = (run->num_handles + run->num_slots) * sizeof(Block *) + (size_t)(number + 1) * run->num_phases * sizeof(int64_t) +
                        (n + of_layers) * sizeof(Stack) + 3 * of_layers * sizeof(int32_t) + 3 * sizeof(int64_t) +
                        sizes * (sizeof(int64_t) + sizeof(Request));
    if (most > run->tables_room) {
        free(run->tables);
        run->tables = malloc(most);
        run->tables_room = run->tables == NULL ? 0 : most;
        if (run->tables == NULL)
            return 0;
    }
    char *at = run->tables;
    run->handles = part(&at, run->num_handles, sizeof(Block *), 0);
    run->peaks = part(&at, run->num_phases, sizeof(int64_t), 0xFF); /* all NONE */
    run->live = part(&at, n, sizeof(Stack), 0);
    run->own = part(&at, of_layers, sizeof(Stack), 0);
    run->places = part(&at, of_layers, sizeof(int32_t), 0xFF);
    run->handed = part(&at, of_layers, sizeof(int32_t), 0);
    run->open = part(&at, of_layers, sizeof(int32_t), 0);
    run->slots = (Block **)at;
    at += run->num_slots * sizeof(Block *);
    run->tables_bytes = (size_t)(at - run->tables);
    for (Program *program = programs; program < programs + number; program++) {
        const Read *read = program->read;
        const size_t own = read->segments[read->num_segments - 1].end_size;
        program->peaks = part(&at, run->num_phases, sizeof(int64_t), 0xFF);
        program->own_sizes = (int64_t *)at;
        program->requests = (Request *)(program->own_sizes + own);
        at = (char *)(program->requests + own);
        for (size_t size = 0; size < own; size++)
            program->own_sizes[size] = program->sizes[read->size_at[size]];
    }
    for (size_t storage = 0; storage < n; storage++)
        run->live[storage].spare = NONE;
    for (unsigned bin = 0; bin < run->pools * BINS; bin++)
        make_ring(&run->bins[bin]);
    for (unsigned pool = 0; pool < run->pools; pool++)
        make_ring(&run->unmapped[pool]);
    return 1;
}

static Run *kept;  /* of an earlier replay, for its memory */

static Run *new_run(int downwards, int grows, int64_t capacity)
{
    Run *run = kept;
    Chunk *chunks = run == NULL ? NULL : run->chunks;
    char *tables = run == NULL ? NULL : run->tables;
    const size_t room = run == NULL ? 0 : run->tables_room;
    kept = NULL;
    if (run == NULL && posix_memalign((void **)&run, LINE, sizeof(Run)) != 0)
        return NULL;
    memset(run, 0, offsetof(Run, unmapped));
    run->spare_chunks = chunks;
    run->tables = tables;
    run->tables_room = room;
    run->phase = NONE;
    run->above = LARGE_SEGMENT; /* a whole number of pages */
    run->below = TOP;
    run->capacity = capacity;
    run->downwards = downwards;
    run->grows = grows;
    return run;
}

static void clear(Run *run)
{
    void *all[] = {run->spare, run->layers.places, run->before.places};
    for (size_t at = 0; at < sizeof(all) / sizeof(*all); at++)
        free(all[at]);
    while (run->spare_chunks != NULL) {
        Chunk *chunk = run->spare_chunks;
        run->spare_chunks = chunk->next;
        chunk->next = run->chunks;
        run->chunks = chunk;
    }
    if (kept == NULL) {
        kept = run;
        return;
    }
    for (Chunk *chunk = run->chunks, *next; chunk != NULL; chunk = next) {
        next = chunk->next;
        free(chunk);
    }
    free(run->tables);
    free(run);
}

static PyObject *answer(int64_t reserved, const int64_t *peaks, size_t num_phases)
{
    PyObject *all = PyTuple_New((Py_ssize_t)num_phases + 1);
    for (size_t at = 0; all != NULL && at <= num_phases; at++) {
        PyObject *value = PyLong_FromLongLong(at == 0 ? reserved : peaks[at - 1]);
        if (value == NULL || PyTuple_SetItem(all, (Py_ssize_t)at, value) < 0)
            Py_CLEAR(all);
    }
    return all;
}

static PyObject *failure(int failed)
{
    switch (failed) {
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
}

/* A program with its table of sizes; 0, with an exception, where they are none. */
static int read_program(Program *program, PyObject *of_events, PyObject *of_sizes, Py_ssize_t storages, Py_ssize_t handles, Py_ssize_t phases)
{
    char *events, *sizes;
    Py_ssize_t events_bytes, sizes_bytes;
    if (PyBytes_AsStringAndSize(of_events, &events, &events_bytes) < 0 || PyBytes_AsStringAndSize(of_sizes, &sizes, &sizes_bytes) < 0)
        return 0;
    const size_t length = (size_t)events_bytes / sizeof(int64_t);
    if (length % WIDTH || storages < 0 || handles < 0 || phases < 0 || storages >= INT32_MAX || handles >= INT32_MAX || phases >= INT32_MAX) {
        PyErr_SetString(PyExc_ValueError, "no program");
        return 0;
    }
    const Read like = {.num_sizes = (size_t)sizes_bytes / sizeof(int64_t),
                       .num_storages = (size_t)storages,
                       .num_handles = (size_t)handles,
                       .num_phases = (size_t)phases};
    int failed = RUNS;
    const Read *read = find_program(of_events, &like, (const int64_t *)events, length, &failed);
    if (read == NULL) {
        failure(failed);
        return 0;
    }
    *program = (Program){.read = read, .sizes = (const int64_t *)sizes};
    return 1;
}

static PyObject *replay(PyObject *module, PyObject *arguments)
{
    PyObject *events, *sizes;
    Py_ssize_t storages, handles, phases;
    int downwards, grows = 0;
    long long capacity;
    Program program;
    if (!PyArg_ParseTuple(arguments, "SSnnnpL|p:replay", &events, &sizes, &storages, &handles, &phases, &downwards, &capacity, &grows) ||
        !read_program(&program, events, sizes, storages, handles, phases))
        return NULL;
    Run *run = new_run(downwards, grows, capacity);
    if (run == NULL)
        return PyErr_NoMemory();
    if (!prepare(run, &program, 1))
        run->failed = HOST_FULL;
    else
        run_alone(run, &program);
    PyObject *peaks = run->failed ? failure(run->failed) : answer(run->most_reserved, run->peaks, program.read->num_phases);
    clear(run);
    return peaks;
}

static PyObject *replay_several(PyObject *module, PyObject *arguments)
{
    PyObject *all_programs;
    Py_ssize_t few;
    int downwards, grows;
    Program programs[MOST_ALIKE];
    if (!PyArg_ParseTuple(arguments, "O!npp:replay_several", &PyList_Type, &all_programs, &few, &downwards, &grows))
        return NULL;
    const int number = (int)PyList_Size(all_programs);
    if (number < 1 || number > MOST_ALIKE || few < 0) {
        PyErr_SetString(PyExc_ValueError, "no programs");
        return NULL;
    }
    for (int at = 0; at < number; at++) {
        PyObject *events, *sizes;
        Py_ssize_t storages, handles, phases;
        if (!PyArg_ParseTuple(PyList_GetItem(all_programs, at), "SSnnn", &events, &sizes, &storages, &handles, &phases) ||
            !read_program(&programs[at], events, sizes, storages, handles, phases))
            return NULL;
        if (programs[at].read->num_segments != programs[0].read->num_segments || programs[at].read->num_segments > MOST_SEGMENTS)
            Py_RETURN_NONE;
    }
    Run *run = new_run(downwards, grows, -1);
    if (run == NULL)
        return PyErr_NoMemory();
    Together all = {run, programs, number, 0, (size_t)few, compare_all(programs, number)};
    share_events(&all);
    if (!prepare(run, programs, number))
        run->failed = HOST_FULL;
    else
        run_together(&all);
    PyObject *answers = run->failed ? failure(run->failed) : PyList_New(0);
    for (const Program *program = programs; answers != NULL && program < programs + number; program++) {
        PyObject *one = answer(program->reserved, program->peaks, program->read->num_phases);
        if (one == NULL || PyList_Append(answers, one) < 0)
            Py_CLEAR(answers);
        Py_XDECREF(one);
    }
    clear(run);
    return answers;
}
