"""Makes a table of what the guest and dom0 said: medians of the ratios of each round, and what tapdisk did for an I/O."""

import json
import os
import re
import statistics
import sys
from collections import defaultdict

rates = defaultdict(list)
counts = defaultdict(list)
begun = {}
syscalls = None
for line in open(sys.argv[1], errors="replace"):
    if match := re.match(r"RATE (\S+) (\S+) (\S+)", line):
        rates[match[1], match[2]].append(float(match[3]))
    elif match := re.match(r"SYSCALLS (\d+) (\d+)", line):
        syscalls = (int(match[1]), int(match[2]))
    elif match := re.match(r"COUNT (BEGIN|END) (\S+) (\d+) (\{.*)", line):
        (vbd,) = json.loads(match[4])["frontends"]
        rings = [queue["counters"] for queue in vbd["queues"]]
        now = {key: sum(ring[key] for ring in rings) for key in ("requests", "kicks_in", "kicks_out")}
        now |= {"copies": vbd["counters"]["copy_calls"], "ticks": int(match[3])}
        if match[1] == "BEGIN":
            begun[match[2]] = now
        elif match[2] in begun:
            before = begun.pop(match[2])
            counts[match[2]].append({key: now[key] - before[key] for key in now})

if not rates:
    sys.exit("the guest measured nothing")
figures = {}
print(f"{'load':<13} {'tapdisk':>8} {'/blkback':>9} {'/qdisk':>7}   for an I/O: {'kicks out':>9} {'kicks in':>9} {'copies':>7} {'CPU us':>7}")
for case in dict.fromkeys(case for case, _ in rates if case != "traced"):
    ours = rates[case, "tapdisk"]

    def ratio(peer):
        theirs = rates[case, peer]
        return statistics.median(a / b for a, b in zip(ours, theirs) if b) if any(theirs) else float("nan")

    done = defaultdict(int)
    for count in counts[case]:
        for key, value in count.items():
            done[key] += value
    each = {key: done[key] / max(done["requests"], 1) for key in ("kicks_out", "kicks_in", "copies", "ticks")}
    each["cpu_us"] = each.pop("ticks") * 10_000
    figures[case] = {"iops": statistics.median(ours), "blkback": ratio("blkback"), "qdisk": ratio("qdisk"), **each}
    row = figures[case]
    print(
        f"{case:<13} {row['iops']:8.0f} {row['blkback']:9.2f} {row['qdisk']:7.2f}"
        f"               {row['kicks_out']:9.3f} {row['kicks_in']:9.3f} {row['copies']:7.3f} {row['cpu_us']:7.0f}"
    )
if syscalls and syscalls[0]:
    print(f"system calls for an I/O, 4k read, depth 32, with strace: {syscalls[1] / syscalls[0]:.2f}")
if path := os.environ.get("JSON"):
    json.dump(figures, open(path, "w"), indent=2)
