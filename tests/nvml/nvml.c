/* A stand-in for NVIDIA's libnvidia-ml.so.1: what NVML answers, read from a scenario file.
 *
 * $NVML_SCENARIO names the file. It has a line KEY=VALUE each, read anew with every call, so that a
 * test can change it while a program runs. gpuN.KEY goes before gpu.KEY, which is for all GPUs;
 * gpuN.migM.KEY is of a MIG instance. A line FUNCTION=CODE, or gpuN.FUNCTION=CODE, makes that
 * function fail with NVML's error code. What the scenario does not say is NOT_SUPPORTED.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long long u64;
typedef struct { u64 total, free, used; } memory_v1;
typedef struct { unsigned version; u64 total, reserved, free, used; } memory_v2;
typedef struct { unsigned pid; u64 used; unsigned gpu_instance, compute_instance; } process_info;
typedef struct {
  char legacy[16];
  unsigned domain, bus, device, pci_device, pci_subsystem;
  char bus_id[32];
} pci_info;
typedef struct { void *device; u64 type, data; unsigned gpu_instance, compute_instance; } event_data;

enum {
  OK = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, TIMEOUT = 10
};
enum { MOST_GPUS = 64, MOST_PROCESSES = 64, FIRST = 1, PLACES = 16, XID_EVENT = 8 };
enum { P2P_OK = 0, P2P_OF_NVLINK = 2, P2P_DISABLED = 5 };

static int started;
static char delivered[MOST_GPUS][64];

/* ---- the scenario ---------------------------------------------------------------------------- */

static int find(const char *key, char *value, unsigned size) {
  char line[1024];
  int found = 0;
  const char *path = getenv("NVML_SCENARIO");
  FILE *file = path ? fopen(path, "r") : NULL;
  if (!file) return 0;
  unsigned length = strlen(key);
  while (!found && fgets(line, sizeof line, file)) {
    line[strcspn(line, "\r\n")] = 0;
    if (strncmp(line, key, length) || line[length] != '=') continue;
    snprintf(value, size, "%s", line + length + 1);
    found = 1;
  }
  fclose(file);
  return found;
}

/* A handle holds the number of the GPU and the place of the instance, each from one. */
static void *handle_of(int gpu, int instance) {
  return (void *)(u64)((gpu + FIRST) * PLACES + instance + FIRST);
}
static int gpu_of(void *device) { return (int)((u64)device / PLACES) - FIRST; }
static int instance_of(void *device) { return (int)((u64)device % PLACES) - FIRST; }

static int ask(void *device, const char *name, char *value, unsigned size) {
  char key[160];
  if (instance_of(device) >= 0) {
    snprintf(key, sizeof key, "gpu%d.mig%d.%s", gpu_of(device), instance_of(device), name);
    return find(key, value, size);
  }
  snprintf(key, sizeof key, "gpu%d.%s", gpu_of(device), name);
  if (find(key, value, size)) return 1;
  snprintf(key, sizeof key, "gpu.%s", name);
  return find(key, value, size);
}

static int ask_number(void *device, const char *name, u64 *number) {
  char value[64];
  if (!ask(device, name, value, sizeof value)) return 0;
  *number = strtoull(value, NULL, 0);
  return 1;
}

static int fault(void *device, const char *function) {
  char value[64];
  if (find(function, value, sizeof value)) return atoi(value);
  if (device && ask(device, function, value, sizeof value)) return atoi(value);
  return OK;
}
#define FAIL_IF_TOLD(device) \
  do { int code = fault(device, __func__); if (code) return code; } while (0)

static int copy(const char *text, char *target, unsigned size) {
  if (strlen(text) >= size) return INSUFFICIENT_SIZE;
  strcpy(target, text);
  return OK;
}

static int tell_text(void *device, const char *name, char *target, unsigned size) {
  char value[512];
  return ask(device, name, value, sizeof value) ? copy(value, target, size) : NOT_SUPPORTED;
}

static int tell_unsigned(void *device, const char *name, unsigned *target) {
  u64 number;
  if (!ask_number(device, name, &number)) return NOT_SUPPORTED;
  *target = (unsigned)number;
  return OK;
}

/* ---- system ---------------------------------------------------------------------------------- */

int nvmlInitWithFlags(unsigned flags) { FAIL_IF_TOLD(NULL); started++; return OK; }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { FAIL_IF_TOLD(NULL); started--; return OK; }
const char *nvmlErrorString(int code) { return "an error that the stand-in has no words for"; }

static int system_text(const char *name, char *target, unsigned size) {
  char value[256];
  return find(name, value, sizeof value) ? copy(value, target, size) : NOT_SUPPORTED;
}
int nvmlSystemGetDriverVersion(char *version, unsigned size) {
  FAIL_IF_TOLD(NULL);
  return system_text("driver", version, size);
}
int nvmlSystemGetCudaDriverVersion_v2(int *version) {
  char value[64];
  FAIL_IF_TOLD(NULL);
  if (!find("cuda", value, sizeof value)) return NOT_SUPPORTED;
  *version = atoi(value);
  return OK;
}
int nvmlSystemGetCudaDriverVersion(int *version) { return nvmlSystemGetCudaDriverVersion_v2(version); }

int nvmlDeviceGetCount_v2(unsigned *count) {
  char value[64];
  FAIL_IF_TOLD(NULL);
  *count = find("gpus", value, sizeof value) ? (unsigned)atoi(value) : 0;
  return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
  unsigned count = 0;
  int code = nvmlDeviceGetCount_v2(&count);
  if (code) return code;
  if (index >= count) return INVALID_ARGUMENT;
  FAIL_IF_TOLD(handle_of((int)index, -1));
  *device = handle_of((int)index, -1);
  return OK;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
  unsigned count = 0;
  char value[512];
  FAIL_IF_TOLD(NULL);
  nvmlDeviceGetCount_v2(&count);
  for (int gpu = 0; gpu < (int)count; gpu++)
    for (int instance = -1; instance < 7; instance++) {
      *device = handle_of(gpu, instance);
      if (ask(*device, "uuid", value, sizeof value) && !strcmp(value, uuid)) return OK;
    }
  return NOT_FOUND;
}

/* ---- what a device is ------------------------------------------------------------------------ */

int nvmlDeviceGetName(void *device, char *name, unsigned size) {
  FAIL_IF_TOLD(device);
  return tell_text(device, "name", name, size);
}
int nvmlDeviceGetUUID(void *device, char *uuid, unsigned size) {
  FAIL_IF_TOLD(device);
  return tell_text(device, "uuid", uuid, size);
}

int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
  char value[64];
  FAIL_IF_TOLD(device);
  if (!ask(device, "capability", value, sizeof value)) return NOT_SUPPORTED;
  return sscanf(value, "%d.%d", major, minor) == 2 ? OK : NOT_SUPPORTED;
}

static int memory(void *device, u64 *total, u64 *reserved, u64 *used) {
  *reserved = *used = 0;
  if (!ask_number(device, "memory", total)) return NOT_SUPPORTED;
  ask_number(device, "reserved", reserved);
  ask_number(device, "used", used);
  return OK;
}
int nvmlDeviceGetMemoryInfo(void *device, memory_v1 *info) {
  u64 total, reserved, used;
  FAIL_IF_TOLD(device);
  int code = memory(device, &total, &reserved, &used);
  if (code) return code;
  /* The first version counts what the driver reserves as used. */
  *info = (memory_v1){total, total - reserved - used, reserved + used};
  return OK;
}
int nvmlDeviceGetMemoryInfo_v2(void *device, memory_v2 *info) {
  u64 total, reserved, used;
  FAIL_IF_TOLD(device);
  int code = memory(device, &total, &reserved, &used);
  if (code) return code;
  info->total = total;
  info->reserved = reserved;
  info->used = used;
  info->free = total - reserved - used;
  return OK;
}

int nvmlDeviceGetPciInfo_v3(void *device, pci_info *info) {
  FAIL_IF_TOLD(device);
  memset(info, 0, sizeof *info);
  return tell_text(device, "bus", info->bus_id, sizeof info->bus_id);
}
int nvmlDeviceGetMaxPcieLinkGeneration(void *device, unsigned *generation) {
  FAIL_IF_TOLD(device);
  return tell_unsigned(device, "pcie_generation", generation);
}
int nvmlDeviceGetMaxPcieLinkWidth(void *device, unsigned *width) {
  FAIL_IF_TOLD(device);
  return tell_unsigned(device, "pcie_width", width);
}
int nvmlDeviceGetCurrPcieLinkWidth(void *device, unsigned *width) {
  return nvmlDeviceGetMaxPcieLinkWidth(device, width);
}

int nvmlDeviceGetCpuAffinity(void *device, unsigned words, unsigned long *set) {
  char value[512];
  FAIL_IF_TOLD(device);
  if (!ask(device, "cpus", value, sizeof value)) return NOT_SUPPORTED;
  memset(set, 0, words * sizeof *set);
  const unsigned bits = 8 * sizeof *set;
  for (char *part = strtok(value, ","); part; part = strtok(NULL, ",")) {
    unsigned first, last;
    int read = sscanf(part, "%u-%u", &first, &last);
    if (read < 1) return INVALID_ARGUMENT;
    if (read == 1) last = first;
    for (unsigned cpu = first; cpu <= last && cpu < words * bits; cpu++)
      set[cpu / bits] |= 1ul << (cpu % bits);
  }
  return OK;
}

/* ---- MIG ------------------------------------------------------------------------------------- */

int nvmlDeviceGetMigMode(void *device, unsigned *now, unsigned *pending) {
  FAIL_IF_TOLD(device);
  int code = tell_unsigned(device, "mig", now);
  *pending = code ? 0 : *now;
  return code;
}
int nvmlDeviceGetMaxMigDeviceCount(void *device, unsigned *count) {
  FAIL_IF_TOLD(device);
  *count = 7;
  return OK;
}
int nvmlDeviceGetMigDeviceHandleByIndex(void *device, unsigned index, void **instance) {
  char value[512];
  FAIL_IF_TOLD(device);
  *instance = handle_of(gpu_of(device), (int)index);
  return ask(*instance, "uuid", value, sizeof value) ? OK : NOT_FOUND;
}

/* ---- who uses it ----------------------------------------------------------------------------- */

/* pid:bytes;pid:bytes, or pid:na where the driver does not tell the memory. */
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, process_info *infos) {
  char value[1024] = "";
  unsigned found = 0;
  FAIL_IF_TOLD(device);
  if (!ask(device, "processes", value, sizeof value)) { *count = 0; return OK; }
  for (char *part = strtok(value, ";"); part; part = strtok(NULL, ";"), found++) {
    char *bytes = strchr(part, ':');
    if (!infos || found >= *count) continue;
    infos[found].pid = (unsigned)strtoul(part, NULL, 10);
    infos[found].used = bytes && strcmp(bytes, ":na") ? strtoull(bytes + 1, NULL, 10) : ~0ull;
    infos[found].gpu_instance = infos[found].compute_instance = ~0u;
  }
  const int fits = infos && found <= *count;
  *count = found;
  return fits || !found ? OK : INSUFFICIENT_SIZE;
}
int nvmlDeviceGetComputeMode(void *device, unsigned *mode) {
  FAIL_IF_TOLD(device);
  return tell_unsigned(device, "compute_mode", mode);
}

/* ---- how devices reach each other ------------------------------------------------------------ */

int nvmlDeviceGetNvLinkState(void *device, unsigned link, unsigned *active) {
  u64 links;
  FAIL_IF_TOLD(device);
  if (!ask_number(device, "nvlinks", &links)) return NOT_SUPPORTED;
  if (link >= 18) return INVALID_ARGUMENT;
  *active = link < links;
  return OK;
}

/* peers=CODE for all pairs, peers.A.B=CODE for one; nvlinked=all, or A-B,C-D */
int nvmlDeviceGetP2PStatus(void *one, void *other, int of, int *status) {
  char key[64], value[512];
  FAIL_IF_TOLD(one);
  int low = gpu_of(one), high = gpu_of(other);
  if (low > high) { int swap = low; low = high; high = swap; }
  if (of == P2P_OF_NVLINK) {
    if (!find("nvlinked", value, sizeof value)) return NOT_SUPPORTED;
    int linked = !strcmp(value, "all");
    snprintf(key, sizeof key, "%d-%d", low, high);
    for (char *part = strtok(value, ","); part; part = strtok(NULL, ","))
      linked |= !strcmp(part, key);
    *status = linked ? P2P_OK : P2P_DISABLED;
    return OK;
  }
  snprintf(key, sizeof key, "peers.%d.%d", low, high);
  if (!find(key, value, sizeof value) && !find("peers", value, sizeof value)) return NOT_SUPPORTED;
  *status = atoi(value);
  return OK;
}

/* ---- how it is ------------------------------------------------------------------------------- */

int nvmlDeviceGetTotalEccErrors(void *device, unsigned type, unsigned counter, u64 *count) {
  FAIL_IF_TOLD(device);
  return ask_number(device, "ecc_uncorrected", count) ? OK : NOT_SUPPORTED;
}
int nvmlDeviceGetRemappedRows(
    void *device, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failed) {
  FAIL_IF_TOLD(device);
  *corrected = *uncorrected = *failed = 0;
  int code = tell_unsigned(device, "remap_pending", pending);
  tell_unsigned(device, "remap_failed", failed);
  return code;
}
int nvmlDeviceGetCurrentClocksEventReasons(void *device, u64 *reasons) {
  FAIL_IF_TOLD(device);
  return ask_number(device, "throttle", reasons) ? OK : NOT_SUPPORTED;
}

int nvmlEventSetCreate(void **set) {
  FAIL_IF_TOLD(NULL);
  memset(delivered, 0, sizeof delivered);
  *set = delivered;
  return OK;
}
int nvmlEventSetFree(void *set) { return OK; }
int nvmlDeviceRegisterEvents(void *device, u64 types, void *set) { FAIL_IF_TOLD(device); return OK; }

/* Each value of gpuN.xid is an event once: number#anything tells two of a number apart. */
int nvmlEventSetWait_v2(void *set, event_data *event, unsigned milliseconds) {
  FAIL_IF_TOLD(NULL);
  for (int gpu = 0; gpu < MOST_GPUS; gpu++) {
    char value[64];
    if (!ask(handle_of(gpu, -1), "xid", value, sizeof value)) continue;
    if (!strcmp(value, delivered[gpu])) continue;
    strcpy(delivered[gpu], value);
    *event = (event_data){handle_of(gpu, -1), XID_EVENT, strtoull(value, NULL, 10), ~0u, ~0u};
    return OK;
  }
  return TIMEOUT;
}
