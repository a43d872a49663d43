/* The bytes of a step's tensors and the level of its events, from its structure: `Waves.peaks` and `Timeline.requested` in peftplan/memory, which
   add up the same. Included by _replay.c. */

#define MOST_BYTES ((int64_t)1 << 44)  /* of one move of the level; at most MOST_EVENTS of them stay within 64 bits */
#define MOST_EVENTS ((int64_t)1 << 18)

/* The structure is written by peftplan/memory/packed_waves.py: these counts, then the tables in this order. */
enum { PRODUCTS, SIZES, KINDS, MOVES, WAVES, STRETCHES, WINDOWS, LENGTH, COUNTS };

typedef struct {
    const int32_t *up, *down, *climb; /* pairs of a move and how often it comes; moves in order */
    int32_t ups, downs, climbs, length;
    int64_t top, net;
} Wave;

typedef struct {
    const int32_t *waves;
    int32_t number, length, where;
    int64_t top, rise;
} Stretch;

static int64_t sum_of(const int32_t *pairs, int32_t number, const int64_t *moves)
{
    int64_t sum = 0;
    for (int32_t at = 0; at < number; at++)
        sum += pairs[2 * at + 1] * moves[pairs[2 * at]];
    return sum;
}

/* The events of a window before the top of one of its stretches; tensors without bytes make no top. */
static int64_t events_to(const int32_t *numbers, int32_t at, const Stretch *stretches, const Wave *waves, const int64_t *moves)
{
    const Stretch *stretch = &stretches[numbers[at]];
    const Wave *last = &waves[stretch->waves[stretch->where]];
    int64_t events = 0;
    int32_t climbs = last->climbs;
    for (int32_t before = 0; before < at; before++)
        events += stretches[numbers[before]].length;
    for (int32_t before = 0; before < stretch->where; before++)
        events += waves[stretch->waves[before]].length;
    while (climbs > 0 && moves[last->climb[climbs - 1]] == 0)
        climbs--;
    return events + climbs;
}

static PyObject *of_windows(const int32_t *at, const int32_t *counts, int64_t level, Wave *waves, Stretch *stretches, const int64_t *moves)
{
    for (Wave *wave = waves; wave < waves + counts[WAVES]; wave++) {
        *wave = (Wave){.ups = at[0], .downs = at[1], .climbs = at[2], .length = at[3]};
        wave->up = at + 4;
        wave->down = wave->up + 2 * wave->ups;
        wave->climb = wave->down + 2 * wave->downs;
        at = wave->climb + wave->climbs;
        wave->top = sum_of(wave->up, wave->ups, moves);
        wave->net = wave->top + sum_of(wave->down, wave->downs, moves);
    }
    for (Stretch *stretch = stretches; stretch < stretches + counts[STRETCHES]; stretch++) {
        *stretch = (Stretch){.number = at[0], .length = at[1], .waves = at + 2};
        at += 2 + stretch->number;
        for (int32_t number = 0; number < stretch->number; number++) {
            const Wave *wave = &waves[stretch->waves[number]];
            if (stretch->rise + wave->top > stretch->top) {
                stretch->top = stretch->rise + wave->top;
                stretch->where = number;
            }
            stretch->rise += wave->net;
        }
    }
    PyObject *all = PyList_New(0);
    for (int32_t window = 0; all != NULL && window < counts[WINDOWS]; window++) {
        const int32_t number = at[0], *numbers = at + 1;
        int64_t best = level;
        int32_t where = NONE;
        for (int32_t place = 0; place < number; place++) {
            const Stretch *stretch = &stretches[numbers[place]];
            if (level + stretch->top > best) {
                best = level + stretch->top;
                where = place;
            }
            level += stretch->rise;
        }
        at += 1 + number;
        const int64_t events = where == NONE ? 0 : events_to(numbers, where, stretches, waves, moves);
        PyObject *one = Py_BuildValue("(LL)", (long long)best, (long long)events);
        if (one == NULL || PyList_Append(all, one) < 0)
            Py_CLEAR(all);
        Py_XDECREF(one);
    }
    return all;
}

/* levels(structure, bytes of each size, products of named sizes, standing) -> (bytes of each kind, [(highest level, events), ...] of each window),
   or None where 64 bits may not hold a level. */
static PyObject *levels(PyObject *module, PyObject *arguments)
{
    PyObject *of_structure, *of_sizes, *of_products;
    char *structure, *sizes, *products;
    Py_ssize_t structure_bytes, sizes_bytes, products_bytes;
    long long standing;
    if (!PyArg_ParseTuple(arguments, "SSSL:levels", &of_structure, &of_sizes, &of_products, &standing) ||
        PyBytes_AsStringAndSize(of_structure, &structure, &structure_bytes) < 0 ||
        PyBytes_AsStringAndSize(of_sizes, &sizes, &sizes_bytes) < 0 ||
        PyBytes_AsStringAndSize(of_products, &products, &products_bytes) < 0)
        return NULL;
    const int32_t *counts = (const int32_t *)structure, *product_of = counts + COUNTS;
    if (structure_bytes < (Py_ssize_t)(COUNTS * sizeof(int32_t)) || structure_bytes != (Py_ssize_t)(counts[LENGTH] * sizeof(int32_t)) ||
        sizes_bytes != (Py_ssize_t)(counts[SIZES] * sizeof(int64_t)) ||
        products_bytes != (Py_ssize_t)(counts[PRODUCTS] * sizeof(int64_t))) {
        PyErr_SetString(PyExc_ValueError, "no structure of a step");
        return NULL;
    }
    const int32_t *size_of = product_of + counts[SIZES], *moved = size_of + counts[KINDS];
    int64_t *table = malloc((size_t)(counts[SIZES] + counts[KINDS] + counts[MOVES] + 1) * sizeof(int64_t));
    Wave *waves = malloc((size_t)counts[WAVES] * sizeof(Wave) + 1);
    Stretch *stretches = malloc((size_t)counts[STRETCHES] * sizeof(Stretch) + 1);
    int64_t *kinds = table + counts[SIZES], *moves = kinds + counts[KINDS];
    PyObject *windows = NULL, *answer = NULL;
    int within = table != NULL && waves != NULL && stretches != NULL && standing < MOST_BYTES * MOST_EVENTS / 2;
    for (int32_t at = 0; within && at < counts[SIZES]; at++)
        within = !__builtin_mul_overflow(((const int64_t *)sizes)[at], ((const int64_t *)products)[product_of[at]], &table[at]) &&
                 table[at] >= 0 && table[at] < MOST_BYTES;
    for (int32_t at = 0; within && at < counts[KINDS]; at++)
        kinds[at] = table[size_of[at]];
    for (int32_t at = 0; within && at < counts[MOVES]; at++) {
        moves[at] = moved[2 * at + 1] * whole(table[moved[2 * at]], MIN_BLOCK);
        within = moves[at] < MOST_BYTES && moves[at] > -MOST_BYTES;
    }
    if (within)
        windows = of_windows(moved + 2 * counts[MOVES], counts, standing, waves, stretches, moves);
    if (windows != NULL)
        answer = Py_BuildValue("(NN)", PyBytes_FromStringAndSize((const char *)kinds, counts[KINDS] * (Py_ssize_t)sizeof(int64_t)), windows);
    free(table);
    free(waves);
    free(stretches);
    if (within)
        return answer;
    Py_RETURN_NONE;
}
