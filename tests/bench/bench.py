"""Measures tapdisk beside its peers, on the same file, in turns, and prints ratios.

Machines are noisy: each round measures all sides one after the other, and the ratio is the median of the rounds' own
ratios. Nothing here is a test; the goals are printed for comparison.

Every server has one CPU and its client another, as a backend and its guest do; where both may run anywhere, it is mostly
the scheduler's luck that is measured. fio on the file, the limit, may use all CPUs.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

BIN = "target/release"
SIZE_MIB = 1024


def cpu_seconds(pid):
    """CPU time of all threads that a process has or had, in seconds, to a hundredth."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def switches(pid):
    """Times that the threads of a process went to sleep or were put off the CPU."""
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/status") as file:
            total += sum(int(line.split()[1]) for line in file if "ctxt_switches" in line)
    return total


SERVER, CLIENT = sorted(os.sched_getaffinity(0))[0], sorted(os.sched_getaffinity(0))[-1]


def on(cpu, command):
    """The command, on that CPU only."""
    return ["taskset", "--cpu-list", str(cpu)] + command


def wait_for(path):
    end = time.monotonic() + 10
    while not os.path.exists(path):
        if time.monotonic() > end:
            sys.exit(f"{path} does not appear")
        time.sleep(0.005)


@contextlib.contextmanager
def process(command, socket=None, line=False):
    """A server that runs meanwhile."""
    child = subprocess.Popen(on(SERVER, command), stdout=subprocess.PIPE if line else subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    try:
        if line and not child.stdout.readline():
            sys.exit(f"{command} did not start")
        if socket:
            wait_for(socket)
        yield child.pid
    finally:
        child.terminate()
        child.wait()


class Bench:
    def __init__(self, folder, image, seconds):
        self.folder, self.image, self.seconds = folder, image, seconds

    def path(self, name):
        return os.path.join(self.folder, name)

    def tapdisk(self, image, more=""):
        config = self.path("disk.toml")
        with open(config, "w") as file:
            file.write(f"[image]\n{image}\n[frontend.local]\nsocket = '{self.path('ring')}'\nmax_data = '256 MiB'\n"
                       f"[frontend.nbd]\nsocket = '{self.path('nbd')}'\n[control]\ndirectory = '{self.folder}'\n"
                       f"[log]\nlevel = 'error'\n{more}")
        return process([f"{BIN}/tapdisk", config], line=True)

    def file_image(self):
        return f"path = '{self.image}'"

    # Each measurement gives (I/Os a second, server's CPU in µs an I/O or None).

    def ring(self, image, rw, bs, depth, order, more="", client=()):
        with self.tapdisk(image, more) as pid:
            before = cpu_seconds(pid)
            out = subprocess.run(on(CLIENT, [
                f"{BIN}/ring-load", "run", "--json", "--socket", self.path("ring"), "--rw", rw, "--bs", bs,
                "--depth", str(depth), "--ring-page-order", str(order), "--runtime", f"{self.seconds}s", *client]),
                stdout=subprocess.PIPE, check=True).stdout
            used = cpu_seconds(pid) - before
        return self.rate(json.loads(out), used)

    def rate(self, report, used):
        count = sum(report[side]["requests"] for side in ("read", "write") if report.get(side))
        return count / report["seconds"], used / count * 1e6

    def fio(self, rw, bs, depth, engine, pid=None, size_mib=None):
        before = cpu_seconds(pid) if pid else 0
        command = ["fio", "--name=b", f"--rw={rw}", f"--bs={bs}", f"--iodepth={depth}", "--time_based",
                   "--norandommap", f"--runtime={self.seconds}", f"--size={size_mib or SIZE_MIB}m", "--output-format=json",
                   "--group_reporting"] + engine
        out = subprocess.run(on(CLIENT, command) if pid else command, stdout=subprocess.PIPE, check=True,
                             text=True).stdout
        used = cpu_seconds(pid) - before if pid else None
        # fio may say something before it prints JSON.
        job = json.loads(out[out.index("{"):])["jobs"][0]
        side = job["write" if "write" in rw else "read"]
        return side["iops"], used / side["total_ios"] * 1e6 if pid else None

    def libaio(self, rw, bs, depth):
        return self.fio(rw, bs, depth, ["--ioengine=libaio", "--direct=1", f"--filename={self.image}"])

    def storage_daemon(self, aio, rw, bs, depth):
        """qemu-storage-daemon with that engine, on a file that has no O_DIRECT."""
        socket = self.path("peer")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(socket)
        command = ["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=f,filename={self.image},aio={aio}",
                   "--nbd-server", f"addr.type=unix,addr.path={socket}", "--export",
                   "type=nbd,id=e,node-name=f,name=,writable=on"]
        with process(command, socket) as pid:
            return self.fio(rw, bs, depth, ["--ioengine=nbd", f"--uri=nbd+unix:///?socket={socket}"], pid)

    def nbd(self, server, rw, bs, depth):
        socket = self.path("peer")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(socket)
        if server == "tapdisk":
            socket = self.path("nbd")
            started = self.tapdisk(self.file_image())
        else:
            command = {
                "qemu-nbd": ["qemu-nbd", "-f", "raw", "--aio=native", "--cache=none", "-t", "-e", "8", "-k", socket,
                             self.image],
                "qemu-storage-daemon": [
                    "qemu-storage-daemon", "--blockdev",
                    f"driver=file,node-name=f,filename={self.image},aio=native,cache.direct=on", "--nbd-server",
                    f"addr.type=unix,addr.path={socket}", "--export", "type=nbd,id=e,node-name=f,name=,writable=on"],
                "nbdkit": ["nbdkit", "-f", "-U", socket, "file", self.image],
            }[server]
            started = process(command, socket)
        with started as pid:
            return self.fio(rw, bs, depth, ["--ioengine=nbd", f"--uri=nbd+unix:///?socket={socket}"], pid)


def compare(bench, rounds, sides):
    """Measures `sides` (name, function) in turns: medians of each, and of the first one's ratio to each other one."""
    results = {name: [] for name, _ in sides}
    for _ in range(rounds):
        for name, measure in sides:
            # What one side left in the page cache must not be written back at the cost of the next.
            os.sync()
            results[name].append(measure())
    first = sides[0][0]
    rows = []
    for name, _ in sides:
        rates = [rate for rate, _ in results[name]]
        ratios = [mine[0] / rate for mine, rate in zip(results[first], rates)]
        cpu = [cpu for _, cpu in results[name] if cpu is not None]
        rows.append((name, statistics.median(rates), statistics.median(cpu) if cpu else None,
                     None if name == first else statistics.median(ratios)))
    return rows


def side_by_side(bench, rounds, wanted):
    # The client looks at its ring for up to 400 µs before it sleeps; `asleep`: for as long as it is by itself, 20 µs.
    ring = lambda rw, depth, client=("--spin", "400"): lambda: bench.ring(
        bench.file_image(), rw, "4k", depth, 0, client=client)
    # No submit thread, and nobody sleeps: what the hand-over and the wake-ups cost is the difference.
    awake = lambda rw, depth: lambda: bench.ring(
        bench.file_image(), rw, "4k", depth, 0, "[engine]\nsubmit = 'inline'\n[main_loop]\nspin_us = 500\n",
        ("--spin", "1000"))
    libaio = lambda rw, depth: lambda: bench.libaio(rw, "4k", depth)
    nbd = lambda server, rw, depth: lambda: bench.nbd(server, rw, "4k", depth)
    cases = {
        "ring-randread-32": ("4k random read, depth 32, beside fio on the file", {"fio libaio": 0.95},
                             [("tapdisk ring", ring("randread", 32)), ("fio libaio", libaio("randread", 32))]),
        "ring-randread-1": ("4k random read, depth 1, beside fio on the file", {"fio libaio": 0.80},
                            [("tapdisk ring", ring("randread", 1)), ("fio libaio", libaio("randread", 1))]),
        "ring-randwrite-32": ("4k random write, depth 32, beside fio on the file", {},
                              [("tapdisk ring", ring("randwrite", 32)), ("fio libaio", libaio("randwrite", 32))]),
    }
    cases["asleep-randread-32"] = ("the same at depth 32, but the client goes to sleep", {},
                                   [("tapdisk ring", ring("randread", 32, ())), ("fio libaio", libaio("randread", 32))])
    cases["awake-randread-1"] = (
        "the same at depth 1, but submit = \"inline\", spin_us = 500: nobody sleeps", {},
        [("tapdisk ring, awake", awake("randread", 1)), ("fio libaio", libaio("randread", 1))])
    for rw in ("randread", "randwrite"):
        sides = [(f"{server} nbd", nbd(server, rw, 32))
                 for server in ("tapdisk", "qemu-nbd", "qemu-storage-daemon", "nbdkit")]
        cases[f"nbd-{rw}-32"] = (f"4k {rw[:4]}om {rw[4:]}, depth 32, fio through NBD", {"qemu-nbd nbd": 1.1}, sides)
    cases["null-128"] = ("null image, 4k random read, depth 128 (goal: 1000000 a second, 0.5 µs)", {},
                         [("tapdisk ring", lambda: bench.ring("type = 'null'\nsize = '1 GiB'", "randread", "4k", 128, 2))])
    cases["ram-128"] = ("RAM image of 64 MiB, 4k random read, depth 128 (goal: 600000 a second)", {},
                        [("tapdisk ring", lambda: bench.ring("type = 'ram'\nsize = '64 MiB'", "randread", "4k", 128, 2))])
    report = {}
    for key, (title, goals, sides) in cases.items():
        if wanted and key not in wanted:
            continue
        rows = compare(bench, rounds, sides)
        print(f"\n{key}: {title}")
        print(f"  {'':<24}{'I/Os a second':>14}{'CPU µs an I/O':>15}{'tapdisk is':>12}{'goal':>8}")
        for name, rate, cpu, ratio in rows:
            print(f"  {name:<24}{rate:>14.0f}{'' if cpu is None else f'{cpu:.2f}':>15}"
                  f"{'' if ratio is None else f'{ratio:.2f} x':>12}{goals.get(name, ''):>8}", flush=True)
        report[key] = [dict(zip(("side", "iops", "cpu_us", "ratio"), row)) for row in rows]
    return report


def at_rest(bench):
    """What a disk costs that does nothing."""
    starts = []
    for _ in range(20):
        begin = time.monotonic()
        with bench.tapdisk(bench.file_image()):
            starts.append((time.monotonic() - begin) * 1e3)
    with bench.tapdisk(bench.file_image()) as pid:
        client = subprocess.Popen(
            [f"{BIN}/ring-load", "run", "--socket", bench.path("ring"), "--rw", "randread", "--bs", "4k", "--depth", "32",
             "--ring-page-order", "0", "--runtime", "2s"], stdout=subprocess.DEVNULL)
        time.sleep(1.5)
        with open(f"/proc/{pid}/status") as file:
            resident = next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
        client.wait()
        time.sleep(1)
        before = switches(pid)
        time.sleep(10)
        woken = switches(pid) - before
    print("\nat-rest: what a disk costs that does nothing")
    print(f"  from start to serving       {statistics.median(starts):8.1f} ms   (goal: 20)")
    print(f"  resident, one order-0 ring  {resident / 1024:8.1f} MiB  (goal: 8)")
    print(f"  wake-ups in ten seconds     {woken:8}      (goal: 0)")
    return {"start_ms": statistics.median(starts), "resident_kib": resident, "wakeups_in_10_s": woken}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=4, help="length of a measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", default="target", help="where the image is made; its file system is what is measured")
    parser.add_argument("--json", help="write the figures to this file, too")
    parser.add_argument("case", nargs="*", help="ring-randread-32, nbd-randwrite-32, null-128, at-rest, …; default: all")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir=args.dir) as images:
        image = os.path.join(images, "disk.img")
        # Written throughout: what is measured is I/O, not holes.
        subprocess.run(["fio", "--name=fill", f"--filename={image}", "--rw=write", "--bs=1M", f"--size={SIZE_MIB}m",
                        "--direct=1", "--ioengine=libaio", "--iodepth=8", "--end_fsync=1"],
                       stdout=subprocess.DEVNULL, check=True)
        bench = Bench(folder, image, args.seconds)
        report = side_by_side(bench, args.rounds, args.case)
        if not args.case or "at-rest" in args.case:
            report["at-rest"] = at_rest(bench)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
