#!/usr/bin/env python3
"""A client of flead in plain Python: attaches to a model, leases every layer and prints its CRC-32.

    flea_client.py SOCKET MODEL [PASSES]

It uses nothing of libflea, only docs/protocol.md: that is what it is here to prove.
"""
import json, mmap, os, socket, struct, sys, time, zlib

LAYOUT, READY, WANT, OPEN = 2, 1, 0x10001, 0
GENERATION, GATE, STARVING = 1, 2, 3  # words of the area
REVOKED, HEAD, RING, RING_COUNT = 1, 2, 16, 256  # words of the page
state = lambda layer: 16 + 2 * layer
slot = lambda layer: state(attached["layers"]) + layer
hold = lambda layer: RING + RING_COUNT + 2 * layer
want = lambda layer: hold(layer) + 1


def ask(method, **parameters):
    """One request; the answer's parameters and the descriptors that came with it."""
    line.send(json.dumps({"method": method, "parameters": parameters}).encode())
    answer, fds, _flags, _address = socket.recv_fds(line, 65536, 4)
    answer = json.loads(answer or b'{"error": {"status": "CONN", "message": "flead hung up"}}')
    if "error" in answer:
        sys.exit("{status}: {message}".format(**answer["error"]))
    return answer["parameters"], fds


def pages(method, key):
    """A list that comes in pages; the first page's other fields and descriptors."""
    first, fds = ask(method, **{"from": 0})
    items, at = first[key], first["next"]
    while at is not None:
        page, _ = ask(method, **{"from": at})
        items, at = items + page[key], page["next"]
    return items, first, fds


def words(fd, writable):
    access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    return memoryview(mmap.mmap(fd, 0, mmap.MAP_SHARED, access)).cast("I")


def acquire(layer):
    page[want(layer)] = (page[want(layer)] + WANT) & 0xFFFFFFFF
    while True:
        page[hold(layer)] += 1  # first the hold, then the look; the kick between them is a barrier
        os.write(kick, struct.pack("=Q", 1))
        if area[GATE] == OPEN and area[state(layer)] & READY:
            break
        page[hold(layer)] -= 1
        if page[REVOKED]:
            sys.exit("REVOKED: flead took the leases of this client back")
        time.sleep(0.001)  # or FUTEX_WAIT on the state word
    page[want(layer)] -= 1
    page[RING + page[HEAD] % RING_COUNT] = layer
    page[HEAD] = (page[HEAD] + 1) & 0xFFFFFFFF


def release(layer):
    page[hold(layer)] -= 1
    if area[STARVING] or area[GATE] != OPEN:
        os.write(kick, struct.pack("=Q", 1))


def read(run_of, size, shard, offset, length):
    """The bytes of a file's range, page by page out of the pool."""
    end = offset + length
    while offset < end:
        at = run_of[shard, offset // size] + offset % size
        take = min(end - offset, size - offset % size)
        yield pool[at : at + take]
        offset += take


line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
line.connect(sys.argv[1])
ask("hello", protocol=1, client="flea_client.py")
attached, (area, page, kick) = ask("attach", path=os.path.abspath(sys.argv[2]))
area, page = words(area, False), words(page, True)
assert area[0] == LAYOUT, "shared words of another layout"
uses = [row for row in pages("catalog", "rows")[0] if row["kind"] == "use"]
generation = None
for _ in range(int(sys.argv[3]) if len(sys.argv) > 3 else 1):
    for layer in range(attached["layers"]):
        acquire(layer)
        if area[GENERATION] != generation:  # under a lease the plan cannot change
            runs, plan, (pool,) = pages("plan", "runs")
            generation, size = plan["generation"], plan["page_bytes"]
            pool = memoryview(mmap.mmap(pool, 0, mmap.MAP_SHARED, mmap.PROT_READ))
            resident = {(r["shard"], r["page"] + i): r["offset"] + i * size for r in runs if "layer" not in r for i in range(r["pages"])}
            transient = {r["layer"]: r for r in runs if "layer" in r}
        run_of, crc = dict(resident), 0
        if run := transient.get(layer):  # it lies in a slot, mostly its own: the area tells
            start = plan["ring_offset"] + area[slot(layer)] * plan["slot_bytes"]
            run_of.update({(run["shard"], run["page"] + i): start + i * size for i in range(run["pages"])})
        for use in (row for row in uses if row["layer"] == layer):
            for part in read(run_of, size, use["shard"], use["offset"], use["bytes"]):
                crc = zlib.crc32(part, crc)
        release(layer)
        print(f"{layer} {crc:08x}", flush=True)
