/* dlclose() unmaps the library, also after calls that failed on several threads: nothing of it hooks into the end of a thread.
 *
 *     unload PATH_OF_LIBRESHARD
 */
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <reshard.h>

typedef rs_status_t (*poll_fn)(const rs_container_t *);
typedef const char *(*text_fn)(void);
typedef rs_status_t (*log_fn)(rs_log_fn, void *, uint32_t);

static poll_fn poll_container;
static text_fn last_error;

static int is_mapped(const char *path) {
    char line[4096];
    int found = 0;
    FILE *maps = fopen("/proc/self/maps", "r");

    while (maps != NULL && fgets(line, sizeof line, maps) != NULL) {
        found |= strstr(line, path) != NULL;
    }
    if (maps != NULL) {
        fclose(maps);
    }
    return found;
}

static void *fail(void *unused) {
    (void)unused;
    if (poll_container(NULL) != RS_ERR_INVALID || strcmp(last_error(), "container is NULL") != 0) {
        fprintf(stderr, "unexpected: %s\n", last_error());
        exit(1);
    }
    return NULL;
}

static void ignore(void *user, uint32_t level, const char *label, const char *text) {
    (void)user, (void)level, (void)label, (void)text;
}

static void *symbol(void *library, const char *name) {
    void *found = dlsym(library, name);

    if (found == NULL) {
        fprintf(stderr, "%s\n", dlerror());
        exit(1);
    }
    return found;
}

int main(int argc, char **argv) {
    pthread_t other;
    log_fn set_log;
    void *library = argc > 1 ? dlopen(argv[1], RTLD_NOW | RTLD_LOCAL) : NULL;

    if (library == NULL || !is_mapped(argv[1])) {
        fprintf(stderr, "%s\n", argc > 1 ? dlerror() : "usage: unload PATH");
        return 1;
    }
    /* ISO C has no conversion from an object's address to a function's. */
    *(void **)&poll_container = symbol(library, "rs_container_poll");
    *(void **)&last_error = symbol(library, "rs_last_error");
    *(void **)&set_log = symbol(library, "rs_set_log");
    fail(NULL);
    if (pthread_create(&other, NULL, fail, NULL) != 0 || pthread_join(other, NULL) != 0) {
        return 1;
    }
    if (set_log(ignore, NULL, RS_LOG_TRACE) != RS_OK || set_log(NULL, NULL, RS_LOG_OFF) != RS_OK) {
        fprintf(stderr, "%s\n", last_error());
        return 1;
    }
    dlclose(library);
    if (is_mapped(argv[1])) {
        fprintf(stderr, "%s is still mapped after dlclose()\n", argv[1]);
        return 1;
    }
    puts("unloaded");
    return 0;
}
