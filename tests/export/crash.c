/* A library that is preloaded: ends the process, or says that the disk is full, at a chosen call
   of those that change files. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, FULL };
static int mode = COUNT;
static long at = -1, calls = 0;

/* From now on call number `n`, from 0, and the later ones fall under `what`. */
void crash_arm(int what, long n) { mode = what; at = n; calls = 0; }
long crash_calls(void) { return calls; }

/* Whether this call fails; it doesn't come back if the process ends here. */
static int reached(int takes_room) {
    long now = calls++;
    if (at < 0 || now < at) return 0;
    if (mode == KILL) kill(getpid(), SIGKILL);
    if (mode == FULL && takes_room) { errno = ENOSPC; return 1; }
    return 0;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define WRAP(type, name, room, parameters, arguments) \
    type name parameters { REAL(name); if (reached(room)) return -1; return real arguments; }

#define OPEN(name, first, more) \
    int name(first const char *path, int flags, ...) { \
        REAL(name); mode_t access = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); access = va_arg(rest, mode_t); va_end(rest); } \
        if (flags & (O_CREAT | O_TRUNC) && reached(1)) return -1; \
        return real(more path, flags, access); \
    }
#define COMMA ,
OPEN(open, , )
OPEN(open64, , )
OPEN(openat, int folder COMMA, folder COMMA)
OPEN(openat64, int folder COMMA, folder COMMA)

/* A kill in the middle of a write leaves its first half. */
ssize_t write(int file, const void *data, size_t size) {
    REAL(write);
    if (mode == KILL && at >= 0 && calls >= at && size > 1) real(file, data, size / 2);
    if (reached(1)) return -1;
    return real(file, data, size);
}
WRAP(ssize_t, writev, 1, (int file, const struct iovec *data, int n), (file, data, n))
WRAP(ssize_t, pwrite, 1, (int file, const void *data, size_t size, off_t to), (file, data, size, to))
WRAP(ssize_t, pwrite64, 1, (int file, const void *data, size_t size, off64_t to), (file, data, size, to))
WRAP(ssize_t, sendfile, 1, (int out, int in, off_t *from, size_t size), (out, in, from, size))
WRAP(ssize_t, sendfile64, 1, (int out, int in, off64_t *from, size_t size), (out, in, from, size))
WRAP(ssize_t, copy_file_range, 1, (int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags), (in, from, out, to, size, flags))
WRAP(int, ftruncate, 1, (int file, off_t size), (file, size))
WRAP(int, ftruncate64, 1, (int file, off64_t size), (file, size))
WRAP(int, mkdir, 1, (const char *path, mode_t access), (path, access))
WRAP(int, mkdirat, 1, (int folder, const char *path, mode_t access), (folder, path, access))
WRAP(int, link, 1, (const char *from, const char *to), (from, to))
WRAP(int, symlink, 1, (const char *from, const char *to), (from, to))
WRAP(int, rename, 0, (const char *from, const char *to), (from, to))
WRAP(int, renameat, 0, (int a, const char *from, int b, const char *to), (a, from, b, to))
WRAP(int, renameat2, 0, (int a, const char *from, int b, const char *to, unsigned flags), (a, from, b, to, flags))
WRAP(int, unlink, 0, (const char *path), (path))
WRAP(int, unlinkat, 0, (int folder, const char *path, int flags), (folder, path, flags))
WRAP(int, rmdir, 0, (const char *path), (path))
WRAP(int, chmod, 0, (const char *path, mode_t access), (path, access))
WRAP(int, fchmod, 0, (int file, mode_t access), (file, access))
WRAP(int, fsync, 0, (int file), (file))
