"""Measures tapdisk's engines beside fio with the same engine on the same file, and prints ratios: engine × depth × size
× pattern × direction, with the server's CPU an I/O and how many requests were merged.

--modes compares the ways to submit instead, on what there is of block device, ext4, xfs, tmpfs and the page cache: the
table by which engine = "auto" and submit = "auto" choose. --ram compares CPU with qemu-storage-daemon's on a file in RAM.

tapdisk's process has one CPU, its client another; fio has tapdisk's. Machines are noisy: compare ratios, which are of
measurements one after the other, and not rates. Nothing here is a test.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile

import bench as common
from bench import BIN, CLIENT, Bench, on

# tapdisk's engine, and fio's that is the same.
FIO = {"aio": "libaio", "threads": "psync", "io_uring": "io_uring"}


def debug_queue(folder):
    out = subprocess.run([f"{BIN}/tap-ctl", "--directory", folder, "debug-queue", "--json"], stdout=subprocess.PIPE,
                         check=True).stdout
    return json.loads(out)["queue"]


class Engines(Bench):
    def tapdisk_side(self, engine, submit, rw, bs, depth, direct=True, more=""):
        """I/Os a second, CPU µs an I/O, requests merged into others of a hundred."""
        image = f"path = '{self.image}'\ndirect = '{'on' if direct else 'off'}'"
        table = f"[engine]\nname = '{engine}'\nsubmit = '{submit}'\n{more}"
        # Order 4 takes up to 512 requests, and 1 MiB is one indirect request.
        with self.tapdisk(image, table) as pid:
            before = common.cpu_seconds(pid)
            out = subprocess.run(on(CLIENT, [
                f"{BIN}/ring-load", "run", "--json", "--socket", self.path("ring"), "--rw", rw, "--bs", bs, "--depth",
                str(depth), "--ring-page-order", "4", "--runtime", f"{self.seconds}s", "--spin", "400"]),
                stdout=subprocess.PIPE, check=True).stdout
            used = common.cpu_seconds(pid) - before
            queue = debug_queue(self.folder)
        rate, cpu = self.rate(json.loads(out), used)
        return rate, cpu, 100 * queue["merged"] / max(queue["queued"], 1)

    def fio_side(self, engine, rw, bs, depth, direct=True):
        # Shared memory in pages of 4 KiB, as the ring's is.
        options = [f"--ioengine={FIO[engine]}", f"--direct={int(direct)}", f"--filename={self.image}", "--iomem=shm",
                   # tapdisk's CPU: from 64k on, most depends on how many of the pages that a CPU gets lie side by side.
                   f"--cpus_allowed={common.SERVER}"]
        if engine == "threads":
            # psync has one I/O in flight: as many threads as the depth.
            options += ["--thread", f"--numjobs={depth}", "--group_reporting"]
            return self.fio(rw, bs, 1, options)[0]
        return self.fio(rw, bs, depth, options)[0]


def grid(bench, args):
    """The table of all engines."""
    print(f"{'engine':<10}{'load':<26}{'depth':>6}{'of fio':>8}{'I/Os a second':>15}{'CPU µs an I/O':>15}{'merged':>9}")
    rows = []
    patterns = [("read", "sequential read"), ("write", "sequential write"), ("randread", "random read"),
                ("randwrite", "random write")]
    for bs, (rw, title), depth, engine in itertools.product(args.sizes, patterns, args.depths, args.engines):
        ratios, sides = [], []
        for _ in range(args.rounds):
            os.sync()
            fio = bench.fio_side(engine, rw, bs, depth)
            side = bench.tapdisk_side(engine, args.submit, rw, bs, depth)
            ratios.append(side[0] / fio)
            sides.append(side)
        rate, cpu, merged = (statistics.median(values) for values in zip(*sides))
        ratio = statistics.median(ratios)
        print(f"{engine:<10}{bs + ' ' + title:<26}{depth:>6}{ratio:>8.2f}{rate:>15.0f}{cpu:>15.1f}{merged:>8.0f}%", flush=True)
        rows.append({"engine": engine, "bs": bs, "rw": rw, "depth": depth, "ratio": ratio, "iops": rate, "cpu_us": cpu,
                     "merged_percent": merged})
    return rows


@contextlib.contextmanager
def loop_device(image):
    name = subprocess.run(["losetup", "--find", "--show", "--direct-io=on", image], stdout=subprocess.PIPE, check=True,
                          text=True).stdout.strip()
    try:
        yield name
    finally:
        subprocess.run(["losetup", "--detach", name], check=True)


@contextlib.contextmanager
def file_system(kind, folder):
    """A file system of that kind on a loop device: what it is mounted on."""
    image, mount = os.path.join(folder, kind), os.path.join(folder, f"{kind}.mnt")
    subprocess.run(["truncate", "-s", "1500M", image], check=True)
    subprocess.run([f"mkfs.{kind}", "-q", image], check=True)
    os.mkdir(mount)
    with loop_device(image) as device:
        subprocess.run(["mount", device, mount], check=True)
        try:
            yield mount
        finally:
            subprocess.run(["umount", mount], check=True)
            os.unlink(image)


def fill(path, size_mib):
    subprocess.run(["fio", "--name=fill", f"--filename={path}", "--rw=write", "--bs=1M", f"--size={size_mib}m",
                    "--end_fsync=1"], stdout=subprocess.DEVNULL, check=True)


def drop_caches():
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("1")


def modes(bench, args, images):
    """Engines and ways to submit, on each kind of image."""
    candidates = [(engine, submit) for engine in args.engines for submit in ("auto", "thread", "inline")
                  if engine != "threads" or submit == "auto"]
    loads = [("randread", "4k", 1), ("randread", "4k", 32), ("randwrite", "4k", 32), ("read", "64k", 8), ("write", "4k", 32)]
    rows = []

    def measure(kind, path, direct, before=os.sync):
        bench.image = path
        print(f"\n{kind}: I/Os a second beside the first, and CPU µs an I/O")
        titles = [f"{rw} {bs} d{depth}" for rw, bs, depth in loads]
        print(f"  {'engine, submit':<20}" + "".join(f"{title:>22}" for title in titles))
        first = {}
        for engine, submit in candidates:
            cells = []
            for load in loads:
                sides = []
                for _ in range(args.rounds):
                    before()
                    sides.append(bench.tapdisk_side(engine, submit, *load, direct=direct))
                rate, cpu, _ = (statistics.median(values) for values in zip(*sides))
                ratio = rate / first.setdefault(load, rate)
                cells.append(f"{ratio:.2f} {cpu:.1f} µs")
                rows.append({"on": kind, "engine": engine, "submit": submit, "load": load, "iops": rate, "ratio": ratio,
                             "cpu_us": cpu})
            print(f"  {engine + ', ' + submit:<20}" + "".join(f"{cell:>22}" for cell in cells), flush=True)

    own = bench.image
    measure("this folder's file system, O_DIRECT", own, True)
    with open(own, "rb") as file:
        while file.read(1 << 20):
            pass
    measure("this folder's file system, all of it in the page cache", own, False)
    if os.geteuid() == 0:
        measure("this folder's file system, page cache, empty", own, False, drop_caches)
        with loop_device(own) as device:
            measure("block device (loop, O_DIRECT below)", device, True)
        for kind in ("ext4", "xfs"):
            if subprocess.run(["which", f"mkfs.{kind}"], stdout=subprocess.DEVNULL).returncode == 0:
                with file_system(kind, images) as mount:
                    path = os.path.join(mount, "disk.img")
                    fill(path, common.SIZE_MIB)
                    measure(f"{kind} on a loop device, O_DIRECT", path, True)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        path = os.path.join(memory, "disk.img")
        fill(path, common.SIZE_MIB)
        measure("tmpfs, page cache", path, False)
    bench.image = own
    return rows


def ram(bench, args):
    """CPU of a file in RAM, through NBD, beside qemu-storage-daemon with the same engine."""
    rows = []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        bench.image = os.path.join(memory, "disk.img")
        fill(bench.image, common.SIZE_MIB)
        for rw, bs in (("randread", "4k"), ("randwrite", "4k"), ("randread", "64k")):
            sides = [("tapdisk nbd", lambda: bench.nbd("tapdisk", rw, bs, 32))]
            sides += [(f"qemu-storage-daemon, {aio}", lambda aio=aio: bench.storage_daemon(aio, rw, bs, 32))
                      for aio in ("threads", "io_uring")]
            print(f"\nRAM file, {bs} {rw}, depth 32, through NBD")
            print(f"  {'':<32}{'I/Os a second':>14}{'CPU µs an I/O':>15}{'tapdisk is':>12}{'its CPU':>9}")
            measured = common.compare(bench, args.rounds, sides)
            own = measured[0][2]
            for name, rate, cpu, ratio in measured:
                beside = "" if ratio is None else f"{ratio:.2f} x"
                print(f"  {name:<32}{rate:>14.0f}{cpu:>15.2f}{beside:>12}{own / cpu:>9.2f}", flush=True)
                rows.append({"side": name, "rw": rw, "bs": bs, "iops": rate, "cpu_us": cpu, "ratio": ratio})
    return rows


def table(rows, title, column, cell):
    """Markdown: a line for each `title` of the rows, and a column for each `column`."""
    columns = list(dict.fromkeys(column(row) for row in rows))
    lines = {}
    for row in rows:
        lines.setdefault(title(row), {})[column(row)] = cell(row)
    yield "| | " + " | ".join(columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for name, cells in lines.items():
        yield f"| {name} | " + " | ".join(cells.get(column, "") for column in columns) + " |"


def markdown(rows):
    """What was measured, as Markdown."""
    first = rows[0]
    if "on" in first:
        for kind in dict.fromkeys(row["on"] for row in rows):
            yield f"\n{kind}:\n"
            yield from table([row for row in rows if row["on"] == kind], lambda row: f"{row['engine']}, {row['submit']}",
                             lambda row: "{} {} d{}".format(*row["load"]),
                             lambda row: f"{row['ratio']:.2f}, {row['cpu_us']:.1f} µs")
    elif "side" in first:
        yield from table(rows, lambda row: row["side"], lambda row: f"{row['bs']} {row['rw']}",
                         lambda row: f"{row['iops']:.0f} a second, {row['cpu_us']:.2f} µs")
    else:
        for bs in dict.fromkeys(row["bs"] for row in rows):
            yield f"\n{bs}:\n"
            yield from table([row for row in rows if row["bs"] == bs], lambda row: f"{row['rw']}, {row['engine']}",
                             lambda row: f"depth {row['depth']}",
                             lambda row: f"{row['ratio']:.2f}, {row['cpu_us']:.1f} µs, {row['merged_percent']:.0f} %")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=1, help="length of a measurement")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dir", default="target", help="where the image is made; its file system is what is measured")
    parser.add_argument("--engines", nargs="+", default=list(FIO), choices=list(FIO))
    parser.add_argument("--depths", nargs="+", type=int, default=[1, 4, 32, 128])
    parser.add_argument("--sizes", nargs="+", default=["4k", "64k", "1m"])
    parser.add_argument("--submit", default="auto", choices=["auto", "thread", "inline"])
    parser.add_argument("--modes", action="store_true", help="ways to submit, on each kind of image")
    parser.add_argument("--ram", action="store_true", help="a file in RAM, beside qemu-storage-daemon")
    parser.add_argument("--json", help="write the figures to this file, too")
    parser.add_argument("--markdown", help="write them to this file as tables, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir=args.dir) as images:
        image = os.path.join(images, "disk.img")
        subprocess.run(["fio", "--name=fill", f"--filename={image}", "--rw=write", "--bs=1M",
                        f"--size={common.SIZE_MIB}m", "--direct=1", "--ioengine=libaio", "--iodepth=8", "--end_fsync=1"],
                       stdout=subprocess.DEVNULL, check=True)
        bench = Engines(folder, image, args.seconds)
        if args.modes:
            rows = modes(bench, args, images)
        elif args.ram:
            rows = ram(bench, args)
        else:
            rows = grid(bench, args)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)
    if args.markdown:
        with open(args.markdown, "w") as file:
            file.writelines(line + "\n" for line in markdown(rows))


if __name__ == "__main__":
    sys.exit(main())
