// Stands in for NVSHMEM's host library: no peers, no GPU, plain memory. FAKE_NVSHMEM names what goes wrong, "what:rank"; FAKE_NVSHMEM_LOG a
// file that is told how it was started.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int state = 0, pe = -1, num_pes = -1;

static int goes_wrong(const char* what) {
    const char* plan = getenv("FAKE_NVSHMEM");
    char wanted[64];
    snprintf(wanted, sizeof(wanted), "%s:%d", what, pe);
    return plan != NULL && strcmp(plan, wanted) == 0;
}

static int version_word(const void* structure) {
    int word;
    memcpy(&word, structure, sizeof(word));
    return word;
}

void nvshmemx_vendor_get_version_info(int* major, int* minor, int* patch) {
    const char* version = getenv("FAKE_NVSHMEM_VERSION");
    sscanf(version != NULL ? version : "3.4.5", "%d.%d.%d", major, minor, patch);
}

int nvshmemx_get_uniqueid(void* id) {
    if (version_word(id) != (1 << 16) + 128) return 1;
    snprintf((char*)id + 4, 124, "made by %d", (int)getpid());
    pe = 0;  // whoever makes the id
    return goes_wrong("id") ? 7 : 0;
}

int nvshmemx_set_attr_uniqueid_args(int rank, int num_ranks, const void* id, void* attributes) {
    if (version_word(id) != (1 << 16) + 128 || version_word(attributes) != (1 << 16) + 144) return 1;
    if (version_word((char*)attributes + 16) != (1 << 16) + 128) return 1;
    const struct { int version; const void* id; int rank, num_ranks; } arguments = {(1 << 16) + 24, id, rank, num_ranks};
    memcpy((char*)attributes + 24, &arguments, sizeof(arguments));
    return 0;
}

int nvshmemx_hostlib_init_attr(unsigned flags, void* attributes) {
    struct { int version; const void* id; int rank, num_ranks; } arguments;
    memcpy(&arguments, (char*)attributes + 24, sizeof(arguments));
    if (flags != 8 || arguments.version != (1 << 16) + 24) return 1;
    pe = arguments.rank;
    num_pes = arguments.num_ranks;
    if (goes_wrong("init")) return 7;
    if (goes_wrong("hang")) sleep(1000);
    state = goes_wrong("shared") ? 3 : 2;
    if (goes_wrong("elsewhere")) pe = num_pes;
    const char* log = getenv("FAKE_NVSHMEM_LOG");
    FILE* file = log != NULL ? fopen(log, "a") : NULL;
    if (file != NULL) {
        const char* level = getenv("NVSHMEM_IB_SL");
        fprintf(file, "%d of %d, %s, level %s\n", pe, num_pes, (const char*)arguments.id + 4, level != NULL ? level : "none");
        fclose(file);
    }
    return 0;
}

int nvshmemx_init_status(void) { return state; }
int nvshmem_my_pe(void) { return pe; }
int nvshmem_n_pes(void) { return num_pes; }
void nvshmem_quiet(void) {
    if (goes_wrong("quiet")) sleep(1000);
}
void* nvshmem_align(size_t alignment, size_t size) { return goes_wrong("memory") ? NULL : aligned_alloc(alignment, size); }
