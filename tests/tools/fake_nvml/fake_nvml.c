/* fake_nvml: a scripted libnvidia-ml.so.1, so that the real nvidia-ml-py runs on machines without a GPU.
 *
 * Build: gcc -shared -fPIC -O1 -Wall -Wextra -Werror -Wl,-soname,libnvidia-ml.so.1 -o libnvidia-ml.so.1 fake_nvml.c -lpthread
 *
 * The environment of the process that loads it names
 *   FAKE_NVML_SCRIPT   the script (below); read again whenever it was replaced
 *   FAKE_NVML_CLOCK    a file with "now" in seconds; without it, the seconds since the library was loaded
 *   FAKE_NVML_WORKERS  a directory of files "<gpu>.<pid>" that hold "<MiB> <sm percent>": memory and utilisation follow the
 *                      living processes among them; the dead have given everything back
 *   FAKE_NVML_LOG      a file that gets one line "<pid> <function>" for every call
 *
 * In force are all lines up to now; a later line goes over an earlier one.
 *   at <seconds>
 *   driver <version>
 *   gpu <i> <uuid> <pci bus id> <total MiB> <reserved MiB> <name ...>
 *   set <i> <key>=<number> ...              keys: see `keys` below; "n/a" makes the functions that tell it answer NOT_SUPPORTED
 *   proc <i> <pid> <MiB> <sm percent>       somebody else's process; "n/a" for memory that the driver does not tell
 *   fail <function|*> <nvmlReturn_t> [i]    every call (that is about GPU i) answers so
 *   hang <function|*> <ms> [i]              ... takes so long
 *   crash <function|*> [i]                  ... is a segmentation fault
 *   heal                                    none of the faults so far
 *   gone <i>                                fallen off the bus: GPU_IS_LOST; who opens the library from now on does not find it
 *   xid <i> <code> <serial>                 an event, told once to whoever was registered before; serials ascend
 *
 * As with the real library, which GPUs there are is found out when it is opened: one that went and came back is lost until then.
 * Layouts follow nvml.h of NVML API 13. Not here: MIG instances, vGPU, NVLink, setters.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

typedef unsigned long long u64;
enum { GPUS = 16, PROCESSES = 128, FAULTS = 128, XIDS = 128 };
enum {
    OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, TIMEOUT = 10, GPU_IS_LOST = 15
};
#define NOT_AVAILABLE (~0ull)
#define MIB 20

/* --- the script in force ------------------------------------------------------------------------------------------------------- */

struct gpu {
    int present;
    char uuid[96], bus[32], name[96];
    u64 total, reserved;
    u64 used, util, memory_util, encoder, decoder, temp, shutdown, slowdown, gpu_max, margin, fan, power, limit, reasons, clock, clock_max,
        mig, ecc, ecc_double, remap_pending, remap_failure, recovery, persistence, compute_mode, pstate, events, pcie, mps;
};
static const struct { const char *name; size_t at; u64 first; } keys[] = {
#define KEY(name, first) {#name, offsetof(struct gpu, name), first}
    KEY(used, 0),          /* MiB, without the reserved */
    KEY(util, 0),          /* percent; any number is passed on as it is */
    KEY(memory_util, 0),
    KEY(encoder, 0), KEY(decoder, 0),
    KEY(temp, 35), KEY(shutdown, 95), KEY(slowdown, 90), KEY(gpu_max, 87), KEY(margin, 55), KEY(fan, 30),
    KEY(power, 50000), KEY(limit, 300000), /* mW */
    KEY(reasons, 0),       /* bits of nvmlClocksEventReasons */
    KEY(clock, 1800), KEY(clock_max, 2100), /* MHz */
    KEY(mig, 0), KEY(ecc, 0), KEY(ecc_double, 0), KEY(remap_pending, 0), KEY(remap_failure, 0),
    KEY(recovery, 0),      /* field NVML_FI_DEV_GET_GPU_RECOVERY_ACTION */
    KEY(persistence, 1), KEY(compute_mode, 0), KEY(pstate, 0), KEY(events, 8), KEY(pcie, 1000),
    KEY(mps, 0),           /* its processes are told as clients of MPS */
};
struct process { int gpu; unsigned pid; u64 mib; unsigned sm; };
struct fault { char function[64]; enum { FAIL, HANG, CRASH } kind; int code, gpu; };

static struct {
    struct gpu gpu[GPUS];
    struct process process[PROCESSES];
    struct fault fault[FAULTS];
    struct { int gpu; u64 code, serial; } xid[XIDS];
    int processes, faults, xids;
    char driver[80];
    double read_at, next_at; /* in force from, and until */
    struct stat read;      /* the file this was made of */
} script;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int initialised;
static int known[GPUS]; /* when the library was opened */
static int lost[GPUS];  /* since then */
static int registered[GPUS];
static u64 told_serial;

static double monotonic(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static double now(void) {
    static double loaded_at;
    const char *path = getenv("FAKE_NVML_CLOCK");
    FILE *file = path ? fopen(path, "r") : NULL;
    double told = 0;
    int known = file && fscanf(file, "%lf", &told) == 1;
    if (file) fclose(file);
    if (known) return told;
    if (!loaded_at) loaded_at = monotonic();
    return monotonic() - loaded_at;
}

static u64 number(const char *word) { return !word || !strcasecmp(word, "n/a") ? NOT_AVAILABLE : strtoull(word, NULL, 0); }
static u64 *figure(struct gpu *gpu, size_t at) { return (u64 *)(void *)((char *)gpu + at); }

static void read_gpu(struct gpu *gpu, char **save) {
    char *word;
    gpu->present = 1;
    if ((word = strtok_r(NULL, " \t\n", save))) snprintf(gpu->uuid, sizeof gpu->uuid, "%s", word);
    if ((word = strtok_r(NULL, " \t\n", save))) snprintf(gpu->bus, sizeof gpu->bus, "%s", word);
    gpu->total = number(strtok_r(NULL, " \t\n", save)) << MIB;
    gpu->reserved = number(strtok_r(NULL, " \t\n", save)) << MIB;
    word = strtok_r(NULL, "\n", save);
    snprintf(gpu->name, sizeof gpu->name, "%s", word ? word : "Fake GPU");
    for (size_t k = 0; k < sizeof keys / sizeof *keys; k++) *figure(gpu, keys[k].at) = keys[k].first;
}

static void read_settings(struct gpu *gpu, char **save) {
    for (char *word; (word = strtok_r(NULL, " \t\n", save));) {
        char *value = strchr(word, '=');
        if (!value) continue;
        *value++ = 0;
        size_t k = 0;
        while (k < sizeof keys / sizeof *keys && strcmp(keys[k].name, word)) k++;
        if (k == sizeof keys / sizeof *keys) {
            fprintf(stderr, "fake_nvml: no key %s\n", word);
            abort(); /* a script with a slip in it would prove nothing */
        }
        *figure(gpu, keys[k].at) = number(value);
    }
}

static void read_fault(int kind, char **save) {
    if (script.faults == FAULTS) abort();
    struct fault *fault = &script.fault[script.faults++];
    char *word = strtok_r(NULL, " \t\n", save);
    snprintf(fault->function, sizeof fault->function, "%s", word ? word : "");
    fault->kind = kind;
    fault->code = kind == CRASH ? 0 : (int)number(strtok_r(NULL, " \t\n", save));
    word = strtok_r(NULL, " \t\n", save);
    fault->gpu = word ? atoi(word) : -1;
}

static void read_line(const char *verb, char **save) {
    if (!strcmp(verb, "driver")) {
        char *word = strtok_r(NULL, " \t\n", save);
        snprintf(script.driver, sizeof script.driver, "%s", word ? word : "");
    } else if (!strcmp(verb, "heal")) {
        script.faults = 0;
    } else if (!strcmp(verb, "fail") || !strcmp(verb, "hang") || !strcmp(verb, "crash")) {
        read_fault(*verb == 'f' ? FAIL : *verb == 'h' ? HANG : CRASH, save);
    } else {
        u64 index = number(strtok_r(NULL, " \t\n", save));
        if (index >= GPUS) abort();
        struct gpu *gpu = &script.gpu[index];
        if (!strcmp(verb, "gpu")) read_gpu(gpu, save);
        else if (!strcmp(verb, "set")) read_settings(gpu, save);
        else if (!strcmp(verb, "gone")) gpu->present = 0;
        else if (!strcmp(verb, "proc") && script.processes < PROCESSES) {
            struct process *process = &script.process[script.processes++];
            process->gpu = (int)index;
            process->pid = (unsigned)number(strtok_r(NULL, " \t\n", save));
            process->mib = number(strtok_r(NULL, " \t\n", save));
            process->sm = (unsigned)number(strtok_r(NULL, " \t\n", save));
        } else if (!strcmp(verb, "xid") && script.xids < XIDS) {
            script.xid[script.xids].gpu = (int)index;
            script.xid[script.xids].code = number(strtok_r(NULL, " \t\n", save));
            script.xid[script.xids++].serial = number(strtok_r(NULL, " \t\n", save));
        } else abort();
    }
}

/* Read the script if it was replaced or a line of it comes into force. */
static void follow_script(void) {
    const char *path = getenv("FAKE_NVML_SCRIPT");
    double time = now();
    struct stat found = {0};
    if (path) stat(path, &found);
    if (script.read.st_ino == found.st_ino && script.read.st_mtim.tv_sec == found.st_mtim.tv_sec &&
        script.read.st_mtim.tv_nsec == found.st_mtim.tv_nsec && script.read.st_size == found.st_size && found.st_ino && time >= script.read_at && time < script.next_at)
        return;
    FILE *file = path ? fopen(path, "r") : NULL;
    memset(&script, 0, sizeof script);
    snprintf(script.driver, sizeof script.driver, "570.00");
    script.read_at = time;
    script.next_at = 1e300;
    script.read = found;
    if (!file) return;
    char line[1024];
    double at = 0;
    while (fgets(line, sizeof line, file)) {
        char *save, *verb = strtok_r(line, " \t\n", &save);
        if (!verb || *verb == '#') continue;
        if (!strcmp(verb, "at")) at = atof(strtok_r(NULL, " \t\n", &save));
        else if (at <= time) read_line(verb, &save);
        if (at > time && at < script.next_at) script.next_at = at;
    }
    fclose(file);
    for (int i = 0; i < GPUS; i++) lost[i] |= known[i] && !script.gpu[i].present;
}

/* Everybody's processes on a GPU: those of the script, and the living fake workers. */
static int processes_on(int gpu, struct process *out) {
    int count = 0;
    for (int i = 0; i < script.processes; i++)
        if (script.process[i].gpu == gpu) out[count++] = script.process[i];
    const char *path = getenv("FAKE_NVML_WORKERS");
    DIR *workers = path ? opendir(path) : NULL;
    for (struct dirent *entry; workers && count < PROCESSES && (entry = readdir(workers));) {
        struct process found = {0};
        char name[512];
        if (sscanf(entry->d_name, "%d.%u", &found.gpu, &found.pid) != 2 || found.gpu != gpu) continue;
        if (kill((pid_t)found.pid, 0) && errno == ESRCH) continue;
        snprintf(name, sizeof name, "%s/%s", path, entry->d_name);
        FILE *file = fopen(name, "r");
        if (file && fscanf(file, "%llu %u", &found.mib, &found.sm) == 2) out[count++] = found;
        if (file) fclose(file);
    }
    if (workers) closedir(workers);
    return count;
}

static int index_of(const struct gpu *gpu) { return (int)(gpu - script.gpu); }

static u64 used_bytes(struct gpu *gpu) {
    struct process on[PROCESSES];
    u64 used = gpu->used << MIB;
    for (int i = processes_on(index_of(gpu), on) - 1; i >= 0; i--)
        if (on[i].mib != NOT_AVAILABLE) used += on[i].mib << MIB;
    return used > gpu->total - gpu->reserved ? gpu->total - gpu->reserved : used;
}

static u64 busy_percent(struct gpu *gpu) {
    struct process on[PROCESSES];
    u64 busy = gpu->util;
    if (busy > 100) return busy; /* nonsense is passed on */
    for (int i = processes_on(index_of(gpu), on) - 1; i >= 0; i--) busy += on[i].sm;
    return busy > 100 ? 100 : busy;
}

/* --- every call ---------------------------------------------------------------------------------------------------------------- */

static void note(const char *function) {
    const char *path = getenv("FAKE_NVML_LOG");
    FILE *file = path ? fopen(path, "a") : NULL;
    if (!file) return;
    fprintf(file, "%d %s\n", (int)getpid(), function);
    fclose(file);
}

static const struct fault *fault_of(const char *function, int gpu) {
    for (int i = script.faults - 1; i >= 0; i--) {
        const struct fault *fault = &script.fault[i];
        if (strcmp(fault->function, "*") && strcmp(fault->function, function)) continue;
        if (fault->gpu < 0 || fault->gpu == gpu) return fault;
    }
    return NULL;
}

/* What the call answers before it does anything. Called, and left, with the lock held; a call that hangs holds up nobody else's. */
static int enter(const char *function, struct gpu *gpu) {
    follow_script();
    note(function);
    const struct fault *fault = fault_of(function, gpu ? index_of(gpu) : -1);
    if (fault && fault->kind == FAIL) return fault->code;
    if (fault && fault->kind == CRASH) raise(SIGSEGV);
    if (fault) {
        struct timespec pause = {fault->code / 1000, fault->code % 1000 * 1000000l};
        pthread_mutex_unlock(&lock);
        nanosleep(&pause, NULL);
        pthread_mutex_lock(&lock);
        follow_script();
    }
    if (gpu && lost[index_of(gpu)]) return GPU_IS_LOST;
    if (!initialised && strncmp(function, "nvmlInit", 8)) return UNINITIALIZED;
    return OK;
}

typedef struct gpu *device;
#define CALL(gpu, ...)                          \
    {                                           \
        pthread_mutex_lock(&lock);              \
        int answer = enter(__func__, gpu);      \
        if (!answer) { __VA_ARGS__; }           \
        pthread_mutex_unlock(&lock);            \
        return answer;                          \
    }
#define TELL(out, type, value)                                  \
    do {                                                        \
        u64 told = value;                                       \
        if (told == NOT_AVAILABLE) answer = NOT_SUPPORTED;      \
        else *(out) = (type)told;                               \
    } while (0)

/* --- library and system -------------------------------------------------------------------------------------------------------- */

static void open_library(void) {
    if (initialised++) return;
    memset(lost, 0, sizeof lost);
    for (int i = 0; i < GPUS; i++) known[i] = script.gpu[i].present;
}
int nvmlInitWithFlags(unsigned flags) { (void)flags; CALL(NULL, open_library()) }
int nvmlInit_v2(void) CALL(NULL, open_library())
int nvmlShutdown(void) { /* closes even where it fails */
    pthread_mutex_lock(&lock);
    int answer = enter(__func__, NULL);
    if (initialised) initialised--;
    pthread_mutex_unlock(&lock);
    return answer;
}
int nvmlSystemGetDriverVersion(char *out, unsigned size) CALL(NULL, snprintf(out, size, "%s", script.driver))
int nvmlSystemGetNVMLVersion(char *out, unsigned size) CALL(NULL, snprintf(out, size, "13.%s", script.driver))
int nvmlSystemGetCudaDriverVersion(int *out) CALL(NULL, *out = 12080)
int nvmlSystemGetCudaDriverVersion_v2(int *out) CALL(NULL, *out = 12080)

const char *nvmlErrorString(int code) {
    static const char *said[] = {
        "Success", "Uninitialized", "Invalid Argument", "Not Supported", "Insufficient Permissions", "Already Initialized", "Not Found",
        "Insufficient Size", "Insufficient External Power", "Driver Not Loaded", "Timeout", "Interrupt Request Issue",
        "NVML Shared Library Not Found", "Function Not Found", "Corrupted infoROM", "GPU is lost", "GPU requires reset",
        "The operating system has blocked the request.", "Driver/library version mismatch"};
    return code >= 0 && code < (int)(sizeof said / sizeof *said) ? said[code] : "Unknown Error";
}

/* --- which GPUs ---------------------------------------------------------------------------------------------------------------- */

static struct gpu *nth_found(unsigned index) {
    for (int i = 0; i < GPUS; i++)
        if (known[i] && !index--) return &script.gpu[i];
    return NULL;
}

static struct gpu *found_by(size_t at, const char *wanted) {
    for (int i = 0; i < GPUS; i++)
        if (known[i] && !strcasecmp((char *)&script.gpu[i] + at, wanted)) return &script.gpu[i];
    return NULL;
}

/* A handle is asked for: faults of that very GPU count, as they do on a real board that is lost. */
static int handle(const char *function, struct gpu *found, int none, device *out) {
    int answer = enter(function, found);
    if (!answer && !found) answer = none;
    if (!answer) *out = found;
    return answer;
}
#define HANDLE(found, none)                             \
    {                                                   \
        pthread_mutex_lock(&lock);                      \
        follow_script();                                \
        int answer = handle(__func__, found, none, out); \
        pthread_mutex_unlock(&lock);                    \
        return answer;                                  \
    }

int nvmlDeviceGetCount_v2(unsigned *out) CALL(NULL, *out = 0; for (int i = 0; i < GPUS; i++) *out += (unsigned)known[i])
int nvmlDeviceGetHandleByIndex_v2(unsigned index, device *out) HANDLE(nth_found(index), INVALID_ARGUMENT)
int nvmlDeviceGetHandleByUUID(const char *uuid, device *out) HANDLE(found_by(offsetof(struct gpu, uuid), uuid), NOT_FOUND)
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, device *out) HANDLE(found_by(offsetof(struct gpu, bus), bus), NOT_FOUND)
int nvmlDeviceGetIndex(device gpu, unsigned *out)
    CALL(gpu, *out = 0; for (int i = 0; i < index_of(gpu); i++) *out += (unsigned)known[i])
int nvmlDeviceGetMinorNumber(device gpu, unsigned *out) CALL(gpu, *out = (unsigned)index_of(gpu))
int nvmlDeviceGetName(device gpu, char *out, unsigned size) CALL(gpu, snprintf(out, size, "%s", gpu->name))
int nvmlDeviceGetUUID(device gpu, char *out, unsigned size) CALL(gpu, snprintf(out, size, "%s", gpu->uuid))
int nvmlDeviceGetSerial(device gpu, char *out, unsigned size) CALL(gpu, snprintf(out, size, "fake-%d", index_of(gpu)))
int nvmlDeviceGetBrand(device gpu, int *out) CALL(gpu, *out = 0)
int nvmlDeviceGetCudaComputeCapability(device gpu, int *major, int *minor) CALL(gpu, *major = 8; *minor = 9)

struct pci { char legacy[16]; unsigned domain, bus, device, pci_device_id, pci_subsystem_id; char id[32]; };
int nvmlDeviceGetPciInfo_v3(device gpu, struct pci *out)
    CALL(gpu, memset(out, 0, sizeof *out); snprintf(out->id, sizeof out->id, "%s", gpu->bus);
         snprintf(out->legacy, sizeof out->legacy, "%.15s", gpu->bus + 4); sscanf(gpu->bus, "%x:%x:%x", &out->domain, &out->bus, &out->device);
         out->pci_device_id = 0x268410de)

/* --- memory -------------------------------------------------------------------------------------------------------------------- */

struct memory { u64 total, free, used; };
struct memory_v2 { unsigned version; u64 total, reserved, free, used; };
static int fill_memory(struct gpu *gpu, struct memory *out) {
    if (gpu->used == NOT_AVAILABLE) return NOT_SUPPORTED;
    u64 used = used_bytes(gpu);
    *out = (struct memory){gpu->total, gpu->total - gpu->reserved - used, used};
    return OK;
}
int nvmlDeviceGetMemoryInfo(device gpu, struct memory *out) CALL(gpu, answer = fill_memory(gpu, out); if (!answer) out->used += gpu->reserved)
int nvmlDeviceGetMemoryInfo_v2(device gpu, struct memory_v2 *out)
    CALL(gpu, struct memory found = {0}; answer = fill_memory(gpu, &found);
         if (!answer) *out = (struct memory_v2){out->version, found.total, gpu->reserved, found.free, found.used})
int nvmlDeviceGetBAR1MemoryInfo(device gpu, struct memory *out) CALL(gpu, *out = (struct memory){256u << MIB, 250u << MIB, 6u << MIB})

/* --- load ---------------------------------------------------------------------------------------------------------------------- */

struct rates { unsigned gpu, memory; };
static int no_rates(struct gpu *gpu) { return gpu->util == NOT_AVAILABLE || gpu->mig == 1; } /* not given with MIG */
int nvmlDeviceGetUtilizationRates(device gpu, struct rates *out)
    CALL(gpu, if (no_rates(gpu)) answer = NOT_SUPPORTED; else { out->gpu = (unsigned)busy_percent(gpu); out->memory = (unsigned)gpu->memory_util; })
int nvmlDeviceGetEncoderUtilization(device gpu, unsigned *out, unsigned *us) CALL(gpu, *us = 166666; TELL(out, unsigned, gpu->encoder))
int nvmlDeviceGetDecoderUtilization(device gpu, unsigned *out, unsigned *us) CALL(gpu, *us = 166666; TELL(out, unsigned, gpu->decoder))
int nvmlDeviceGetPcieThroughput(device gpu, int counter, unsigned *out) CALL(gpu, (void)counter; TELL(out, unsigned, gpu->pcie))

struct sample { u64 at_us; union { double real; unsigned whole; u64 large; } value; };
enum { SAMPLES = 100, SAMPLE_US = 166666 };
int nvmlDeviceGetSamples(device gpu, int kind, u64 since_us, int *value_type, unsigned *count, struct sample *out) {
    (void)kind;
    CALL(gpu, *value_type = 1; if (no_rates(gpu)) answer = NOT_SUPPORTED; else if (!out) *count = SAMPLES; else {
        u64 end_us = (u64)(now() * 1e6);
        unsigned filled = 0;
        for (u64 back = SAMPLES; back-- > 0 && filled < *count;) {
            u64 at_us = end_us > back * SAMPLE_US ? end_us - back * SAMPLE_US : 0;
            if (!at_us || at_us <= since_us) continue;
            out[filled].value.large = 0;
            out[filled].value.whole = (unsigned)busy_percent(gpu);
            out[filled++].at_us = at_us;
        }
        *count = filled;
        if (!filled) answer = NOT_FOUND;
    })
}

/* --- processes ----------------------------------------------------------------------------------------------------------------- */

struct process_info { unsigned pid; u64 used; unsigned gpu_instance, compute_instance; };
static int fill_processes(struct gpu *gpu, unsigned *count, struct process_info *out) {
    struct process on[PROCESSES];
    unsigned found = (unsigned)processes_on(index_of(gpu), on), room = *count;
    *count = found;
    if (!found) return OK;
    if (!out || found > room) return INSUFFICIENT_SIZE;
    for (unsigned i = 0; i < found; i++)
        out[i] = (struct process_info){on[i].pid, on[i].mib == NOT_AVAILABLE ? NOT_AVAILABLE : on[i].mib << MIB, ~0u, ~0u};
    return OK;
}
static int none(unsigned *count) { *count = 0; return OK; }
int nvmlDeviceGetComputeRunningProcesses_v3(device gpu, unsigned *count, struct process_info *out)
    CALL(gpu, answer = gpu->mps ? none(count) : fill_processes(gpu, count, out))
int nvmlDeviceGetGraphicsRunningProcesses_v3(device gpu, unsigned *count, struct process_info *out) CALL(gpu, (void)out; none(count))
int nvmlDeviceGetMPSComputeRunningProcesses_v3(device gpu, unsigned *count, struct process_info *out)
    CALL(gpu, answer = gpu->mps ? fill_processes(gpu, count, out) : none(count))

struct process_load { unsigned pid; u64 at_us; unsigned sm, memory, encoder, decoder; };
static int fill_process_load(struct gpu *gpu, struct process_load *out, unsigned *count) {
    struct process on[PROCESSES];
    unsigned found = (unsigned)processes_on(index_of(gpu), on), filled = 0;
    if (!found) return NOT_FOUND;
    if (!out || *count < found) { *count = found; return INSUFFICIENT_SIZE; }
    for (unsigned i = 0; i < found; i++) out[filled++] = (struct process_load){on[i].pid, (u64)(now() * 1e6), on[i].sm, 0, 0, 0};
    *count = filled;
    return OK;
}
int nvmlDeviceGetProcessUtilization(device gpu, struct process_load *out, unsigned *count, u64 since_us)
    CALL(gpu, (void)since_us; answer = fill_process_load(gpu, out, count))

/* --- heat, power, clocks ------------------------------------------------------------------------------------------------------- */

struct temperature { unsigned version; int sensor, celsius; };
struct margin { unsigned version; int celsius; };
int nvmlDeviceGetTemperature(device gpu, int sensor, unsigned *out) CALL(gpu, (void)sensor; TELL(out, unsigned, gpu->temp))
int nvmlDeviceGetTemperatureV(device gpu, struct temperature *out) CALL(gpu, TELL(&out->celsius, int, gpu->temp))
int nvmlDeviceGetTemperatureThreshold(device gpu, int kind, unsigned *out)
    CALL(gpu, TELL(out, unsigned, kind == 0 ? gpu->shutdown : kind == 1 ? gpu->slowdown : kind == 3 ? gpu->gpu_max : NOT_AVAILABLE))
int nvmlDeviceGetMarginTemperature(device gpu, struct margin *out) CALL(gpu, TELL(&out->celsius, int, gpu->margin))
int nvmlDeviceGetFanSpeed(device gpu, unsigned *out) CALL(gpu, TELL(out, unsigned, gpu->fan))
int nvmlDeviceGetPowerUsage(device gpu, unsigned *out) CALL(gpu, TELL(out, unsigned, gpu->power))
int nvmlDeviceGetEnforcedPowerLimit(device gpu, unsigned *out) CALL(gpu, TELL(out, unsigned, gpu->limit))
int nvmlDeviceGetPowerManagementLimit(device gpu, unsigned *out) CALL(gpu, TELL(out, unsigned, gpu->limit))
int nvmlDeviceGetPowerManagementDefaultLimit(device gpu, unsigned *out) CALL(gpu, TELL(out, unsigned, gpu->limit))
int nvmlDeviceGetPowerManagementLimitConstraints(device gpu, unsigned *low, unsigned *high)
    CALL(gpu, *low = 100000; TELL(high, unsigned, gpu->limit))
int nvmlDeviceGetTotalEnergyConsumption(device gpu, u64 *out) CALL(gpu, *out = (u64)(now() * 1000) * gpu->power / 1000)
int nvmlDeviceGetClockInfo(device gpu, int kind, unsigned *out) CALL(gpu, (void)kind; TELL(out, unsigned, gpu->clock))
int nvmlDeviceGetMaxClockInfo(device gpu, int kind, unsigned *out) CALL(gpu, (void)kind; TELL(out, unsigned, gpu->clock_max))
int nvmlDeviceGetCurrentClocksThrottleReasons(device gpu, u64 *out) CALL(gpu, TELL(out, u64, gpu->reasons))
int nvmlDeviceGetCurrentClocksEventReasons(device gpu, u64 *out) CALL(gpu, TELL(out, u64, gpu->reasons))
int nvmlDeviceGetPerformanceState(device gpu, unsigned *out) CALL(gpu, TELL(out, unsigned, gpu->pstate))

/* --- modes --------------------------------------------------------------------------------------------------------------------- */

int nvmlDeviceGetPersistenceMode(device gpu, unsigned *out) CALL(gpu, TELL(out, unsigned, gpu->persistence))
int nvmlDeviceGetComputeMode(device gpu, unsigned *out) CALL(gpu, TELL(out, unsigned, gpu->compute_mode))
int nvmlDeviceGetDisplayMode(device gpu, unsigned *out) CALL(gpu, *out = 0)
int nvmlDeviceGetDisplayActive(device gpu, unsigned *out) CALL(gpu, *out = 0)
int nvmlDeviceGetDriverModel(device gpu, unsigned *now_, unsigned *later) CALL(gpu, *now_ = *later = 0; answer = NOT_SUPPORTED)
int nvmlDeviceGetDriverModel_v2(device gpu, unsigned *now_, unsigned *later) CALL(gpu, *now_ = *later = 0; answer = NOT_SUPPORTED)
int nvmlDeviceGetMigMode(device gpu, unsigned *now_, unsigned *later) CALL(gpu, TELL(now_, unsigned, gpu->mig); TELL(later, unsigned, gpu->mig))
int nvmlDeviceGetMaxMigDeviceCount(device gpu, unsigned *out) CALL(gpu, *out = gpu->mig == 1 ? 7 : 0)
int nvmlDeviceGetMigDeviceHandleByIndex(device gpu, unsigned index, device *out) CALL(gpu, (void)index; *out = NULL; answer = NOT_FOUND)
int nvmlDeviceIsMigDeviceHandle(device gpu, unsigned *out) CALL(gpu, *out = 0)
int nvmlDeviceGetCurrPcieLinkGeneration(device gpu, unsigned *out) CALL(gpu, *out = 4)
int nvmlDeviceGetCurrPcieLinkWidth(device gpu, unsigned *out) CALL(gpu, *out = 16)

/* --- errors of the board ------------------------------------------------------------------------------------------------------- */

int nvmlDeviceGetEccMode(device gpu, unsigned *now_, unsigned *later) CALL(gpu, TELL(now_, unsigned, gpu->ecc); TELL(later, unsigned, gpu->ecc))
int nvmlDeviceGetTotalEccErrors(device gpu, int kind, int counter, u64 *out)
    CALL(gpu, (void)counter; if (gpu->ecc != 1) answer = NOT_SUPPORTED; else *out = kind ? gpu->ecc_double : 0)
int nvmlDeviceGetRetiredPagesPendingStatus(device gpu, unsigned *out) CALL(gpu, TELL(out, unsigned, gpu->remap_pending))
int nvmlDeviceGetRemappedRows(device gpu, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failure)
    CALL(gpu, *corrected = *uncorrected = 0; TELL(pending, unsigned, gpu->remap_pending); TELL(failure, unsigned, gpu->remap_failure))

struct field { unsigned id, scope; long long at_us, latency_us; int value_type, answer; union { double real; unsigned whole; u64 large; } value; };
enum { FIELD_RECOVERY_ACTION = 230 };
int nvmlDeviceGetFieldValues(device gpu, int count, struct field *fields)
    CALL(gpu, for (int i = 0; i < count; i++) {
        int known = fields[i].id == FIELD_RECOVERY_ACTION && gpu->recovery != NOT_AVAILABLE;
        fields[i].value.large = 0;
        fields[i].value_type = 1;
        fields[i].answer = known ? OK : NOT_SUPPORTED;
        if (known) fields[i].value.whole = (unsigned)gpu->recovery;
    })

/* --- events -------------------------------------------------------------------------------------------------------------------- */

struct event { device gpu; u64 type, data; unsigned gpu_instance, compute_instance; };
enum { EVENT_XID = 8 };
static u64 last_serial(void) {
    u64 last = told_serial;
    for (int i = 0; i < script.xids; i++)
        if (script.xid[i].serial > last) last = script.xid[i].serial;
    return last;
}
int nvmlEventSetCreate(void **out) CALL(NULL, memset(registered, 0, sizeof registered); told_serial = last_serial(); *out = registered)
int nvmlEventSetFree(void *set) { (void)set; CALL(NULL, memset(registered, 0, sizeof registered)) }
int nvmlDeviceGetSupportedEventTypes(device gpu, u64 *out) CALL(gpu, TELL(out, u64, gpu->events))
int nvmlDeviceRegisterEvents(device gpu, u64 types, void *set) {
    (void)set;
    CALL(gpu, if (gpu->events == NOT_AVAILABLE || types & ~gpu->events) answer = NOT_SUPPORTED; else registered[index_of(gpu)] = 1)
}

static int next_xid(struct event *out) {
    for (int i = 0; i < script.xids; i++) {
        if (script.xid[i].serial <= told_serial || !registered[script.xid[i].gpu]) continue;
        told_serial = script.xid[i].serial;
        *out = (struct event){&script.gpu[script.xid[i].gpu], EVENT_XID, script.xid[i].code, ~0u, ~0u};
        return 1;
    }
    return 0;
}

int nvmlEventSetWait_v2(void *set, struct event *out, unsigned timeout_ms) {
    (void)set;
    double end = monotonic() + timeout_ms / 1000.0;
    for (;;) {
        pthread_mutex_lock(&lock);
        int answer = enter(__func__, NULL);
        int found = !answer && next_xid(out);
        pthread_mutex_unlock(&lock);
        if (answer || found) return answer;
        if (monotonic() >= end) return TIMEOUT;
        usleep(10000);
    }
}
