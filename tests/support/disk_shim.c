/* A disk that is recorded and fails: loaded with LD_PRELOAD by tests/support/disk.py.

   DISK_RECORD names a file that gets each change of the recorded files, in order. DISK_FAILURES names a file with lines
   such as "fsync -wal": these calls fail with EIO on files whose names end so. Files of the store are those whose names
   contain ".db"; its -shm file is not durable. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE = 1, TRUNCATE = 2, SYNC = 3, DELETE = 4 };

static int is_durable(const char *path) {
    return strstr(path, ".db") != NULL && strstr(path, ".db-shm") == NULL && strstr(path, ".db.lock") == NULL;
}

static int path_of(int fd, char *path, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, size - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_durable(path);
}

static void record_path(uint32_t kind, const char *path, uint64_t offset, uint64_t size, const void *data) {
    static int file = -1;
    if (file < 0) file = open(getenv("DISK_RECORD"), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    struct { uint32_t kind, path; uint64_t offset, size; } head = {kind, strlen(path), offset, size};
    struct iovec parts[] = {{&head, sizeof head}, {(void *) path, head.path}, {(void *) data, data ? size : 0}};
    if (writev(file, parts, 3) < 0) abort();
}

static void record(uint32_t kind, int fd, uint64_t offset, uint64_t size, const void *data) {
    char path[4096];
    if (getenv("DISK_RECORD") && path_of(fd, path, sizeof path)) record_path(kind, path, offset, size, data);
}

static int fails(const char *call, int fd) {
    char path[4096], line[256];
    const char *name = getenv("DISK_FAILURES");
    if (!name || !path_of(fd, path, sizeof path)) return 0;
    int found = 0, saved = errno;
    FILE *order = fopen(name, "r");
    while (order && fgets(line, sizeof line, order)) {
        line[strcspn(line, "\n")] = 0;
        char *suffix = strchr(line, ' ');
        if (!suffix) continue;
        *suffix++ = 0;
        size_t end = strlen(suffix), length = strlen(path);
        if (!strcmp(line, call) && length >= end && !strcmp(path + length - end, suffix)) found = 1;
    }
    if (order) fclose(order);
    errno = found ? EIO : saved;
    return found;
}

#define REAL(name) ((__typeof__(&name)) dlsym(RTLD_NEXT, #name))

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    if (fails("pwrite", fd)) return -1;
    ssize_t written = REAL(pwrite64)(fd, data, size, offset);
    if (written > 0) record(WRITE, fd, offset, written, data);
    return written;
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return pwrite64(fd, data, size, offset); }

ssize_t pread64(int fd, void *data, size_t size, off64_t offset) {
    return fails("pread", fd) ? -1 : REAL(pread64)(fd, data, size, offset);
}

ssize_t pread(int fd, void *data, size_t size, off_t offset) { return pread64(fd, data, size, offset); }

int ftruncate64(int fd, off64_t size) {
    int result = REAL(ftruncate64)(fd, size);
    if (!result) record(TRUNCATE, fd, size, 0, NULL);
    return result;
}

int unlink(const char *path) {
    int result = REAL(unlink)(path);
    if (!result && getenv("DISK_RECORD") && is_durable(path)) record_path(DELETE, path, 0, 0, NULL);
    return result;
}

int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

int fsync(int fd) {
    if (fails("fsync", fd)) return -1;
    int result = REAL(fsync)(fd);
    if (!result) record(SYNC, fd, 0, 0, NULL);
    return result;
}

int fdatasync(int fd) {
    if (fails("fsync", fd)) return -1;
    int result = REAL(fdatasync)(fd);
    if (!result) record(SYNC, fd, 0, 0, NULL);
    return result;
}
