// The ring of transports/ring.py in C++: same memory layout, same protocol, step for step. Built and run by ops/bench_ring.py.
//
//   ring_peer write RING COUNT BATCH          ring_peer read RING SLOT COUNT
//   ring_peer ping RING_OUT RING_IN SLOT_IN COUNT    ring_peer pong RING_IN SLOT_IN RING_OUT COUNT
//
// The harness creates the rings and registers the reader slots. Each role prints "ready", then its result as JSON.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <vector>
#include <x86intrin.h>

namespace {

constexpr size_t HEADER_BYTES = 8192;
constexpr size_t CAPACITY = 2, MODE = 4, PUBLISHED = 16, CLAIMED = 32, GATE = 48, JOINS_SEEN = 51, WRITER_HEARTBEAT_NS = 65, READERS_USED = 80, JOINS = 81;
constexpr size_t READERS_AT = 128, READER_WORDS = 32;
constexpr size_t CURSOR = 0, STATE = 16, HEARTBEAT_NS = 17, CHECK_UNTIL = 20, POLLS = 21;
constexpr uint64_t ACTIVE = 2;
constexpr int64_t BATCH_MAX = 256;
constexpr uint64_t WINDOW = 1 << 16;

struct alignas(64) Record { uint64_t words[8]; };
static_assert(sizeof(Record) == 64);

int64_t monotonic_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1'000'000'000LL + now.tv_nsec;
}

struct Ring {
    std::atomic<uint64_t>* words;
    Record* slots;
    uint64_t capacity;

    uint64_t plain(size_t at) const { return words[at].load(std::memory_order_relaxed); }
    void put(size_t at, uint64_t value) { words[at].store(value, std::memory_order_relaxed); }
    uint64_t acquire(size_t at) const { return words[at].load(std::memory_order_acquire); }
    void release(size_t at, uint64_t value) { words[at].store(value, std::memory_order_release); }
};

Ring attach(const char* name) {
    std::string path = std::string("/dev/shm/tickmesh-") + name;
    int fd = open(path.c_str(), O_RDWR);
    struct stat about;
    if (fd < 0 || fstat(fd, &about)) { perror(path.c_str()); exit(2); }
    void* memory = mmap(nullptr, about.st_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (memory == MAP_FAILED) { perror("mmap"); exit(2); }
    close(fd);
    auto* words = static_cast<std::atomic<uint64_t>*>(memory);
    return {words, reinterpret_cast<Record*>(static_cast<char*>(memory) + HEADER_BYTES), words[CAPACITY].load()};
}

// ---------------------------------------------------------------- writer

uint64_t slowest_reader(Ring& ring) {
    uint64_t slowest = ring.plain(PUBLISHED);
    for (uint64_t reader = 0; reader < ring.acquire(READERS_USED); reader++) {
        size_t base = READERS_AT + reader * READER_WORDS;
        if (ring.acquire(base + STATE) == ACTIVE) slowest = std::min(slowest, ring.acquire(base + CURSOR));
    }
    ring.put(GATE, slowest);
    return slowest;
}

int64_t free_slots(Ring& ring, int64_t wanted) {
    if (ring.plain(MODE) != 0) return ring.capacity >> 2;
    uint64_t held = ring.plain(PUBLISHED) - ring.plain(GATE), joins = ring.acquire(JOINS);
    if (held + wanted > ring.capacity || joins != ring.plain(JOINS_SEEN)) {
        ring.put(JOINS_SEEN, joins);
        held = ring.plain(PUBLISHED) - slowest_reader(ring);
    }
    return held < ring.capacity ? ring.capacity - held : 0;
}

__attribute__((noinline)) int64_t write_some(Ring& ring, const Record* batch, int64_t count) {
    int64_t taken = std::min(count, free_slots(ring, count));
    if (taken <= 0) return 0;
    uint64_t position = ring.plain(PUBLISHED), mask = ring.capacity - 1;
    if (position + taken > ring.plain(CLAIMED)) ring.release(CLAIMED, position + taken);
    for (int64_t i = 0; i < taken; i++) ring.slots[(position + i) & mask] = batch[i];
    ring.release(PUBLISHED, position + taken);
    if ((position ^ (position + taken)) >> 10) ring.put(WRITER_HEARTBEAT_NS, monotonic_ns());
    return taken;
}

void write_batch(Ring& ring, const Record* batch, int64_t count) {
    for (int64_t done = 0; done < count;) {
        int64_t taken = write_some(ring, batch + done, count - done);
        if (taken == 0) _mm_pause();
        done += taken;
    }
}

// ---------------------------------------------------------------- reader

void show_life(Ring& ring, size_t base, uint64_t available) {
    uint64_t polls = ring.plain(base + POLLS) + 1;
    ring.release(base + POLLS, polls);
    if ((polls & 63) == 0 || available > ring.capacity >> 1) ring.put(base + HEARTBEAT_NS, monotonic_ns());
}

[[noreturn]] void not_ours(const char* what) {
    fprintf(stderr, "ring_peer: %s: only an active reader of a lossless ring is measured\n", what);
    exit(3);
}

__attribute__((noinline)) int64_t read_copy(Ring& ring, size_t base, Record* out, int64_t maximum, int64_t available) {
    uint64_t cursor = ring.plain(base + CURSOR), mask = ring.capacity - 1;
    int64_t count = std::min(available, maximum);
    for (int64_t i = 0; i < count; i++) out[i] = ring.slots[(cursor + i) & mask];
    show_life(ring, base, available);
    if (ring.acquire(base + STATE) != ACTIVE) not_ours("released");
    ring.release(base + CURSOR, cursor + count);
    return count;
}

inline int64_t read_batch(Ring& ring, size_t base, Record* out, int64_t maximum) {
    uint64_t cursor = ring.plain(base + CURSOR);
    int64_t available = ring.acquire(PUBLISHED) - cursor;
    if (available == 0) { show_life(ring, base, 0); return 0; }
    if (ring.plain(MODE) != 0 || cursor < ring.plain(base + CHECK_UNTIL) || ring.acquire(base + STATE) != ACTIVE) not_ours("in doubt");
    return read_copy(ring, base, out, maximum, available);
}

// ---------------------------------------------------------------- roles

Record buffer[BATCH_MAX];

void ready() { puts("ready"); fflush(stdout); }

void produce(Ring ring, uint64_t count, int64_t batch) {
    ready();
    for (uint64_t sent = 0; sent < count;) {
        int64_t size = std::min<uint64_t>(batch, count - sent);
        for (int64_t i = 0; i < size; i++) buffer[i].words[0] = sent + i;
        write_batch(ring, buffer, size);
        sent += size;
    }
    puts("{}");
}

void consume(Ring ring, size_t base, uint64_t count) {
    if (count < 3 * WINDOW) { fprintf(stderr, "ring_peer: read at least %lu records\n", (unsigned long)(3 * WINDOW)); exit(2); }
    ready();
    uint64_t got = 0, sum = 0;
    std::vector<int64_t> marks, windows;
    marks.reserve(count / WINDOW + 1);
    while (got < count) {
        int64_t size = read_batch(ring, base, buffer, BATCH_MAX);
        if (size == 0) { _mm_pause(); continue; }
        if (got >= marks.size() * WINDOW) marks.push_back(monotonic_ns());
        for (int64_t i = 0; i < size; i++) sum += buffer[i].words[0];
        got += size;
    }
    for (size_t i = 1; i < marks.size(); i++) windows.push_back(marks[i] - marks[i - 1]);
    std::sort(windows.begin(), windows.end());
    double middle = (windows[(windows.size() - 1) / 2] + windows[windows.size() / 2]) / 2.0;
    printf("{\"ns_per_record\": %.3f, \"sum\": %lu}\n", middle / WINDOW, (unsigned long)sum);
}

void ping(Ring out, Ring in, size_t base, uint64_t count) {
    std::vector<uint64_t> times(count);
    ready();
    int64_t begun = monotonic_ns();
    uint64_t first = __rdtsc();
    for (uint64_t i = 0; i < count; i++) {
        uint64_t sent = __rdtsc();
        buffer[0].words[0] = i;
        write_batch(out, buffer, 1);
        while (read_batch(in, base, buffer, 1) == 0) _mm_pause();
        times[i] = __rdtsc() - sent;
    }
    double ns_per_tick = double(monotonic_ns() - begun) / double(__rdtsc() - first);
    std::sort(times.begin() + count / 10, times.end());
    auto at = [&](double part) { return times[count / 10 + size_t((count - count / 10 - 1) * part)] * ns_per_tick; };
    printf("{\"p50_ns\": %.1f, \"p99_ns\": %.1f}\n", at(0.50), at(0.99));
}

void pong(Ring in, size_t base, Ring out, uint64_t count) {
    ready();
    for (uint64_t i = 0; i < count; i++) {
        while (read_batch(in, base, buffer, 1) == 0) _mm_pause();
        write_batch(out, buffer, 1);
    }
    puts("{}");
}

size_t slot_base(const char* slot) { return READERS_AT + strtoull(slot, nullptr, 10) * READER_WORDS; }
uint64_t number(const char* text) { return strtoull(text, nullptr, 10); }

}  // namespace

int main(int argc, char** argv) {
    std::string role = argc > 1 ? argv[1] : "";
    if (role == "write" && argc == 5) produce(attach(argv[2]), number(argv[3]), std::min<int64_t>(number(argv[4]), BATCH_MAX));
    else if (role == "read" && argc == 5) consume(attach(argv[2]), slot_base(argv[3]), number(argv[4]));
    else if (role == "ping" && argc == 6) ping(attach(argv[2]), attach(argv[3]), slot_base(argv[4]), number(argv[5]));
    else if (role == "pong" && argc == 6) pong(attach(argv[2]), slot_base(argv[3]), attach(argv[4]), number(argv[5]));
    else { fprintf(stderr, "see the first lines of ring_peer.cpp\n"); return 2; }
}
