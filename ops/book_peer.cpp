// What tickmesh's books are measured against: two full-depth order books in C++, fed an ITCH 5.0 BinaryFILE image from memory.
//
//   conventional   the layout of the known open-source itch-order-book, written here from its description: orders in a vector indexed by
//                  order reference, per side a sorted vector of (price, level) with the best last, levels in a pool.
//   same           tickmesh's data layout (node/book.py): batches of 64-byte events, a set-associative order table, a circular window of
//                  level words with a two-level bitset, two stages of prefetching; written as one writes it, with a branch per kind, and
//                  looking everything up again where it is applied. It says how much is layout, and how much the way it is applied.
//
// Both are called through ctypes by bench_book.py: <name>_new, <name>_run (thread CPU nanoseconds), <name>_sides (what the books hold),
// <name>_delete. Memory is touched by _new, so that neither a page fault nor an allocation is in the measured time.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <unordered_map>
#include <vector>

namespace {

uint16_t be16(const uint8_t *p) { uint16_t v; memcpy(&v, p, 2); return __builtin_bswap16(v); }
uint32_t be32(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return __builtin_bswap32(v); }
uint64_t be64(const uint8_t *p) { uint64_t v; memcpy(&v, p, 8); return __builtin_bswap64(v); }

int64_t thread_cpu_ns() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

// What one side holds, for comparison with tickmesh: number of levels, best price (1e-4), sum over the levels of price * quantity.
struct SideSum { int64_t levels, best; uint64_t total; };

// ---------------------------------------------------------------- conventional

struct Conventional {
    struct Order { uint32_t qty, level; uint16_t locate; };
    struct Level { int32_t price; uint32_t qty; };
    struct Entry { int32_t price; uint32_t level; };  // asks have negative prices, so that the best is the greatest on both sides
    struct Book { std::vector<Entry> side[2]; };

    std::vector<Order> orders;
    std::vector<Level> levels;
    std::vector<uint32_t> unused;
    std::vector<Book> books;

    Conventional(uint32_t symbols, uint64_t references) : orders(references), levels(1 << 20), books(symbols + 1) {
        for (uint32_t i = levels.size(); i-- > 1;) unused.push_back(i);
        for (auto &book : books)
            for (auto &side : book.side) side.reserve(256);
    }

    uint32_t new_level(int32_t price) {
        if (unused.empty()) {
            levels.emplace_back();
            unused.push_back(levels.size() - 1);
        }
        uint32_t level = unused.back();
        unused.pop_back();
        levels[level] = {price, 0};
        return level;
    }

    void add(uint64_t reference, uint16_t locate, bool ask, uint32_t qty, uint32_t unsigned_price) {
        int32_t price = ask ? -int32_t(unsigned_price) : int32_t(unsigned_price);
        auto &side = books[locate].side[ask];
        auto at = side.end();
        while (at != side.begin() && (at - 1)->price > price) --at;
        uint32_t level;
        if (at != side.begin() && (at - 1)->price == price) {
            level = (at - 1)->level;
        } else {
            level = new_level(price);
            side.insert(at, Entry{price, level});
        }
        levels[level].qty += qty;
        if (reference >= orders.size()) orders.resize(reference * 2);
        orders[reference] = {qty, level, locate};
    }

    void take(Order &order, uint32_t qty) {
        Level &level = levels[order.level];
        level.qty -= qty;
        order.qty -= qty;
        if (level.qty) return;
        auto &side = books[order.locate].side[level.price < 0];
        auto at = side.end() - 1;
        while (at->price != level.price) --at;
        side.erase(at);
        unused.push_back(order.level);
    }

    void replace(uint64_t reference, uint64_t next, uint32_t qty, uint32_t price) {
        Order &order = orders[reference];
        bool ask = levels[order.level].price < 0;
        uint16_t locate = order.locate;
        take(order, order.qty);
        add(next, locate, ask, qty, price);
    }

    int64_t run(const uint8_t *image, int64_t size) {
        int64_t begun = thread_cpu_ns();
        for (const uint8_t *p = image, *end = image + size; p < end; p += 2 + be16(p)) {
            const uint8_t *m = p + 2;
            switch (*m) {
                case 'A': case 'F': add(be64(m + 11), be16(m + 1), m[19] == 'S', be32(m + 20), be32(m + 32)); break;
                case 'E': case 'C': case 'X': take(orders[be64(m + 11)], be32(m + 19)); break;
                case 'D': { Order &order = orders[be64(m + 11)]; take(order, order.qty); break; }
                case 'U': replace(be64(m + 11), be64(m + 19), be32(m + 27), be32(m + 31)); break;
                default: break;
            }
        }
        return thread_cpu_ns() - begun;
    }

    SideSum sum(uint32_t locate, int ask) const {
        SideSum out{0, 0, 0};
        for (const Entry &entry : books[locate].side[ask]) {
            int64_t price = ask ? -int64_t(entry.price) : entry.price;
            out.levels++;
            out.best = price;
            out.total += uint64_t(price) * levels[entry.level].qty;
        }
        return out;
    }
};

// ---------------------------------------------------------------- the same layout as tickmesh

struct Event {
    uint64_t seq; int64_t ts_event, ts_recv; uint32_t instrument; uint8_t kind, side; uint16_t flags;
    int64_t price, qty; uint64_t id; int64_t aux;
};
static_assert(sizeof(Event) == 64);

enum Kind : uint8_t { ADD = 1, EXECUTE, CANCEL, DELETE, REPLACE };

struct Same {
    static constexpr int WINDOW_BITS = 12, BS_BITS = 19, QTY_BITS = 40, FAR_AHEAD = 24, NEAR_AHEAD = 8;
    static constexpr int64_t WINDOW = 1 << WINDOW_BITS, BLOCKS = WINDOW / 64, TICK = 10000000;
    static constexpr uint64_t ONE_ORDER = 1ull << QTY_BITS;
    struct Order { uint64_t word; int32_t key; uint32_t qty; };
    struct alignas(64) Side { uint64_t summary; int32_t best, base; int64_t tick; double per_tick; int64_t far_levels; };
    static_assert(sizeof(Order) == 16 && sizeof(Side) == 64);

    int slot_bits;
    std::vector<Order> orders;
    std::vector<Side> sides;
    std::vector<uint64_t> words, levels;
    std::vector<std::unordered_map<int32_t, uint64_t>> far;
    std::vector<Event> batch;
    int64_t refused = 0;

    Same(uint32_t symbols, uint64_t references, int64_t batch_size) : batch(batch_size) {
        slot_bits = 21;
        while ((1ull << slot_bits) < references) slot_bits++;
        orders.resize(1ull << slot_bits);
        sides.resize(2 * (symbols + 1), Side{0, 0, 0, TICK, 1.0 / TICK, 0});
        words.resize(sides.size() * BLOCKS);
        levels.resize(sides.size() * WINDOW);
        far.resize(sides.size());
    }

    uint64_t slot(uint64_t id) const { return id & ((1ull << slot_bits) - 1); }
    uint64_t tag(uint64_t id) const { return (id >> slot_bits) << 2 | (id & 3); }
    uint64_t &level(int64_t bs, int64_t key) { return levels[bs << WINDOW_BITS | (key & (WINDOW - 1))]; }
    static int64_t block(int64_t key) { return (uint64_t(key) >> 6) & (BLOCKS - 1); }
    static int64_t top(uint64_t word) { return 63 - __builtin_clzll(word); }
    static int64_t ticks(const Side &side, int64_t price) {
        double rounded = double(price) * side.per_tick + 6755399441055744.0;
        int64_t bits;
        memcpy(&bits, &rounded, 8);
        return int32_t(bits);
    }

    void mark(int64_t bs, Side &side, int64_t key) {
        words[bs * BLOCKS + block(key)] |= 1ull << (key & 63);
        if (!side.summary || key > side.best) side.best = key;
        side.summary |= 1ull << block(key);
    }

    void unmark(int64_t bs, Side &side, int64_t key) {
        int64_t at = block(key);
        uint64_t left = words[bs * BLOCKS + at] &= ~(1ull << (key & 63));
        if (!left) side.summary &= ~(1ull << at);
        if (key != side.best) return;
        if (left) { side.best = (key & ~63) + top(left); return; }
        if (!side.summary) { if (side.far_levels) move_down(bs, side, far_best(bs)); return; }
        uint64_t below = side.summary & ((1ull << at) - 1);
        int64_t found = top(below ? below : side.summary), down = (at - found) & (BLOCKS - 1);
        side.best = (key & ~63) - down * 64 + top(words[bs * BLOCKS + found]);
    }

    int64_t far_best(int64_t bs) const {
        int64_t best = INT64_MIN;
        for (const auto &entry : far[bs]) best = std::max<int64_t>(best, entry.first);
        return best;
    }

    static int64_t base_for(int64_t key) {
        return std::min(std::max<int64_t>((key - (WINDOW - WINDOW / 4)) & ~63, INT32_MIN), int64_t(INT32_MAX) + 1 - WINDOW);
    }

    __attribute__((noinline)) void move_down(int64_t bs, Side &side, int64_t best) {
        side.base = base_for(best);
        for (auto at = far[bs].begin(); at != far[bs].end();) {
            if (at->first < side.base) { ++at; continue; }
            level(bs, at->first) = at->second;
            words[bs * BLOCKS + block(at->first)] |= 1ull << (at->first & 63);
            side.summary |= 1ull << block(at->first);
            at = far[bs].erase(at);
            side.far_levels--;
        }
        side.best = best;
    }

    __attribute__((noinline)) void move_up(int64_t bs, Side &side, int64_t best) {
        int64_t base = base_for(best);
        if (side.summary)
            for (int64_t start = side.base; start < std::min(base, side.base + WINDOW); start += 64) {
                uint64_t &word = words[bs * BLOCKS + block(start)];
                for (; word; word &= word - 1) {
                    int64_t key = start + __builtin_ctzll(word);
                    far[bs][key] = level(bs, key);
                    side.far_levels++;
                    level(bs, key) = 0;
                }
                side.summary &= ~(1ull << block(start));
            }
        side.base = base;
    }

    __attribute__((noinline)) void add_outside(int64_t bs, Side &side, int64_t key, uint64_t word) {
        auto found = far[bs].find(key);
        if (found != far[bs].end()) { found->second += word; return; }
        if (!side.summary) side.base = base_for(key);
        else if (key >= side.base + WINDOW) move_up(bs, side, key);
        else if (side.best - side.base < WINDOW / 4 && key >= base_for(side.best)) move_down(bs, side, side.best);
        else { far[bs][key] = word; side.far_levels++; return; }
        level(bs, key) = word;
        mark(bs, side, key);
    }

    __attribute__((noinline)) void take_outside(int64_t bs, Side &side, int64_t key, uint64_t take) {
        auto found = far[bs].find(key);
        if (!(found->second -= take)) { far[bs].erase(found); side.far_levels--; }
    }

    Order *find(uint64_t id) {
        Order *order = &orders[slot(id)];
        return order->word >> BS_BITS == tag(id) && order->qty ? order : nullptr;
    }

    // The benchmark's table has a slot for every reference, so a taken slot is a refusal here; tickmesh looks on (node/book.py).
    bool add(Event &event, int64_t bs) {
        Side &side = sides[bs];
        Order &order = orders[slot(event.id)];
        int64_t count = ticks(side, event.price), key = count ^ -(bs & 1);
        if (order.qty || uint64_t(event.qty - 1) >= UINT32_MAX || count * side.tick != event.price) return false;
        uint64_t word = ONE_ORDER + event.qty;
        if (uint64_t(key - side.base) < WINDOW) {
            uint64_t &at = level(bs, key), before = at;
            if (((before & (ONE_ORDER - 1)) + event.qty) >> QTY_BITS | before >> 63) return false;
            at = before + word;
            if (!before) mark(bs, side, key);
        } else {
            add_outside(bs, side, key, word);
        }
        order = {tag(event.id) << BS_BITS | uint64_t(bs), int32_t(key), uint32_t(event.qty)};
        return true;
    }

    bool take(Event &event, Order &order) {
        int64_t bs = order.word & ((1 << BS_BITS) - 1), key = order.key;
        uint64_t qty = event.kind == EXECUTE || event.kind == CANCEL ? event.qty : order.qty;
        if (qty - 1 >= order.qty) return false;
        Side &side = sides[bs];
        event.instrument = bs >> 1;
        event.side = bs & 1;
        if (event.kind != REPLACE) {
            event.qty = qty;
            event.price = (key ^ -(bs & 1)) * side.tick;
        }
        order.qty -= qty;
        uint64_t off = qty + (order.qty ? 0 : ONE_ORDER);
        if (uint64_t(key - side.base) < WINDOW) {
            if (!(level(bs, key) -= off)) unmark(bs, side, key);
        } else {
            take_outside(bs, side, key, off);
        }
        return true;
    }

    bool apply(Event &event) {
        if (event.kind == ADD) return event.instrument * 2ull < sides.size() && add(event, event.instrument * 2 + event.side);
        Order *order = find(event.kind == REPLACE ? event.aux : event.id);
        if (!order) return false;
        if (event.kind == REPLACE && !add(event, order->word & ((1 << BS_BITS) - 1))) return false;
        return take(event, *order);
    }

    void prefetch_order(const Event &event) {
        __builtin_prefetch(&orders[slot(event.kind == REPLACE ? event.aux : event.id)], 1, 3);
        __builtin_prefetch(&sides[std::min<uint64_t>(event.instrument * 2ull, sides.size() - 1)], 1, 3);
    }

    void prefetch_level(const Event &event) {
        const Order &order = orders[slot(event.kind == REPLACE ? event.aux : event.id)];
        int64_t bs = order.word & ((1 << BS_BITS) - 1), key = order.key;
        if (event.kind == ADD) {
            bs = event.instrument * 2 + event.side;
            key = ticks(sides[bs], event.price) ^ -(bs & 1);
        }
        __builtin_prefetch(&sides[bs], 1, 3);
        __builtin_prefetch(&level(bs, key), 1, 3);
    }

    static bool decode(const uint8_t *m, Event &event, uint64_t seq) {
        event = {seq, int64_t(be64(m + 5) >> 16), 0, be16(m + 1), 0, 2, 0, 0, 0, be64(m + 11), 0};
        switch (*m) {
            case 'A': case 'F':
                event.kind = ADD; event.side = m[19] == 'S'; event.qty = be32(m + 20); event.price = be32(m + 32) * 100000ll; return true;
            case 'E': case 'C': event.kind = EXECUTE; event.qty = be32(m + 19); event.aux = be64(m + 23); return true;
            case 'X': event.kind = CANCEL; event.qty = be32(m + 19); return true;
            case 'D': event.kind = DELETE; return true;
            case 'U':
                event.kind = REPLACE; event.aux = event.id; event.id = be64(m + 19);
                event.qty = be32(m + 27); event.price = be32(m + 31) * 100000ll; return true;
            default: return false;
        }
    }

    int64_t run(const uint8_t *image, int64_t size) {
        int64_t begun = thread_cpu_ns();
        uint64_t seq = 0;
        for (const uint8_t *p = image, *end = image + size; p < end;) {
            int64_t count = 0;
            for (; p < end && count < int64_t(batch.size()); p += 2 + be16(p)) count += decode(p + 2, batch[count], seq++);
            for (int64_t i = 0; i < std::min<int64_t>(FAR_AHEAD, count); i++) prefetch_order(batch[i]);
            for (int64_t i = 0; i < count; i++) {
                if (i + FAR_AHEAD < count) prefetch_order(batch[i + FAR_AHEAD]);
                if (i + NEAR_AHEAD < count) prefetch_level(batch[i + NEAR_AHEAD]);
                refused += !apply(batch[i]);
            }
        }
        return thread_cpu_ns() - begun;
    }

    SideSum sum(uint32_t locate, int ask) {
        SideSum out{0, 0, 0};
        int64_t bs = 2 * locate + ask, best = INT64_MIN;
        auto count = [&](int64_t key, uint64_t word) {
            int64_t price = (key ^ -int64_t(ask)) * (TICK / 100000);
            out.levels++;
            out.total += uint64_t(price) * (word & (ONE_ORDER - 1));
            if (key > best) { best = key; out.best = price; }
        };
        for (int64_t key = sides[bs].base; key < sides[bs].base + WINDOW; key++)
            if (level(bs, key)) count(key, level(bs, key));
        for (const auto &entry : far[bs]) count(entry.first, entry.second);
        return out;
    }
};

template <class Books> void all_sides(Books *books, uint32_t symbols, SideSum *out) {
    for (uint32_t locate = 1; locate <= symbols; locate++)
        for (int ask = 0; ask < 2; ask++) *out++ = books->sum(locate, ask);
}

}  // namespace

extern "C" {
void *conventional_new(uint32_t symbols, uint64_t references, int64_t) { return new Conventional(symbols, references); }
int64_t conventional_run(void *books, const uint8_t *image, int64_t size) { return static_cast<Conventional *>(books)->run(image, size); }
void conventional_sides(void *books, uint32_t symbols, SideSum *out) { all_sides(static_cast<Conventional *>(books), symbols, out); }
void conventional_delete(void *books) { delete static_cast<Conventional *>(books); }
void *same_new(uint32_t symbols, uint64_t references, int64_t batch) { return new Same(symbols, references, batch); }
int64_t same_run(void *books, const uint8_t *image, int64_t size) { return static_cast<Same *>(books)->run(image, size); }
void same_sides(void *books, uint32_t symbols, SideSum *out) { all_sides(static_cast<Same *>(books), symbols, out); }
void same_delete(void *books) { delete static_cast<Same *>(books); }
}
