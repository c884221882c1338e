// Tries to get out. The payload says how, as a verb and an argument: "open /etc/passwd". The reply says what came of it.
//
// The interface of plugin.wit is written out by hand here, as the canonical ABI has it, so that it can be abused too.

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <wasi/api.h>

#define IMPORT(module, name) __attribute__((import_module(module), import_name(name)))
#define EXPORT(name) __attribute__((export_name(name)))

typedef struct { const char *text; size_t length; } String;
typedef struct { String name, value; } Attribute;
/// A result: whether it is an error, and its fault or its value.
typedef struct { uint8_t failed; String code, message; uint32_t details[2]; } Result;

IMPORT("tidegate:plugin/log@1.0.0", "emit")
void log_emit(int32_t level, const char *, size_t, const Attribute *, size_t);
IMPORT("tidegate:plugin/config@1.0.0", "get")
void config_get(const char *, size_t, uint32_t *);
IMPORT("tidegate:plugin/events@1.0.0", "publish")
void publish(const char *, size_t, const char *, size_t, const char *, size_t, const Attribute *, size_t, Result *);
IMPORT("tidegate:plugin/kv@1.0.0", "get")
void kv_get(const char *, size_t, const char *, size_t, Result *);
IMPORT("tidegate:plugin/kv@1.0.0", "set")
void kv_set(const char *, size_t, const char *, size_t, const char *, size_t, int32_t, int32_t, Result *);
IMPORT("wasi:sockets/instance-network@0.2.0", "instance-network")
int32_t network(void);
IMPORT("wasi:sockets/tcp-create-socket@0.2.0", "create-tcp-socket")
void create_tcp(int32_t family, int32_t *);
IMPORT("wasi:sockets/tcp@0.2.0", "[method]tcp-socket.start-listen")
void listen_tcp(int32_t socket, uint8_t *);
IMPORT("wasi:sockets/udp-create-socket@0.2.0", "create-udp-socket")
void create_udp(int32_t family, int32_t *);
IMPORT("wasi:sockets/ip-name-lookup@0.2.0", "resolve-addresses")
void resolve(int32_t network, const char *, size_t, int32_t *);

#define OUTSIDE ((char *)0xfffffff0)

static int unruly_realloc;

EXPORT("cabi_realloc")
void *cabi_realloc(void *old, size_t old_size, size_t align, size_t size) {
    (void)old_size, (void)align;
    return unruly_realloc ? OUTSIDE : realloc(old, size);
}

static char answer[512];

static void say(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(answer, sizeof answer, format, arguments);
    va_end(arguments);
}

static const char *error_name(int number) {
    switch (number) {
    case EACCES: return "EACCES";
    case EBADF: return "EBADF";
    case EINVAL: return "EINVAL";
    case ENOENT: return "ENOENT";
    case ENOMEM: return "ENOMEM";
    case ENOSYS: return "ENOSYS";
    case ENOTCAPABLE: return "ENOTCAPABLE";
    case ENOTSUP: return "ENOTSUP";
    case EPERM: return "EPERM";
    default: snprintf(answer, sizeof answer, "errno %d", number); return answer;
    }
}

static void said(long result) {
    if (result < 0) say("error %s", error_name(errno));
    else say("done");
}

static void told(const Result *result) {
    if (result->failed) say("fault `%.*s`", (int)result->code.length, result->code.text);
    else say("done");
}

static void socket_made(const int32_t *made) {
    // The places of two of the error codes in escape.wit.
    enum { ACCESS_DENIED = 1, PERMANENT_RESOLVER_FAILURE = 20 };
    int code = (uint8_t)made[1];
    if ((uint8_t)made[0] == 0) say("made");
    else if (code == ACCESS_DENIED) say("error access-denied");
    else if (code == PERMANENT_RESOLVER_FAILURE) say("error permanent-resolver-failure");
    else say("error %d", code);
}

static volatile int zero = 0;
static volatile float large = 1e30f;
static void *volatile allocated;

__attribute__((noinline)) static int deep(volatile char *above) {
    volatile char frame[256];
    frame[0] = above ? above[0] : 1;
    return deep(frame) + frame[0];
}

static int three(int a, int b, int c) { return a + b + c; }
static void *volatile function = (void *)three;

static void publish_with(const char *type, const char *name, const char *value, Result *result) {
    Attribute attribute = {{name, strlen(name)}, {value, strlen(value)}};
    publish(type, strlen(type), "application/json", 16, "1", 1, &attribute, *name ? 1 : 0, result);
}

static void set(const char *bucket, const char *key, size_t key_length, const char *value, size_t length) {
    Result result = {0};
    kv_set(bucket, strlen(bucket), key, key_length, value, length, 0, 0, &result);
    told(&result);
}

static int is(const char *verb, const char *expected) { return strcmp(verb, expected) == 0; }

static void files(const char *verb, const char *path) {
    char buffer[64];
    if (is(verb, "open")) said(open(path, O_RDONLY));
    else if (is(verb, "create")) said(open(path, O_WRONLY | O_CREAT, 0600));
    else if (is(verb, "unlink")) said(unlink(path));
    else if (is(verb, "mkdir")) said(mkdir(path, 0700));
    else if (is(verb, "opendir")) said(opendir(path) ? 0 : -1);
    else if (is(verb, "symlink")) said(symlink("/etc/passwd", path));
    else if (is(verb, "readlink")) said(readlink(path, buffer, sizeof buffer));
    else if (is(verb, "rename")) said(rename(path, "other"));
    else if (is(verb, "stat")) { struct stat found; said(stat(path, &found)); }
    else if (is(verb, "preopens")) {
        int count = 0;
        __wasi_prestat_t found;
        for (int fd = 0; fd < 100; fd++) count += __wasi_fd_prestat_get(fd, &found) == 0;
        say("%d preopened folders", count);
    } else if (is(verb, "path-open")) {
        __wasi_fd_t opened;
        errno = __wasi_path_open(3, 0, "etc/passwd", 0, 0, 0, 0, &opened);
        said(errno ? -1 : 0);
    } else if (is(verb, "descriptors")) {
        int written = 0;
        for (int fd = 3; fd < 100; fd++) written += write(fd, "x", 1) >= 0;
        say("%d of 97 written to, error %s", written, error_name(errno));
    } else if (is(verb, "stdin")) say("%d bytes", (int)read(0, buffer, sizeof buffer));
}

static void surroundings(const char *verb, const char *name) {
    struct timespec now = {0}, length = {atoi(name), 1000000};
    if (is(verb, "getenv")) say("%s", getenv(name) ? getenv(name) : "not set");
    else if (is(verb, "environment")) {
        size_t count = 9, size = 9;
        errno = __wasi_environ_sizes_get(&count, &size);
        say("%d variables", (int)count);
    } else if (is(verb, "arguments")) {
        size_t count = 9, size = 9;
        errno = __wasi_args_sizes_get(&count, &size);
        say("%d arguments", (int)count);
    } else if (is(verb, "time")) {
        clock_gettime(CLOCK_REALTIME, &now);
        say("%s", now.tv_sec > 1700000000 ? "the time" : "no time");
    } else if (is(verb, "monotonic")) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        say("%s", now.tv_sec || now.tv_nsec ? "the time" : "no time");
    } else if (is(verb, "random")) {
        uint64_t draws[2] = {0};
        getentropy(draws, sizeof draws);
        say("%s", draws[0] != draws[1] ? "random numbers" : "no random numbers");
    } else if (is(verb, "sleep")) {
        nanosleep(&length, 0);
        say("slept");
    } else if (is(verb, "stdout")) {
        puts(name);
        fflush(stdout);
        say("done");
    } else if (is(verb, "stderr")) {
        fputs(name, stderr);
        say("done");
    }
}

static void sockets(const char *verb, const char *name) {
    int32_t made[4] = {0};
    uint8_t listening[2] = {0};
    if (is(verb, "tcp")) create_tcp(atoi(name), made), socket_made(made);
    else if (is(verb, "udp")) create_udp(atoi(name), made), socket_made(made);
    else if (is(verb, "resolve")) resolve(network(), name, strlen(name), made), socket_made(made);
    else if (is(verb, "forged-handle")) listen_tcp(4711, listening), say("listening");
    else if (is(verb, "accept")) {
        __wasi_fd_t accepted;
        errno = __wasi_sock_accept(3, 0, &accepted);
        said(errno ? -1 : 0);
    }
}

static void crimes(const char *verb, const char *name) {
    if (is(verb, "exit")) exit(atoi(name));
    else if (is(verb, "abort")) abort();
    else if (is(verb, "raise")) raise(atoi(name));
    else if (is(verb, "trap")) __builtin_trap();
    else if (is(verb, "divide")) say("%d", 7 / zero);
    else if (is(verb, "convert")) say("%d", __builtin_wasm_trunc_s_i32_f32(large));
    else if (is(verb, "read-outside")) say("%d", *(volatile char *)OUTSIDE);
    else if (is(verb, "write-outside")) *(volatile char *)OUTSIDE = 1;
    else if (is(verb, "read-null")) say("its own byte %d", *(volatile char *)(uintptr_t)zero);
    else if (is(verb, "wrong-function")) say("%d", (int)((double (*)(double))function)(1.0));
    else if (is(verb, "no-function")) say("%d", ((int (*)(void))(uintptr_t)(0x7fffffff + zero))());
    else if (is(verb, "overflow-stack")) say("%d", deep(0));
    else if (is(verb, "spin")) for (;;) zero = 0;
    else if (is(verb, "allocate")) {
        int mib = 0;
        while ((allocated = malloc(1 << 20))) mib++;
        say("NULL %s 64 MiB", mib < 64 ? "before" : "after");
    } else if (is(verb, "grow")) say("%d", (int)__builtin_wasm_memory_grow(0, 65000));
}

static void abuses(const char *verb) {
    Result result = {0};
    say("done");
    if (is(verb, "key-outside")) set("own", OUTSIDE, 100, "", 0);
    else if (is(verb, "length-outside")) set("own", "k", 0xffffffff, "", 0);
    else if (is(verb, "key-not-utf8")) set("own", "\xff\xfe", 2, "", 0);
    else if (is(verb, "list-outside")) publish("own.a.b", 7, "", 0, "", 0, (Attribute *)16, 0x10000000, &result);
    else if (is(verb, "result-outside")) kv_get("own", 3, "k", 1, (Result *)OUTSIDE);
    else if (is(verb, "result-unaligned")) kv_get("own", 3, "k", 1, (Result *)((char *)&result + 1));
    else if (is(verb, "unruly-realloc")) {
        uint32_t setting[3];
        unruly_realloc = 1;
        config_get("greeting", 8, setting);
    } else say("unknown: %s", verb);
}

static void powers(const char *verb, const char *name) {
    Result result = {0};
    uint32_t setting[3] = {0};
    char *big;
    if (is(verb, "kv-get")) kv_get(name, strlen(name), "k", 1, &result), told(&result);
    else if (is(verb, "kv-set")) set(name, "k", 1, "1", 1);
    else if (is(verb, "kv-key")) set("own", name, strlen(name), "1", 1);
    else if (is(verb, "kv-key-nul")) set("own", "a\0b", 3, "1", 1);
    else if (is(verb, "kv-key-long")) {
        big = malloc(1000);
        memset(big, 'k', 1000);
        set("own", big, 1000, "1", 1);
    } else if (is(verb, "kv-value-big")) set("own", "k", 1, calloc(9, 1 << 20), 9 << 20);
    else if (is(verb, "config")) {
        config_get(name, strlen(name), setting);
        say("%.*s", setting[0] & 1 ? (int)setting[2] : 0, (char *)(uintptr_t)setting[1]);
    } else if (is(verb, "publish")) publish_with(name, "", "", &result), told(&result);
    else if (is(verb, "attribute")) publish_with("own.things.create", name, "forged", &result), told(&result);
    else if (is(verb, "publish-many")) {
        for (int n = 0; n < 101 && !result.failed; n++) publish_with("own.things.create", "", "", &result);
        told(&result);
    } else if (is(verb, "log-long")) {
        big = malloc(10 << 20);
        memset(big, 'l', 10 << 20);
        log_emit(255, big, 10 << 20, 0, 0);
        say("done");
    }
}

// What is returned: result<option<reply>, failure>. Only the reply is ever used.
static struct { uint8_t failed; uint8_t pad[3]; uint8_t some; uint8_t pad2[3]; String content_type, body; uint8_t rest[32]; } returned;

EXPORT("tidegate:plugin/handler@1.0.0#handle")
void *handle(char *id, size_t id_length, uint64_t sequence, char *type, size_t type_length, char *source,
             size_t source_length, uint64_t created, char *content_type, size_t content_type_length, char *payload,
             size_t length, Attribute *attributes, size_t count) {
    (void)id, (void)id_length, (void)sequence, (void)type, (void)type_length, (void)source, (void)source_length;
    (void)created, (void)content_type, (void)content_type_length, (void)attributes, (void)count;
    static char command[256];
    memcpy(command, payload, length < 255 ? length : 255);
    char *argument = strchr(command, ' ');
    if (argument) *argument++ = 0;
    else argument = "";
    abuses(command);
    files(command, argument);
    surroundings(command, argument);
    sockets(command, argument);
    crimes(command, argument);
    powers(command, argument);
    if (is(command, "return-outside")) return OUTSIDE;
    if (is(command, "return-unaligned")) return (char *)&returned + 1;
    returned.some = 1;
    returned.content_type = (String){"text/plain", 10};
    returned.body = (String){answer, strlen(answer)};
    if (is(command, "return-no-case")) returned.failed = 7;
    if (is(command, "return-body-outside")) returned.body = (String){OUTSIDE, 100};
    if (is(command, "return-not-utf8")) returned.content_type = (String){"\xff", 1};
    return &returned;
}
