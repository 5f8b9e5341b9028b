// What tickmesh's generated ITCH 5.0 decoder is measured against: two decoders in C++ from a BinaryFILE image to the same 64-byte events.
//
//   plain   what one writes by hand: a switch on the message type, a branch per type.
//   table   tickmesh's own way (node/layout.py): a row per type says where the fields lie, no branch depends on it. What language costs.
//
// Both take what tickmesh's decoder takes and make the same checks (lengths, sides, unknown types and instruments) in the messages that a
// book needs; those that the benchmark's image does not have (imbalances, halts, …) are counted and skipped. Called by bench_decode.py.
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

struct Feed {
    int64_t base, seq;
    uint64_t counts[256], malformed, unknown;
    uint32_t next_instrument;
    uint32_t codes[65536];
};

enum Kind : uint8_t { ADD = 1, EXECUTE = 2, CANCEL = 3, DELETE = 4, REPLACE = 5, TRADE = 9, REFERENCE = 13, BREAK = 18 };
constexpr uint32_t UNBOUND = 0xFFFFFFFD, RESOLVED_BELOW = 1u << 31;
constexpr int64_t SCALE = 100000, TICK_SIZE = 10000000;
constexpr uint8_t NO_SIDE = 2, BAD_SIDE = 255;

inline uint16_t be16(const uint8_t *p) { uint16_t v; memcpy(&v, p, 2); return __builtin_bswap16(v); }
inline uint32_t be32(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return __builtin_bswap32(v); }
inline uint64_t be64(const uint8_t *p) { uint64_t v; memcpy(&v, p, 8); return __builtin_bswap64(v); }

inline uint8_t side_of(uint8_t letter) { return letter == 'B' ? 0 : letter == 'S' ? 1 : BAD_SIDE; }

// Directory message: bind the code and announce the instrument.
void reference(Feed *feed, const uint8_t *m, int64_t seq, int64_t ts_recv, Event *e) {
    uint32_t instrument = feed->next_instrument++;
    feed->codes[be16(m + 1)] = instrument;
    uint64_t symbol;
    memcpy(&symbol, m + 11, 8);
    for (int shift = 56; shift >= 0 && (symbol >> shift & 255) == ' '; shift -= 8) symbol &= ~(255ULL << shift);
    *e = {uint64_t(seq), feed->base + int64_t(be64(m + 5) >> 16), ts_recv, instrument, REFERENCE, 0, 0, TICK_SIZE, int64_t(symbol), 0, 0};
}

int64_t thread_cpu_ns() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

// ---------------------------------------------------------------- plain

struct Plain {
    // One message's event at e; false if it makes none.
    static inline bool message(Feed *feed, const uint8_t *m, int64_t length, int64_t seq, int64_t ts_recv, Event *e) {
        uint8_t type = m[0], side = NO_SIDE;
        int64_t price = 0, qty = 0, aux = 0;
        uint64_t id;
        uint8_t kind;
        uint16_t flags = 0;
        switch (type) {
        case 'A':
        case 'F':
            if (length < (type == 'A' ? 36 : 40) || (side = side_of(m[19])) == BAD_SIDE) { feed->malformed++; return false; }
            kind = ADD, id = be64(m + 11), qty = be32(m + 20), price = be32(m + 32) * SCALE;
            break;
        case 'D':
            if (length < 19) { feed->malformed++; return false; }
            kind = DELETE, id = be64(m + 11);
            break;
        case 'U':
            if (length < 35) { feed->malformed++; return false; }
            kind = REPLACE, aux = be64(m + 11), id = be64(m + 19), qty = be32(m + 27), price = be32(m + 31) * SCALE;
            break;
        case 'E':
            if (length < 31) { feed->malformed++; return false; }
            kind = EXECUTE, id = be64(m + 11), qty = be32(m + 19), aux = be64(m + 23);
            break;
        case 'X':
            if (length < 23) { feed->malformed++; return false; }
            kind = CANCEL, id = be64(m + 11), qty = be32(m + 19);
            break;
        case 'P':
            if (length < 44) { feed->malformed++; return false; }
            kind = TRADE, flags = 8, aux = be64(m + 11), qty = be32(m + 20), price = be32(m + 32) * SCALE, id = be64(m + 36);
            break;
        case 'B':
            if (length < 19) { feed->malformed++; return false; }
            kind = BREAK, id = be64(m + 11);
            break;
        case 'R':
            if (length < 39) { feed->malformed++; return false; }
            feed->counts[type]++;
            reference(feed, m, seq, ts_recv, e);
            return true;
        default:
            feed->unknown++;
            return false;
        }
        uint32_t instrument = feed->codes[be16(m + 1)];
        if (instrument >= RESOLVED_BELOW) { feed->unknown++; return false; }
        feed->counts[type]++;
        *e = {uint64_t(seq), feed->base + int64_t(be64(m + 5) >> 16), ts_recv, instrument, kind, side, flags, price, qty, id, aux};
        return true;
    }
};

// ---------------------------------------------------------------- table

struct Row { int64_t length, kind, flags, side_mask, side, price_at, price_mask, qty_at, qty_mask, id_at, aux_at, aux_mask; };

struct Tables {
    Row rows[256];
    uint8_t sides[256];
    Tables() {
        for (auto &row : rows) row = {1 << 30, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
        for (auto &side : sides) side = BAD_SIDE;
        sides['B'] = 0, sides['S'] = 1;
        rows['A'] = {36, ADD, 0, -1, 0, 32, -1, 20, -1, 11, 11, 0};
        rows['F'] = {40, ADD, 0, -1, 0, 32, -1, 20, -1, 11, 11, 0};
        rows['D'] = {19, DELETE, 0, 0, NO_SIDE, 32, 0, 20, 0, 11, 11, 0};
        rows['U'] = {35, REPLACE, 0, 0, NO_SIDE, 31, -1, 27, -1, 19, 11, -1};
        rows['E'] = {31, EXECUTE, 0, 0, NO_SIDE, 32, 0, 19, -1, 11, 23, -1};
        rows['X'] = {23, CANCEL, 0, 0, NO_SIDE, 32, 0, 19, -1, 11, 11, 0};
        rows['P'] = {44, TRADE, 8, 0, NO_SIDE, 32, -1, 20, -1, 36, 11, -1};
        rows['B'] = {19, BREAK, 0, 0, NO_SIDE, 32, 0, 20, 0, 11, 11, 0};
    }
};
const Tables tables;

struct Table {
    static inline bool message(Feed *feed, const uint8_t *m, int64_t length, int64_t seq, int64_t ts_recv, Event *e) {
        const Row &row = tables.rows[m[0]];
        if (length >= row.length) {
            uint32_t instrument = feed->codes[be16(m + 1)];
            int64_t side = (int64_t(tables.sides[m[19]]) & row.side_mask) | row.side;
            if (instrument < RESOLVED_BELOW && side != BAD_SIDE) {
                feed->counts[m[0]]++;
                *e = {uint64_t(seq), feed->base + int64_t(be64(m + 5) >> 16), ts_recv, instrument, uint8_t(row.kind), uint8_t(side),
                      uint16_t(row.flags), (be32(m + row.price_at) * SCALE) & row.price_mask, be32(m + row.qty_at) & row.qty_mask,
                      be64(m + row.id_at), int64_t(be64(m + row.aux_at)) & row.aux_mask};
                return true;
            }
        }
        return Plain::message(feed, m, length, seq, ts_recv, e);
    }
};

// ---------------------------------------------------------------- the loop over messages

template <class Decoder>
int64_t decode(const uint8_t *buf, int64_t pos, int64_t end, int64_t ts_recv, Feed *feed, Event *out, int64_t room, int64_t *count) {
    int64_t n = 0, seq = feed->seq;
    while (n < room && pos + 2 <= end) {
        int64_t length = be16(buf + pos);
        if (length == 0) { pos += 2; continue; }
        if (pos + 2 + length > end) break;
        n += Decoder::message(feed, buf + pos + 2, length, seq++, ts_recv, out + n);
        pos += 2 + length;
    }
    feed->seq = seq;
    *count = n;
    return pos;
}

template <class Decoder>
int64_t run(const uint8_t *buf, int64_t end, Feed *feed, Event *out, int64_t room) {
    int64_t begun = thread_cpu_ns(), count = 1;
    for (int64_t pos = 0; pos < end && count > 0;) pos = decode<Decoder>(buf, pos, end, 0, feed, out, room, &count);
    return thread_cpu_ns() - begun;
}

}  // namespace

extern "C" {

Feed *feed_new() {
    Feed *feed = new Feed{};
    feed->seq = 1;
    for (auto &code : feed->codes) code = UNBOUND;
    return feed;
}
void feed_delete(Feed *feed) { delete feed; }

#define DECODER(name, Decoder)                                                                                                      \
    int64_t name##_decode(const uint8_t *buf, int64_t pos, int64_t end, Feed *feed, Event *out, int64_t room, int64_t *count) {     \
        return decode<Decoder>(buf, pos, end, 0, feed, out, room, count);                                                           \
    }                                                                                                                               \
    int64_t name##_run(const uint8_t *buf, int64_t end, Feed *feed, Event *out, int64_t room) {                                     \
        return run<Decoder>(buf, end, feed, out, room);                                                                             \
    }
DECODER(plain, Plain)
DECODER(table, Table)
}
