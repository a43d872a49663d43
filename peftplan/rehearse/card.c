/* Cards whose kernels do nothing and whose memory is address space: enough of the CUDA driver and runtime for torch's CUDA build
 * to run with its own caching allocator, so that every allocation of a step is real and no value is.
 *
 * Copies from a card give zeros, one byte EMULATED_BOOL (1: a mask's `all()` is true), 4 or 8 bytes EMULATED_INT (0: so many
 * places of a mask are true). EMULATED_COUNT (1), EMULATED_CAPABILITY ("8.0"), EMULATED_BYTES (85899345920), EMULATED_CONTEXT
 * (115343360, what the driver holds for a process before its first tensor), EMULATED_MULTIPROCESSORS (108) of EMULATED_THREADS
 * (2048) and EMULATED_NAME ("emulated card") describe the cards. EMULATED_LATE (0): 1 makes the card as late as the program lets it
 * be, see "Time".
 * Processes that are given the same file as EMULATED_SHARED share their memory. */
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#undef cudaGetDeviceProperties

#define GRAIN ((size_t)2 << 20)
#define SPACE ((size_t)1 << 42)
#define CARDS 16
#define PROCESSES 256

static struct { char *at; size_t bytes; } segments[65536];
static int count;
static size_t taken[CARDS], reserved[CARDS];
static char *base;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread cudaError_t last;
static __thread int current;

static long number(const char *name, long otherwise) {
    const char *stated = getenv(name);
    return stated ? atol(stated) : otherwise;
}

static size_t total(void) { return number("EMULATED_BYTES", (long)80 << 30); }
static size_t context(void) { return number("EMULATED_CONTEXT", (long)110 << 20); }

/* CUDA_VISIBLE_DEVICES hides cards, as the real library lets it. */
static int cards(void) {
    int n = number("EMULATED_COUNT", 1), shown = 0;
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    n = n < 1 ? 1 : n > CARDS ? CARDS : n;
    if (!visible) return n;
    for (int entry = 1; *visible && *visible != '-'; visible++)
        if (*visible == ',') entry = 1;
        else if (entry) shown++, entry = 0;
    return shown < n ? shown : n;
}

static int capability(int part) {
    const char *stated = getenv("EMULATED_CAPABILITY");
    if (!stated) stated = "8.0";
    return atoi(part ? strchr(stated, '.') + 1 : stated);
}

/* Resident blocks of a multiprocessor, by compute capability (CUDA C++ Programming Guide, "Technical Specifications"). */
static int most_blocks(void) {
    switch (10 * capability(0) + capability(1)) {
    case 75: case 86: case 87: return 16;
    case 89: case 120: case 121: return 24;
    default: return 32;
    }
}

static int turing(void) { return capability(0) == 7; }
static int on_card(const void *at) { return base && (const char *)at >= base && (const char *)at < base + CARDS * SPACE; }
static int card_of(const void *at) { return ((const char *)at - base) / SPACE; }

static void make_space(void) {
    if (base) return;
    base = mmap(0, CARDS * SPACE + GRAIN, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    base = (char *)(((size_t)base + GRAIN - 1) / GRAIN * GRAIN);
}

/* What each process holds of each card, and whether it has a context there. A process that died holds nothing. */
struct process { int pid; char context[CARDS]; size_t used[CARDS]; };

static struct process *processes(void) {
    static struct process *all;
    if (all) return all;
    size_t bytes = PROCESSES * sizeof *all;
    const char *file = getenv("EMULATED_SHARED");
    int shared = file ? open(file, O_RDWR | O_CREAT | O_CLOEXEC, 0600) : -1;
    if (shared >= 0 && ftruncate(shared, bytes)) shared = -1;
    void *at = mmap(0, bytes, PROT_READ | PROT_WRITE, shared < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, shared, 0);
    if (shared >= 0) close(shared);
    return all = at;
}

static int alive(int pid) { return pid && (!kill(pid, 0) || errno != ESRCH); }

static struct process *own(int card) {
    static struct process *mine, alone;
    struct process *all = processes();
    for (int i = 0; (!mine || mine->pid != getpid()) && i < PROCESSES; i++) {
        int before = all[i].pid;
        if (alive(before) || !__sync_bool_compare_and_swap(&all[i].pid, before, getpid())) continue;
        mine = all + i;
        memset(mine->used, 0, sizeof mine->used);
        memset(mine->context, 0, sizeof mine->context);
    }
    if (!mine) mine = &alone;
    mine->context[card] = 1;
    return mine;
}

static void give_back(int card, size_t bytes) {
    size_t *held = &own(card)->used[card];
    *held -= bytes < *held ? bytes : *held; /* a forked child frees what its parent holds */
}

static size_t used(int card) {
    size_t bytes = 0;
    struct process *all = processes();
    for (int i = 0; i < PROCESSES; i++)
        if (all[i].context[card] && alive(all[i].pid)) bytes += all[i].used[card] + context();
    return bytes;
}

static size_t whole(size_t bytes) { return (bytes + GRAIN - 1) / GRAIN * GRAIN; }

static int full(int card, size_t bytes) {
    own(card);
    return used(card) + bytes > total();
}

/* Segments lie one below the other, as on a real card. */
cudaError_t cudaMalloc(void **at, size_t bytes) {
    pthread_mutex_lock(&lock);
    bytes = whole(bytes);
    make_space();
    last = full(current, bytes) ? cudaErrorMemoryAllocation : cudaSuccess;
    if (!last) {
        taken[current] += bytes;
        own(current)->used[current] += bytes;
        *at = segments[count].at = base + (current + 1) * SPACE - taken[current];
        segments[count++].bytes = bytes;
    }
    pthread_mutex_unlock(&lock);
    return last;
}

/* Expandable segments: addresses are reserved from the bottom, memory is made and mapped there in pieces. */
struct piece { size_t bytes; int card; };

CUresult cuMemAddressReserve(CUdeviceptr *at, size_t bytes, size_t alignment, CUdeviceptr wanted, unsigned long long flags) {
    pthread_mutex_lock(&lock);
    make_space();
    *at = (CUdeviceptr)(base + current * SPACE + reserved[current]);
    reserved[current] += whole(bytes);
    pthread_mutex_unlock(&lock);
    return CUDA_SUCCESS;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t bytes, const CUmemAllocationProp *kind, unsigned long long flags) {
    int card = kind->location.id;
    pthread_mutex_lock(&lock);
    int refused = full(card, whole(bytes));
    if (!refused) {
        struct piece *piece = malloc(sizeof *piece);
        *piece = (struct piece){whole(bytes), card};
        own(card)->used[card] += piece->bytes;
        *handle = (CUmemGenericAllocationHandle)piece;
    }
    pthread_mutex_unlock(&lock);
    return refused ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    struct piece *piece = (struct piece *)handle;
    pthread_mutex_lock(&lock);
    give_back(piece->card, piece->bytes);
    pthread_mutex_unlock(&lock);
    free(piece);
    return CUDA_SUCCESS;
}

cudaError_t cudaFree(void *at) {
    cudaDeviceSynchronize();
    pthread_mutex_lock(&lock);
    for (int i = 0; i < count; i++)
        if (segments[i].at == at) {
            give_back(card_of(at), segments[i].bytes);
            segments[i] = segments[--count];
            break;
        }
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

void emulated_memory(int card, size_t *unused, size_t *all) {
    size_t held = used(card); /* beyond the card, once the context of another process no longer fits */
    *all = total();
    *unused = held < *all ? *all - held : 0;
}

cudaError_t cudaMemGetInfo(size_t *unused, size_t *all) {
    own(current);
    return emulated_memory(current, unused, all), cudaSuccess;
}

static void said(void *to, size_t bytes) {
    memset(to, 0, bytes);
    if (bytes == 1) *(char *)to = number("EMULATED_BOOL", 1);
    if (bytes == 4) *(int *)to = number("EMULATED_INT", 0);
    if (bytes == 8) *(long *)to = number("EMULATED_INT", 0);
}

/* Time. A card is as fast as the host, or, where EMULATED_LATE is 1, as late as it may be: it has done what the host has waited
 * for, what a stream waited for before that, and nothing else. Work is numbered on each stream; a clock tells how far each stream
 * is. So torch's allocator keeps what `record_stream` marks as long as it ever may. */
#define STREAMS 256

struct event { int stream; unsigned long clock[STREAMS]; };
static cudaStream_t streams[STREAMS]; /* the first one is the default stream */
static unsigned long clocks[STREAMS][STREAMS], done[STREAMS];
static int streams_seen = 1;
static pthread_mutex_t time_lock = PTHREAD_MUTEX_INITIALIZER;

static int late(void) {
    static int stated = -1;
    return stated < 0 ? stated = number("EMULATED_LATE", 0) : stated;
}

static int stream_of(cudaStream_t s) {
    int i = 0;
    while (i < streams_seen && streams[i] != s) i++;
    if (i == streams_seen && i < STREAMS) streams[streams_seen++] = s;
    return i < STREAMS ? i : 0;
}

static void reach(unsigned long *clock, const unsigned long *other) {
    for (int i = 0; i < STREAMS; i++)
        if (other[i] > clock[i]) clock[i] = other[i];
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) {
    return *e = (cudaEvent_t)calloc(1, late() ? sizeof(struct event) : 64), cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return free(e), cudaSuccess; }

cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) {
    struct event *event = (struct event *)e;
    if (!late()) return cudaSuccess;
    pthread_mutex_lock(&time_lock);
    event->stream = stream_of(s);
    clocks[event->stream][event->stream]++;
    memcpy(event->clock, clocks[event->stream], sizeof event->clock);
    pthread_mutex_unlock(&time_lock);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return cudaEventRecordWithFlags(e, s, 0); }

static cudaError_t advance(unsigned long *clock, const unsigned long *other) {
    pthread_mutex_lock(&time_lock);
    reach(clock, other);
    pthread_mutex_unlock(&time_lock);
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags) {
    return late() ? advance(clocks[stream_of(s)], ((struct event *)e)->clock) : cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t e) { return late() ? advance(done, ((struct event *)e)->clock) : cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t s) { return late() ? advance(done, clocks[stream_of(s)]) : cudaSuccess; }

cudaError_t cudaDeviceSynchronize(void) {
    for (int i = 0; late() && i < streams_seen; i++) advance(done, clocks[i]);
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t e) {
    struct event *event = (struct event *)e;
    return late() && done[event->stream] < event->clock[event->stream] ? cudaErrorNotReady : cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t s) {
    int i = late() ? stream_of(s) : 0;
    return late() && done[i] < clocks[i][i] ? cudaErrorNotReady : cudaSuccess;
}

/* The last thing that was written to a card: read back from where it was written, it is still there. So DDP's ranks agree on buckets. */
static char written[1 << 20];
static const void *written_at;
static size_t written_bytes;

static int pin_of(const void *at);

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    if (on_card(to)) {
        if (!on_card(from)) {
            written_at = bytes <= sizeof written ? to : 0;
            written_bytes = bytes;
            if (written_at) memcpy(written, from, bytes);
        }
    } else if (!on_card(from)) {
        memcpy(to, from, bytes);
    } else if (from == written_at && bytes == written_bytes) {
        memcpy(to, written, bytes);
    } else {
        said(to, bytes);
    }
    if (on_card(from) && !on_card(to) && pin_of(to) < 0) cudaStreamSynchronize(stream);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    return cudaMemcpyAsync(to, from, bytes, kind, 0);
}

/* Pinned memory of the host. Pages that nothing writes take no memory. */
static struct { char *at; size_t bytes; } pinned[1 << 16];
static int pins;
static size_t pinned_now, pinned_most;

static int pin_of(const void *at) {
    for (int i = pins - 1; i >= 0; i--)
        if ((const char *)at >= pinned[i].at && (const char *)at < pinned[i].at + pinned[i].bytes) return i;
    return -1;
}

static void pin(void *at, size_t bytes) {
    pthread_mutex_lock(&lock);
    if (pins < sizeof pinned / sizeof *pinned) {
        pinned[pins].at = at;
        pinned[pins++].bytes = bytes;
        pinned_now += bytes;
        if (pinned_now > pinned_most) pinned_most = pinned_now;
    }
    pthread_mutex_unlock(&lock);
}

static void unpin(void *at) {
    pthread_mutex_lock(&lock);
    int i = pin_of(at);
    if (i >= 0) {
        pinned_now -= pinned[i].bytes;
        pinned[i] = pinned[--pins];
    }
    pthread_mutex_unlock(&lock);
}

size_t emulated_pinned(void) { return pinned_most; }

cudaError_t cudaHostAlloc(void **at, size_t bytes, unsigned flags) {
    *at = calloc(1, bytes);
    pin(*at, bytes);
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *at) {
    unpin(at);
    free(at);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void *at, size_t bytes, unsigned flags) { return pin(at, bytes), cudaSuccess; }
cudaError_t cudaHostUnregister(void *at) { return unpin(at), cudaSuccess; }

cudaError_t cudaGetDeviceCount(int *n) { return (*n = cards()) ? cudaSuccess : cudaErrorNoDevice; }
cudaError_t cudaGetDevice(int *n) { return *n = current, cudaSuccess; }
cudaError_t cudaSetDevice(int n) { return n < 0 || n >= cards() ? (last = cudaErrorInvalidDevice) : (current = n, cudaSuccess); }
cudaError_t cudaDriverGetVersion(int *n) { return *n = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *n) { return *n = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return last; }

cudaError_t cudaGetLastError(void) {
    cudaError_t error = last;
    last = cudaSuccess;
    return error;
}

const char *cudaGetErrorString(cudaError_t error) { return error == cudaErrorMemoryAllocation ? "out of memory" : "emulated"; }
const char *cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, getenv("EMULATED_NAME") ? getenv("EMULATED_NAME") : "emulated card");
    p->totalGlobalMem = total();
    p->pciDeviceID = 4 + device;
    p->major = capability(0);
    p->minor = capability(1);
    p->multiProcessorCount = number("EMULATED_MULTIPROCESSORS", 108);
    p->maxThreadsPerMultiProcessor = number("EMULATED_THREADS", 2048);
    p->maxBlocksPerMultiProcessor = most_blocks();
    p->sharedMemPerMultiprocessor = turing() ? 65536 : 167936;
    p->sharedMemPerBlockOptin = turing() ? 65536 : 166912;
    p->sharedMemPerBlock = 49152;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->textureAlignment = 512;
    p->unifiedAddressing = p->managedMemory = p->concurrentKernels = 1;
    return cudaSuccess;
}

#if CUDART_VERSION < 13000
cudaError_t cudaGetDeviceProperties_v2(struct cudaDeviceProp *p, int device) { return cudaGetDeviceProperties(p, device); }
#endif

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp p;
    cudaGetDeviceProperties(&p, device);
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *value = 1024; break;
    case cudaDevAttrMaxBlockDimZ: *value = 64; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[1]; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = p.maxBlocksPerMultiProcessor; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = p.regsPerBlock; break;
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = p.regsPerMultiprocessor; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    default: *value = 0;
    }
    return cudaSuccess;
}

/* Handles are told apart by their value alone: workspaces belong to a handle and a stream. */
static void *handle(void) {
    static char *next = (char *)64;
    return next += 64;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) { return *s = handle(), cudaSuccess; }
cudaError_t cudaStreamCreate(cudaStream_t *s) { return *s = handle(), cudaSuccess; }
int cublasCreate_v2(void **h) { return *h = handle(), 0; }
int cublasLtCreate(void **h) { return *h = handle(), 0; }
size_t cublasLtGetVersion(void) { return CUDART_VERSION * 10; }

int cublasLtMatmulAlgoGetHeuristic(void *lt, void *op, void *a, void *b, void *c, void *d, void *p, int most, char *results, int *n) {
    memset(results, 0, 96 * most); /* sizeof(cublasLtMatmulHeuristicResult_t) */
    return *n = 1, 0;
}

/* A stream that captures a graph says so, since torch's allocator gives its tensors a pool of their own. */
static cudaStream_t capturing;
static unsigned long long captures;

cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode) {
    capturing = s;
    captures++;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) {
    capturing = 0;
    return *graph = handle(), cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
    *status = s && s == capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

static cudaError_t capture_info(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id) {
    if (id) *id = captures;
    return cudaStreamIsCapturing(s, status);
}

#if CUDART_VERSION < 13000
cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id,
    cudaGraph_t *graph, const cudaGraphNode_t **before, size_t *n) { return capture_info(s, status, id); }
#else
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id,
    cudaGraph_t *graph, const cudaGraphNode_t **before, const cudaGraphEdgeData **edges, size_t *n) { return capture_info(s, status, id); }
#endif

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
    return *made = handle(), cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *n) { return *n = 1, cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *most) { return *least = 0, *most = -5, cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { return *can = 0, cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { return *ms = 1, cudaSuccess; }
cudaError_t cudaGetSymbolAddress(void **at, const void *symbol) { return *at = handle(), cudaSuccess; }
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *s) { return 1; } /* no launch */
CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned *flags, int *active) { return *flags = 0, *active = 1, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute a, CUdevice d) { return cudaDeviceGetAttribute(value, a, 0), CUDA_SUCCESS; }

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute a, CUfunction f) {
    return *value = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *c) { return *c = handle(), CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *d, int n) { return *d = n, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { return *text = "emulated", CUDA_SUCCESS; }

void **__cudaRegisterFatBinary(void *binary) {
    static void *registered[2];
    return registered;
}

cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) {
    snprintf(id, length, "0000:00:%02x.0", 4 + device);
    return cudaSuccess;
}

/* Of the architectures that torch is compiled for, the newest that the card runs: cub has no code for others. */
static int compiled(void) {
    static const int known[] = {120, 100, 90, 86, 80, 75, 70, 60};
    int card = 10 * capability(0) + capability(1);
    for (int i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i] <= card) return known[i];
    return card;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->binaryVersion = a->ptxVersion = compiled();
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int block, size_t s, unsigned flags) {
    return *n = 2, cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *at) {
    memset(a, 0, sizeof *a);
    a->type = on_card(at) ? cudaMemoryTypeDevice : pin_of(at) >= 0 ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    a->device = on_card(at) ? card_of(at) : 0;
    a->devicePointer = (void *)at;
    return cudaSuccess;
}

static int nothing(void) { return 0; }

cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **f, unsigned version, unsigned long long flags, enum cudaDriverEntryPointQueryResult *result) {
    *f = dlsym(RTLD_DEFAULT, name);
    if (!*f) *f = (void *)nothing;
    if (result) *result = 0;
    return cudaSuccess;
}

/* One process with several cards (DataParallel) sends through NCCL; processes are played by torch's fake backend. */
int ncclGetVersion(int *version) { return *version = 22900, 0; }
const char *ncclGetErrorString(int code) { return code ? "emulated" : "no error"; }
const char *ncclGetLastError(void *comm) { return ""; }

int ncclCommInitAll(void **comms, int n, const int *devices) {
    for (int i = 0; i < n; i++) comms[i] = handle();
    return 0;
}

/* NVML, as monitors ask it. Nobody else uses the cards. */
typedef struct { unsigned long long total, free, used; } nvml_memory;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } nvml_memory_v2;
typedef struct { unsigned gpu, memory; } nvml_utilization;
typedef struct { unsigned pid; unsigned long long bytes; } nvml_process_v1;
typedef struct { unsigned pid; unsigned long long bytes; unsigned instance, part; } nvml_process;

static int card_in(const void *device) { return (int)(size_t)device - 1; }

int nvmlInit_v2(void) { return 0; }
int nvmlInit(void) { return 0; }
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return code ? "emulated: not answered" : "Success"; }
int nvmlDeviceGetCount_v2(unsigned *n) { return *n = number("EMULATED_COUNT", 1), 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned n, void **device) { return *device = (void *)(size_t)(n + 1), 0; }
int nvmlDeviceGetHandleByUUID(const char *id, void **device) { return *device = (void *)(size_t)(atoi(id + 4) + 1), 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **device) { return *device = (void *)(strtoul(strrchr(id, ':') + 1, 0, 16) - 3), 0; }
int nvmlDeviceGetIndex(void *device, unsigned *n) { return *n = card_in(device), 0; }
int nvmlDeviceGetNvLinkRemoteDeviceType(void *device, unsigned link, unsigned *kind) { return 3; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *device, unsigned link, void *info) { return 3; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { return *version = CUDART_VERSION, 0; }
int nvmlSystemGetCudaDriverVersion(int *version) { return *version = CUDART_VERSION, 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned length) { return snprintf(text, length, "580.00"), 0; }
int nvmlDeviceGetUUID(void *device, char *text, unsigned length) { return snprintf(text, length, "GPU-%08d", card_in(device)), 0; }
int nvmlDeviceGetUtilizationRates(void *device, nvml_utilization *rates) { return *rates = (nvml_utilization){100, 0}, 0; }
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *celsius) { return *celsius = 40, 0; }
int nvmlDeviceGetClockInfo(void *device, int kind, unsigned *mhz) { return *mhz = 1000, 0; }
int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) { return *milliwatts = 0, 0; }
int nvmlDeviceGetGpuFabricInfoV(void *device, void *info) { return 0; } // torch asks, and its answer stands: no fabric
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) { return *major = capability(0), *minor = capability(1), 0; }

int nvmlDeviceGetName(void *device, char *text, unsigned length) {
    return snprintf(text, length, "%s", getenv("EMULATED_NAME") ? getenv("EMULATED_NAME") : "emulated card"), 0;
}

int nvmlDeviceGetMemoryInfo(void *device, nvml_memory *memory) {
    size_t unused, all;
    emulated_memory(card_in(device), &unused, &all);
    return *memory = (nvml_memory){all, unused, all - unused}, 0;
}

int nvmlDeviceGetMemoryInfo_v2(void *device, nvml_memory_v2 *memory) {
    size_t unused, all;
    emulated_memory(card_in(device), &unused, &all);
    return *memory = (nvml_memory_v2){memory->version, all, 0, unused, all - unused}, 0;
}

static int show_processes(int card, unsigned *n, void *shown, size_t bytes) {
    unsigned room = *n;
    struct process *all = processes();
    *n = 0;
    for (int i = 0; i < PROCESSES; i++)
        if (all[i].context[card] && alive(all[i].pid)) {
            nvml_process one = {all[i].pid, all[i].used[card] + context(), -1, -1};
            if (*n < room) memcpy((char *)shown + *n * bytes, &one, bytes);
            ++*n;
        }
    return *n > room ? 7 : 0; /* NVML_ERROR_INSUFFICIENT_SIZE */
}

int nvmlDeviceGetComputeRunningProcesses(void *device, unsigned *n, nvml_process_v1 *shown) {
    return show_processes(card_in(device), n, shown, sizeof *shown);
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *n, nvml_process *shown) {
    return show_processes(card_in(device), n, shown, sizeof *shown);
}

int nvmlDeviceGetComputeRunningProcesses_v2(void *device, unsigned *n, nvml_process *shown) {
    return nvmlDeviceGetComputeRunningProcesses_v3(device, n, shown);
}
