// What tickmesh's generated SBE decoder is measured against: a decoder written by hand for the two messages of the benchmark's schema, from
// a stream of framed messages to the same 64-byte events, ladders of price levels included. Called by bench_sbe.py.
//
// It is what a careful programmer writes: structs laid over the bytes, a switch on the template, block lengths taken from the wire, lengths
// checked, an open-addressing table from security to instrument.
#include <cstdint>
#include <cstring>
#include <ctime>

namespace {

struct Event {
    uint64_t seq;
    int64_t ts_event, ts_recv;
    uint32_t instrument;
    uint8_t kind, side;
    uint16_t flags;
    int64_t price, qty;
    uint64_t id;
    int64_t aux;
};
static_assert(sizeof(Event) == 64);

#pragma pack(push, 1)
struct Frame { uint16_t length, encoding; };
struct Header { uint16_t block, id, schema, version; };
struct Root { uint64_t time; uint8_t indicator; };
struct Dim { uint16_t block; uint8_t count; };
struct Level { int64_t price; int32_t qty, security; uint32_t report; int32_t orders; uint8_t position, action; char type; };
struct Trade { int64_t price; int32_t qty, security; uint32_t report; int32_t orders; uint8_t aggressor, action; };
struct Listing { int32_t security; char symbol[20]; int64_t tick; };
#pragma pack(pop)

enum Kind : uint8_t { LEVEL = 8, TRADE = 9, REFERENCE = 13 };
constexpr uint16_t MORE = 1, ENCODING = 0xEB50, SCHEMA = 901;
constexpr int64_t NO_PRICE = INT64_MIN, NULL_PRICE = INT64_MAX;
constexpr int32_t NULL_INT = INT32_MAX;
constexpr int DEPTH = 10, SLOTS = 1 << 14, INSTRUMENTS = 1 << 12;
constexpr uint32_t UNBOUND = 0xFFFFFFFD;

struct Feed {
    int64_t seq;
    uint64_t counts[3], malformed;
    uint32_t next_instrument;
    uint64_t keys[SLOTS];
    uint32_t codes[SLOTS];
    int64_t ladders[INSTRUMENTS][2][DEPTH];
};

template <class T> inline T load(const uint8_t *p) { T v; memcpy(&v, p, sizeof v); return v; }

inline uint32_t &slot(Feed *feed, uint64_t code) {
    uint64_t key = code + 1, at = (key * 0x9E3779B97F4A7C15ULL) >> 32 & (SLOTS - 1);
    while (feed->keys[at] && feed->keys[at] != key) at = (at + 1) & (SLOTS - 1);
    return feed->codes[at];
}

void listing(Feed *feed, const uint8_t *p, int64_t seq, int64_t ts_recv, Event *e) {
    Listing l = load<Listing>(p);
    uint64_t key = uint64_t(uint32_t(l.security)) + 1, at = (key * 0x9E3779B97F4A7C15ULL) >> 32 & (SLOTS - 1);
    while (feed->keys[at] && feed->keys[at] != key) at = (at + 1) & (SLOTS - 1);
    feed->keys[at] = key;
    uint32_t instrument = feed->codes[at] = feed->next_instrument++;
    uint64_t words[3] = {};
    memcpy(words, l.symbol, sizeof l.symbol);
    *e = {uint64_t(seq), ts_recv, ts_recv, instrument, REFERENCE, 0, 0, l.tick, int64_t(words[0]), words[1], int64_t(words[2])};
}

inline void removal(Event *e, int64_t price) { e->price = price, e->qty = 0, e->aux = 0; }

// The ladder's part of a LEVEL event at e; returns how many events it has become.
inline int ladder(Feed *feed, Event *e, int action, int at) {
    int64_t *prices = feed->ladders[e->instrument][e->side], gone = NO_PRICE;
    if (unsigned(at) >= DEPTH) { feed->malformed++; return 0; }
    switch (action) {
    case 0:
        gone = prices[DEPTH - 1];
        memmove(prices + at + 1, prices + at, sizeof(int64_t) * (DEPTH - 1 - at));
        prices[at] = e->price;
        break;
    case 1:
        gone = prices[at];
        prices[at] = e->price;
        break;
    case 2:
        removal(e, prices[at] != NO_PRICE ? prices[at] : e->price);
        memmove(prices + at, prices + at + 1, sizeof(int64_t) * (DEPTH - 1 - at));
        prices[DEPTH - 1] = NO_PRICE;
        return 1;
    default:
        feed->malformed++;
        return 0;
    }
    if (gone == NO_PRICE || gone == e->price) return 1;
    e[1] = e[0];
    removal(e, gone);
    e->flags |= MORE;
    return 2;
}

inline Event *tie(Event *first, Event *e, Event *end) {
    if (e > first && e < end && e->kind <= LEVEL && e[-1].kind <= LEVEL && e[-1].instrument == e->instrument) e[-1].flags |= MORE;
    return end;
}

// One message's events from out on; returns behind the last one.
Event *message(Feed *feed, const uint8_t *p, const uint8_t *end, int64_t seq, int64_t ts_recv, Event *out) {
    Header head = load<Header>(p);
    p += sizeof head;
    if (head.schema != SCHEMA || p + head.block > end) { feed->malformed++; return out; }
    Event *first = out;
    switch (head.id) {
    case 1:
    case 2: {
        if (head.block < sizeof(Root)) { feed->malformed++; return out; }
        int64_t time = int64_t(load<Root>(p).time);
        p += head.block;
        Dim dim = load<Dim>(p);
        p += sizeof dim;
        const uint8_t *entries = p;
        size_t least = head.id == 1 ? sizeof(Level) : sizeof(Trade);
        p += dim.block * dim.count;
        if (p > end || (dim.count && dim.block < least)) { feed->malformed++; return out; }
        feed->counts[head.id - 1]++;
        for (int i = 0; i < dim.count; i++, entries += dim.block) {
            if (head.id == 2) {
                Trade t = load<Trade>(entries);
                uint32_t instrument = slot(feed, uint32_t(t.security));
                if (t.action > 1 || t.aggressor > 2) { feed->malformed++; continue; }
                uint8_t side = t.aggressor == 1 ? 0 : t.aggressor == 2 ? 1 : 2;
                *out++ = {uint64_t(seq), time, ts_recv, instrument, TRADE, side, 0, t.price, t.qty, t.report, t.orders};
                continue;
            }
            Level l = load<Level>(entries);
            if (l.type != '0' && l.type != '1') { feed->malformed++; continue; }
            uint32_t instrument = slot(feed, uint32_t(l.security));
            *out = {uint64_t(seq), time, ts_recv, instrument, LEVEL, uint8_t(l.type - '0'), 0, l.price == NULL_PRICE ? NO_PRICE : l.price,
                    l.qty == NULL_INT ? 0 : l.qty, 0, l.orders == NULL_INT ? 0 : l.orders};
            out = tie(first, out, out + ladder(feed, out, l.action, int(l.position) - 1));
        }
        return out;
    }
    case 3:
        if (head.block < sizeof(Listing)) { feed->malformed++; return out; }
        feed->counts[2]++;
        listing(feed, p, seq, ts_recv, out);
        return out + 1;
    default:
        feed->malformed++;
        return out;
    }
}

int64_t decode(const uint8_t *buf, int64_t pos, int64_t end, Feed *feed, Event *out, int64_t room, int64_t *count) {
    Event *at = out;
    while (at - out < room && pos + int64_t(sizeof(Frame)) <= end) {
        Frame frame = load<Frame>(buf + pos);
        if (frame.length < sizeof(Frame) + sizeof(Header) || pos + frame.length > end) break;
        if (frame.encoding != ENCODING) feed->malformed++;
        else at = message(feed, buf + pos + sizeof frame, buf + pos + frame.length, feed->seq, 0, at);
        feed->seq++;
        pos += frame.length;
    }
    *count = at - out;
    return pos;
}

int64_t thread_cpu_ns() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

}  // namespace

extern "C" {

Feed *feed_new() {
    Feed *feed = new Feed{};
    feed->seq = 1;
    for (auto &code : feed->codes) code = UNBOUND;
    for (auto &instrument : feed->ladders)
        for (auto &side : instrument)
            for (auto &price : side) price = NO_PRICE;
    return feed;
}
void feed_delete(Feed *feed) { delete feed; }

int64_t sbe_decode(const uint8_t *buf, int64_t pos, int64_t end, Feed *feed, Event *out, int64_t room, int64_t *count) {
    return decode(buf, pos, end, feed, out, room, count);
}
int64_t sbe_run(const uint8_t *buf, int64_t end, Feed *feed, Event *out, int64_t room) {
    int64_t begun = thread_cpu_ns(), count = 1;
    for (int64_t pos = 0; pos < end && count > 0;) pos = decode(buf, pos, end, feed, out, room, &count);
    return thread_cpu_ns() - begun;
}
}
