/* Paces every TCP connection that a process opens to as many bytes per second as the file PACE_FILE holds then; 0 or no
   file: not at all. Linux sends no faster, on loopback too, and without root. Loaded by LD_PRELOAD. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

#ifndef SO_MAX_PACING_RATE
#define SO_MAX_PACING_RATE 47
#endif

static int paced(int connection) {
    const char *path = getenv("PACE_FILE");
    FILE *file = connection < 0 || path == NULL ? NULL : fopen(path, "r");
    unsigned long long rate = 0;
    if (file != NULL) {
        if (fscanf(file, "%llu", &rate) != 1) rate = 0;
        fclose(file);
    }
    uint64_t wanted = rate;
    if (wanted > 0 && setsockopt(connection, SOL_SOCKET, SO_MAX_PACING_RATE, &wanted, sizeof wanted) != 0)
        perror("SO_MAX_PACING_RATE");
    return connection;
}

int socket(int domain, int type, int protocol) {
    static int (*next)(int, int, int);
    if (next == NULL) next = (int (*)(int, int, int))dlsym(RTLD_NEXT, "socket");
    int made = next(domain, type, protocol);
    int stream = (domain == AF_INET || domain == AF_INET6) && (type & 0xf) == SOCK_STREAM;
    return stream ? paced(made) : made;
}

int accept(int listening, struct sockaddr *address, socklen_t *length) {
    static int (*next)(int, struct sockaddr *, socklen_t *);
    if (next == NULL) next = (int (*)(int, struct sockaddr *, socklen_t *))dlsym(RTLD_NEXT, "accept");
    return paced(next(listening, address, length));
}

int accept4(int listening, struct sockaddr *address, socklen_t *length, int flags) {
    static int (*next)(int, struct sockaddr *, socklen_t *, int);
    if (next == NULL) next = (int (*)(int, struct sockaddr *, socklen_t *, int))dlsym(RTLD_NEXT, "accept4");
    return paced(next(listening, address, length, flags));
}
