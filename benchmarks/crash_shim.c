/* What benchmarks/crash.py preloads: every operation that changes a file in one folder is counted, and one of them ends
 * the process, fails with an errno, or is the last before a power cut. It stands between the process and the C library,
 * so it also sees what compiled code writes. Nothing is done before crash_start().
 *
 * An operation is logged as a line "op, offset, length, path, other path" (tabs between, \0 after), then its bytes. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, LOG, KILL, FAIL, CUT };
struct shared { atomic_long count; atomic_flag busy; };
static struct shared *shared;
static int mode = OFF, error_number, lasting, log_fd = -1;
static long at;
static char folder[PATH_MAX];
static size_t folder_length;

void crash_start(const char *path, struct shared *page, int how, long when, int number, int lasts, int descriptor) {
    strcpy(folder, path);
    folder_length = strlen(path);
    shared = page, at = when, error_number = number, lasting = lasts, log_fd = descriptor, mode = how;
}

#define REAL(name) ({ static __typeof__(&name) real; if (!real) real = dlsym(RTLD_NEXT, #name); real; })
#define LOGGED (mode == LOG || mode == CUT)

static int path_of(int fd, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, out, PATH_MAX - 1);
    out[size < 0 ? 0 : size] = 0;
    return size > 0;
}

static void whole_path(int dir, const char *path, char *out) {
    char place[PATH_MAX] = "";
    if (path[0] != '/' && (dir == AT_FDCWD ? getcwd(place, PATH_MAX) == NULL : !path_of(dir, place))) place[0] = 0;
    if (snprintf(out, PATH_MAX, path[0] == '/' ? "%s%s" : "%s/%s", place, path) >= PATH_MAX) out[0] = 0;
}

static int inside(const char *path) {
    return mode != OFF && !strncmp(path, folder, folder_length) && (path[folder_length] == '/' || !path[folder_length]);
}

/* Returns 0 where the operation is to be made, an errno where it is to fail, and -1 where half of it is the last. */
static int begin(int can_be_halved) {
    while (LOGGED && atomic_flag_test_and_set(&shared->busy)) sched_yield(); /* the log has the order of the files */
    long number = atomic_fetch_add(&shared->count, 1) + 1;
    if ((mode == KILL && number == at && !can_be_halved) || (mode == CUT && number >= at)) kill(getpid(), SIGKILL), pause();
    if (mode == FAIL && (number == at || (lasting && number > at))) return error_number;
    return mode == KILL && number == at ? -1 : 0;
}

static void end(const char *op, int made, long long offset, long long size, const char *path, const void *more) {
    int before = errno;
    if (!LOGGED) return;
    if (made) {
        char line[2 * PATH_MAX + 100];
        int data = !strcmp(op, "write");
        int length = snprintf(line, sizeof line, "%s\t%lld\t%lld\t%s\t%s", op, offset, size, path, data || !more ? "" : (const char *)more);
        syscall(SYS_write, log_fd, line, length + 1);
        if (data) syscall(SYS_write, log_fd, more, size);
    }
    atomic_flag_clear(&shared->busy);
    errno = before;
}

/* An operation on names: made by CALL, which gives 0 or a descriptor, and -1 where it fails. */
#define ON_NAMES(op, size, path, other, CALL) do { \
    int failing = begin(0), result; \
    if (failing) return errno = failing, -1; \
    result = CALL; \
    end(op, result >= 0, 0, size, path, other); \
    return result; } while (0)

static int opened(int dir, const char *path, int flags, mode_t rights) {
    char place[PATH_MAX];
    struct stat found;
    whole_path(dir, path, place);
    if (flags & (O_CREAT | O_TRUNC) && (flags & O_TMPFILE) != O_TMPFILE && inside(place)) {
        int there = !stat(place, &found);
        if (!there && flags & O_CREAT) ON_NAMES("create", 0, place, NULL, REAL(openat)(dir, path, flags, rights));
        if (there && flags & O_TRUNC && found.st_size)
            ON_NAMES("truncate", 0, place, NULL, REAL(openat)(dir, path, flags, rights));
    }
    return REAL(openat)(dir, path, flags, rights);
}

#define RIGHTS mode_t rights = 0; \
    if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) { va_list rest; va_start(rest, flags); rights = va_arg(rest, mode_t); va_end(rest); }
int open(const char *path, int flags, ...) { RIGHTS return opened(AT_FDCWD, path, flags, rights); }
int open64(const char *path, int flags, ...) { RIGHTS return opened(AT_FDCWD, path, flags, rights); }
int openat(int dir, const char *path, int flags, ...) { RIGHTS return opened(dir, path, flags, rights); }
int openat64(int dir, const char *path, int flags, ...) { RIGHTS return opened(dir, path, flags, rights); }
int creat(const char *path, mode_t rights) { return opened(AT_FDCWD, path, O_CREAT | O_TRUNC | O_WRONLY, rights); }

static ssize_t written(int fd, const void *data, size_t size, off_t offset) {
    char place[PATH_MAX];
    if (mode == OFF || fd == log_fd || !path_of(fd, place) || !inside(place))
        return offset < 0 ? REAL(write)(fd, data, size) : REAL(pwrite)(fd, data, size, offset);
    int failing = begin(1);
    if (failing > 0) return errno = failing, -1;
    if (failing < 0) size /= 2;
    ssize_t result = offset < 0 ? REAL(write)(fd, data, size) : REAL(pwrite)(fd, data, size, offset);
    if (failing < 0) kill(getpid(), SIGKILL), pause();
    if (LOGGED && result > 0 && offset < 0) offset = lseek(fd, 0, SEEK_CUR) - result;
    end("write", result > 0, offset, result, place, data);
    return result;
}

ssize_t write(int fd, const void *data, size_t size) { return written(fd, data, size, -1); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return written(fd, data, size, offset); }
ssize_t pwrite64(int fd, const void *data, size_t size, off_t offset) { return written(fd, data, size, offset); }

ssize_t writev(int fd, const struct iovec *parts, int count) { /* only the first part, which callers go on from */
    char place[PATH_MAX];
    if (mode == OFF || !path_of(fd, place) || !inside(place)) return REAL(writev)(fd, parts, count);
    while (count > 1 && !parts->iov_len) parts++, count--;
    return written(fd, parts->iov_base, parts->iov_len, -1);
}

/* Copies within the kernel are refused, as some file systems do, so that callers read and write. */
#define NOT_COPIED(number, CALL) do { \
    char place[PATH_MAX]; \
    if (mode != OFF && path_of(out, place) && inside(place)) return errno = number, -1; \
    return CALL; } while (0)
ssize_t sendfile(int out, int in, off_t *offset, size_t size) { NOT_COPIED(ENOTSOCK, syscall(SYS_sendfile, out, in, offset, size)); }
ssize_t sendfile64(int out, int in, off_t *offset, size_t size) { NOT_COPIED(ENOTSOCK, syscall(SYS_sendfile, out, in, offset, size)); }
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    NOT_COPIED(ENOSYS, syscall(SYS_copy_file_range, in, from, out, to, size, flags));
}

static int resized(int fd, off_t size) {
    char place[PATH_MAX];
    if (mode == OFF || !path_of(fd, place) || !inside(place)) return syscall(SYS_ftruncate, fd, size);
    ON_NAMES("truncate", size, place, NULL, (int)syscall(SYS_ftruncate, fd, size));
}
int ftruncate(int fd, off_t size) { return resized(fd, size); }
int ftruncate64(int fd, off_t size) { return resized(fd, size); }

static int synced(int fd, int (*real)(int)) {
    char place[PATH_MAX];
    if (mode == OFF || !path_of(fd, place) || !inside(place)) return real(fd);
    ON_NAMES("sync", 0, place, NULL, real(fd));
}
int fsync(int fd) { return synced(fd, REAL(fsync)); }
int fdatasync(int fd) { return synced(fd, REAL(fdatasync)); }

static int renamed(int from_dir, const char *from, int to_dir, const char *to, unsigned flags) {
    char old[PATH_MAX], new[PATH_MAX];
    whole_path(from_dir, from, old), whole_path(to_dir, to, new);
    if (!inside(old) && !inside(new)) return syscall(SYS_renameat2, from_dir, from, to_dir, to, flags);
    ON_NAMES(flags & 2 ? "exchange" : "rename", 0, old, new, (int)syscall(SYS_renameat2, from_dir, from, to_dir, to, flags));
}
int rename(const char *from, const char *to) { return renamed(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int a, const char *from, int b, const char *to) { return renamed(a, from, b, to, 0); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) { return renamed(a, from, b, to, flags); }

static int removed(int dir, const char *path, int flags) {
    char place[PATH_MAX];
    whole_path(dir, path, place);
    if (!inside(place)) return syscall(SYS_unlinkat, dir, path, flags);
    ON_NAMES("remove", 0, place, NULL, (int)syscall(SYS_unlinkat, dir, path, flags));
}
int unlink(const char *path) { return removed(AT_FDCWD, path, 0); }
int unlinkat(int dir, const char *path, int flags) { return removed(dir, path, flags); }
int rmdir(const char *path) { return removed(AT_FDCWD, path, AT_REMOVEDIR); }

static int folder_made(int dir, const char *path, mode_t rights) {
    char place[PATH_MAX];
    struct stat found;
    whole_path(dir, path, place);
    if (!inside(place) || !stat(place, &found)) return syscall(SYS_mkdirat, dir, path, rights);
    ON_NAMES("mkdir", 0, place, NULL, (int)syscall(SYS_mkdirat, dir, path, rights));
}
int mkdir(const char *path, mode_t rights) { return folder_made(AT_FDCWD, path, rights); }
int mkdirat(int dir, const char *path, mode_t rights) { return folder_made(dir, path, rights); }
