/* Runs one program, or several that do the same for a while, such as those of ranks. What they share runs once: the beginning of a segment up to
   where they first differ, and again from the beginning of a segment that they reach with the same blocks. Included by _replay.c. */

typedef struct {
    const Read *read;
    const int64_t *sizes;
    size_t num_sizes;
    const Event *events[MOST_SEGMENTS]; /* of each segment: those of the first program that has the same */
    int64_t *own_sizes; /* of all its segments, in the order in which they name them */
    Request *requests;
    size_t requested; /* segments of which the requests are there */
    int start; /* as which program it began the segment: with the same blocks */
    int64_t reserved, *peaks;
} Program;

typedef struct {
    Run *run;
    Program *programs;
    int number;
    size_t segment, few; /* few: so many events take no longer than a copy */
    const int32_t (*alike)[MOST_SEGMENTS][MOST_ALIKE]; /* events with which a segment of two programs begins alike */
} Together;

/* -- programs ----------------------------------------------------------------------------------------------------------------------- */

static size_t length_of(const Program *program, size_t segment)
{
    return program->read->segments[segment].end - program->read->segments[segment].begin;
}

/* The sizes that a segment names, as the allocator rounds them, for the events that follow. */
static void take_sizes(Run *run, Program *program, size_t segment)
{
    const Segment *of = &program->read->segments[segment];
    if (program->requested <= segment)
        make_requests(run, program->own_sizes + of->first_size, program->requests + of->first_size, of->end_size - of->first_size);
    program->requested = segment + 1;
    run->sizes = program->own_sizes + of->first_size;
    run->requests = program->requests + of->first_size;
}

static void run_alone(Run *run, Program *program)
{
    for (size_t segment = 0; segment < program->read->num_segments; segment++) {
        const Segment *of = &program->read->segments[segment];
        take_sizes(run, program, segment);
        run_events(run, program->read->events + of->begin, program->read->events + of->end);
    }
    close_phase(run);
}

/* How many events of two programs' segment are the same, with the same sizes; one more where all are. */
static size_t in_common(const Together *all, int one, int other)
{
    const Program *a = &all->programs[one], *b = &all->programs[other];
    const Segment *of_a = &a->read->segments[all->segment], *of_b = &b->read->segments[all->segment];
    size_t same = (size_t)all->alike[one][all->segment][other];
    const size_t sizes_a = of_a->end_size - of_a->first_size, sizes_b = of_b->end_size - of_b->first_size;
    for (size_t at = 0; at < sizes_a && at < sizes_b; at++) {
        const size_t named_at = (size_t)a->read->named_at[of_a->first_size + at];
        if (named_at >= same)
            break;
        if (a->own_sizes[of_a->first_size + at] != b->own_sizes[of_b->first_size + at])
            return named_at;
    }
    return same + (same == length_of(a, all->segment) && same == length_of(b, all->segment));
}

/* The beginning of a segment: what came before is noted, and counts no more. */
static void begin_segment(Run *run)
{
    memset(run->peaks, 0xFF, run->num_phases * sizeof(int64_t)); /* all NONE */
    run->most_reserved = run->reserved;
    run->peak = run->allocated;
    run->had_events = 0;
}

static void note_peaks(Run *run, Program *program)
{
    for (size_t phase = 0; phase < run->num_phases; phase++)
        if (run->peaks[phase] > program->peaks[phase])
            program->peaks[phase] = run->peaks[phase];
    if (run->most_reserved > program->reserved)
        program->reserved = run->most_reserved;
}

/* What the programs that end a segment alike have reached: the first of those that end it with the same blocks. */
typedef struct {
    int next[MOST_ALIKE];
    Copy at[MOST_ALIKE];
    Words words[MOST_ALIKE];
} Ends;

static void end_segment(Together *all, const int *members, int number, Ends *ends, int is_last)
{
    Run *run = all->run;
    close_phase(run);
    for (int at = 0; at < number; at++)
        note_peaks(run, &all->programs[members[at]]);
    if (is_last)
        return;
    const int own = members[0];
    int same = 0;
    describe(run, &ends->words[own]);
    for (; same < all->number; same++)
        if (ends->at[same].start != NULL && ends->words[same].number == ends->words[own].number &&
            memcmp(ends->words[same].words, ends->words[own].words, ends->words[own].number * sizeof(int64_t)) == 0)
            break;
    if (same == all->number) {
        same = own;
        ends->at[own] = saved(run);
    }
    for (int at = 0; at < number; at++)
        ends->next[members[at]] = same;
}

/* Run a segment of programs that have run alike so far, up to its event `from`. */
static void run_members(Together *all, const int *members, int number, size_t from, Ends *ends, int is_last)
{
    Run *run = all->run;
    Program *first = &all->programs[members[0]];
    size_t until = length_of(first, all->segment);
    for (int at = 1; at < number; at++) {
        const size_t same = in_common(all, members[0], members[at]);
        if (same < until)
            until = same;
    }
    int together = 1;
    for (int at = 1; at < number; at++)
        together += in_common(all, members[0], members[at]) > until;
    take_sizes(run, first, all->segment);
    run_events(run, first->events[all->segment] + from, first->events[all->segment] + until);
    if (run->failed)
        return;
    if (together == number && until == length_of(first, all->segment)) {
        end_segment(all, members, number, ends, is_last);
        return;
    }
    int left[MOST_ALIKE], num_left = number; /* what shares few further events runs them alone: a copy would take longer */
    const Copy fork = saved(run);
    memcpy(left, members, (size_t)number * sizeof(int));
    while (num_left > 0 && !run->failed) {
        int part[MOST_ALIKE], others[MOST_ALIKE], num_part = 0, num_others = 0;
        const size_t length = length_of(&all->programs[left[0]], all->segment);
        for (int at = 0; at < num_left; at++) {
            if (at == 0 || in_common(all, left[0], left[at]) > until + (length > until + all->few ? all->few : length - until))
                part[num_part++] = left[at];
            else
                others[num_others++] = left[at];
        }
        if (num_left < number)
            carry_all(run, fork.start, RESTORE);
        run_members(all, part, num_part, until, ends, is_last);
        memcpy(left, others, (size_t)num_others * sizeof(int));
        num_left = num_others;
    }
    let_go(fork);
}

static void run_together(Together *all)
{
    const size_t segments = all->programs[0].read->num_segments;
    Copy starts[MOST_ALIKE] = {{NULL, 0}};
    Ends ends = {.next = {0}};
    for (all->segment = 0; all->segment < segments && !all->run->failed; all->segment++) {
        for (int start = 0; start < all->number && !all->run->failed; start++) {
            int members[MOST_ALIKE], number = 0;
            for (int at = 0; at < all->number; at++)
                if (all->programs[at].start == start)
                    members[number++] = at;
            if (number == 0)
                continue;
            if (starts[start].start != NULL)
                carry_all(all->run, starts[start].start, RESTORE);
            begin_segment(all->run);
            run_members(all, members, number, 0, &ends, all->segment + 1 == segments);
        }
        for (int at = 0; at < all->number; at++) {
            let_go(starts[at]);
            starts[at] = ends.at[at];
            ends.at[at] = (Copy){NULL, 0};
            all->programs[at].start = ends.next[at];
        }
    }
    for (int at = 0; at < all->number; at++) {
        let_go(starts[at]);
        free(ends.words[at].words);
    }
}

/* -- with how many events the segments of programs begin alike --------------------------------------------------------------------------- */

static struct {
    int number;
    uint64_t programs[MOST_ALIKE];
    int32_t alike[MOST_ALIKE][MOST_SEGMENTS][MOST_ALIKE];
} compared[4];
static unsigned latest_compared;

static int32_t compare(const Read *one, const Read *other, size_t segment)
{
    const Segment *a = &one->segments[segment], *b = &other->segments[segment];
    size_t same = 0;
    while (a->begin + same < a->end && b->begin + same < b->end &&
           memcmp(&one->events[a->begin + same], &other->events[b->begin + same], sizeof(Event)) == 0)
        same++;
    return (int32_t)same;
}

static const int32_t (*compare_all(const Program *programs, int number))[MOST_SEGMENTS][MOST_ALIKE]
{
    for (unsigned known = 0; known < sizeof(compared) / sizeof(*compared); known++) {
        int at = 0;
        while (at < number && compared[known].number == number && compared[known].programs[at] == programs[at].read->number)
            at++;
        if (at == number)
            return compared[known].alike;
    }
    latest_compared = (latest_compared + 1) % (sizeof(compared) / sizeof(*compared));
    compared[latest_compared].number = number;
    for (int one = 0; one < number; one++) {
        compared[latest_compared].programs[one] = programs[one].read->number;
        for (int other = 0; other < one; other++) {
            for (size_t segment = 0; segment < programs[0].read->num_segments; segment++) {
                const int32_t same = compare(programs[one].read, programs[other].read, segment);
                compared[latest_compared].alike[one][segment][other] = compared[latest_compared].alike[other][segment][one] = same;
            }
        }
    }
    return compared[latest_compared].alike;
}

/* Segments that are the same in several programs are read from the first of these, so that they stay in the processor's cache. */
static void share_events(Together *all)
{
    for (int own = 0; own < all->number; own++) {
        Program *program = &all->programs[own];
        for (size_t segment = 0; segment < program->read->num_segments; segment++) {
            const size_t length = length_of(program, segment);
            int first = 0;
            while (first < own && (length_of(&all->programs[first], segment) != length || (size_t)all->alike[own][segment][first] != length))
                first++;
            const Read *read = all->programs[first].read;
            program->events[segment] = read->events + read->segments[segment].begin;
        }
    }
}
