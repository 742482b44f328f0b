"""Measures tapdisk's VHD beside qemu-nbd's (-f vpc), qemu-nbd's qcow2 and a raw file, in turns, and prints ratios.

Fresh images are made for each measurement and are large, so that most random writes are the first of their block. Filled ones
are filled by the program that serves them. Each layer of a chain has random 64k pieces. All sides have O_DIRECT, fio through NBD
as their client, and one CPU, their client another; tapdisk through its ring, too. Machines are noisy: compare ratios. Nothing here
is a test.
"""

import argparse
import contextlib
import json
import os
import struct
import subprocess
import sys
import tempfile

import bench as common
from bench import BIN, CLIENT, Bench, on, process

FRESH_GIB = 16
# The largest that qemu-img makes.
LARGEST_GIB = 2040
BLOCK = 2 << 20


def call(*command):
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def checksum(data):
    return struct.pack(">I", ~sum(data) & 0xffffffff)


def child(path, parent):
    """A differencing image without data, beside its parent."""
    with open(parent, "rb") as file:
        file.seek(-512, os.SEEK_END)
        footer = bytearray(file.read(512))
    size, = struct.unpack_from(">Q", footer, 48)
    blocks = -(-size // BLOCK)
    name = os.path.basename(parent)
    locator = f".\\{name}".encode("utf-16-le")
    table = b"\xff" * (-(-blocks * 4 // 512) * 512)
    header = bytearray(1024)
    struct.pack_into(">8sQQIII", header, 0, b"cxsparse", 2**64 - 1, 1536, 0x10000, blocks, BLOCK)
    header[40:60] = footer[68:84] + footer[24:28]
    big = name.encode("utf-16-be")
    header[64:64 + len(big)] = big
    struct.pack_into(">4sIIIQ", header, 576, b"W2ru", 512, len(locator), 0, 1536 + len(table))
    header[36:40] = checksum(header)
    struct.pack_into(">Q", footer, 16, 512)
    footer[60:68] = struct.pack(">II", 4, 0)
    footer[68:84] = os.urandom(16)
    footer[64:68] = checksum(footer)
    with open(path, "wb") as file:
        file.write(footer + header + table + locator.ljust(512, b"\0") + footer)


def table(kind, path, side=""):
    """The [image] table; of a side whose name ends so, without flushes between data and metadata, which others do not have."""
    durability = "order" if side.endswith("order") else "flush"
    return f"type = '{kind}'\npath = '{path}'\ndirect = 'on'\ndurability = '{durability}'"


class Vhd(Bench):
    """`image` is a raw file of SIZE_MIB, written throughout; others are made in its folder."""

    def beside(self, name):
        return os.path.join(os.path.dirname(self.image), name)

    def create(self, kind, gib=None, name="fresh"):
        """An empty image of `kind`, in place of the last one."""
        path = self.beside(f"{name}.{kind}")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        options = ["-o", "force_size=on"] if kind == "vpc" else []
        size = f"{gib}G" if gib else f"{common.SIZE_MIB}M"
        call("qemu-img", "create", "-q", "-f", kind, *options, path, size)
        return path

    @contextlib.contextmanager
    def served(self, side, path):
        """A server of the image: its process, and where its NBD is."""
        if side.startswith("tapdisk"):
            with self.tapdisk(table("aio" if side.endswith("raw") else "vhd", path, side)) as pid:
                yield pid, f"nbd+unix:///?socket={self.path('nbd')}"
            return
        socket = self.path("peer")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(socket)
        # "qemu-nbd vpc", "qemu-nbd qcow2".
        command = ["qemu-nbd", "-f", side.split()[1], "--aio=native", "--cache=none", "-t", "-e", "8", "-k", socket, path]
        with process(command, socket) as pid:
            yield pid, f"nbd+unix:///?socket={socket}"

    def through_nbd(self, side, path, rw, bs, depth, size_mib=None):
        with self.served(side, path) as (pid, uri):
            return self.fio(rw, bs, depth, ["--ioengine=nbd", f"--uri={uri}"], pid, size_mib)

    def through_ring(self, kind, path, rw, bs, depth):
        return self.ring(table(kind, path), rw, bs, depth, 2)

    def filled(self):
        """The raw file's content as VHD by tapdisk, as VHD by QEMU, and as qcow2."""
        own = self.create("vpc", name="own")
        with self.served("tapdisk", own) as (_, uri):
            call("nbdcopy", "--flush", self.image, uri)
        paths = {"tapdisk": own}
        for kind in ("vpc", "qcow2"):
            paths[f"qemu-nbd {kind}"] = self.create(kind, name="filled")
            call("qemu-img", "convert", "-n", "-f", "raw", "-O", kind, self.image, paths[f"qemu-nbd {kind}"])
        return paths

    def write_some(self, side, path, mib, seed):
        with self.served(side, path) as (_, uri):
            call("fio", "--name=b", "--rw=randwrite", "--bs=64k", "--iodepth=8", "--ioengine=nbd", f"--uri={uri}",
                 f"--size={common.SIZE_MIB}m", f"--io_size={mib}m", f"--randseed={seed}")

    def chain(self, side, depth):
        """The leaf of a chain of that many images, each with its share of writes."""
        kind = "vpc" if side == "tapdisk" else "qcow2"
        path = self.create(kind, name=f"chain{depth}-1")
        for layer in range(1, depth + 1):
            if layer > 1:
                parent, path = path, self.beside(f"chain{depth}-{layer}.{kind}")
                if kind == "vpc":
                    child(path, parent)
                else:
                    call("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", os.path.basename(parent), path)
            self.write_some(side, path, max(common.SIZE_MIB // depth, 1), layer)
        return path


def fresh(bench, rw, bs, depth):
    """Sides that write to images that were made just now."""
    size = FRESH_GIB << 10
    side = lambda name, kind: lambda: bench.through_nbd(name, bench.create(kind, FRESH_GIB), rw, bs, depth, size)
    return [("tapdisk", side("tapdisk", "vpc")), ("tapdisk, order", side("tapdisk, order", "vpc")),
            ("tapdisk, ring", lambda: bench.through_ring("vhd", bench.create("vpc", FRESH_GIB), rw, bs, depth)),
            ("qemu-nbd vpc", side("qemu-nbd vpc", "vpc")), ("qemu-nbd qcow2", side("qemu-nbd qcow2", "qcow2"))]


def full(bench, rw, bs, depth):
    """Sides of images that are filled."""
    paths = bench.filled()
    sides = [(name, lambda name=name: bench.through_nbd(name, paths[name], rw, bs, depth)) for name in paths]
    raw = [("tapdisk raw", lambda: bench.through_nbd("tapdisk raw", bench.image, rw, bs, depth))]
    rings = [("tapdisk, ring", lambda: bench.through_ring("vhd", paths["tapdisk"], rw, bs, depth)),
             ("tapdisk raw, ring", lambda: bench.through_ring("aio", bench.image, rw, bs, depth))]
    return sides + raw + rings


def chained(bench, depth):
    """Sides of chains."""
    paths = {side: bench.chain(side, depth) for side in ("tapdisk", "qemu-nbd qcow2")}
    sides = [(name, lambda name=name: bench.through_nbd(name, paths[name], "randread", "4k", 32)) for name in paths]
    return sides + [("tapdisk, ring", lambda: bench.through_ring("vhd", paths["tapdisk"], "randread", "4k", 32))]


CASES = {
    "fresh-randwrite": ("fresh image, 4k random write, depth 32", lambda bench: fresh(bench, "randwrite", "4k", 32)),
    "fresh-write": ("fresh image, 64k sequential write, depth 8", lambda bench: fresh(bench, "write", "64k", 8)),
    "filled-randread": ("filled image, 4k random read, depth 32", lambda bench: full(bench, "randread", "4k", 32)),
    "filled-randwrite": ("filled image, 4k random write, depth 32", lambda bench: full(bench, "randwrite", "4k", 32)),
} | {
    f"chain-{depth}": (f"chain of {depth}, 4k random read, depth 32", lambda bench, depth=depth: chained(bench, depth))
    for depth in (1, 5, 30)
}


def memory(bench):
    """What a disk of the largest size takes, KiB resident."""
    raw = bench.beside("large.raw")
    call("truncate", "-s", f"{LARGEST_GIB}G", raw)
    rows = []
    print(f"\nmemory: a disk of {LARGEST_GIB} GiB after some reads and writes, resident")
    for name, path in (("tapdisk", bench.create("vpc", LARGEST_GIB)), ("tapdisk raw", raw)):
        with bench.served(name, path) as (pid, _):
            subprocess.run(on(CLIENT, [f"{BIN}/ring-load", "run", "--socket", bench.path("ring"), "--rw", "randrw", "--runtime",
                                       "1s"]), stdout=subprocess.DEVNULL, check=True)
            with open(f"/proc/{pid}/status") as file:
                resident = next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
        print(f"  {name:<24}{resident / 1024:8.1f} MiB", flush=True)
        rows.append({"case": "memory", "side": name, "resident_kib": resident})
        os.unlink(path)
    return rows


def measure(bench, args):
    rows = []
    for key, (title, sides) in CASES.items():
        if args.case and key not in args.case:
            continue
        print(f"\n{key}: {title}")
        print(f"  {'':<24}{'I/Os a second':>14}{'CPU µs an I/O':>15}{'tapdisk is':>12}", flush=True)
        for name, rate, cpu, ratio in common.compare(bench, args.rounds, sides(bench)):
            print(f"  {name:<24}{rate:>14.0f}{cpu:>15.2f}{'' if ratio is None else f'{ratio:.2f} x':>12}", flush=True)
            rows.append({"case": key, "title": title, "side": name, "iops": rate, "cpu_us": cpu, "ratio": ratio})
    if not args.case or "memory" in args.case:
        rows += memory(bench)
    return rows


def markdown(rows):
    """What was measured, as Markdown: a table for each case."""
    rates = [row for row in rows if "iops" in row]
    for key in dict.fromkeys(row["case"] for row in rates):
        lines = [row for row in rates if row["case"] == key]
        yield f"\n{lines[0]['title']}:\n"
        yield "| | I/Os a second | CPU an I/O | tapdisk is |"
        yield "|---|---|---|---|"
        for row in lines:
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f} x"
            yield f"| {row['side']} | {row['iops']:.0f} | {row['cpu_us']:.1f} µs | {ratio} |"
    sizes = [row for row in rows if "resident_kib" in row]
    if sizes:
        yield f"\nMemory of a disk of {LARGEST_GIB} GiB:\n"
        yield "| | resident |"
        yield "|---|---|"
        yield from (f"| {row['side']} | {row['resident_kib'] / 1024:.1f} MiB |" for row in sizes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=4, help="length of a measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", default="target", help="where the images are made; its file system is what is measured")
    parser.add_argument("--size-mib", type=int, default=common.SIZE_MIB, help="size of the filled images and chains")
    parser.add_argument("--json", help="write the figures to this file, too")
    parser.add_argument("--markdown", help="write them to this file as tables, too")
    parser.add_argument("case", nargs="*", help=f"{', '.join(CASES)}, memory; default: all")
    args = parser.parse_args()
    unknown = set(args.case) - set(CASES) - {"memory"}
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    common.SIZE_MIB = args.size_mib
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir=args.dir) as images:
        image = os.path.join(images, "disk.img")
        call("fio", "--name=fill", f"--filename={image}", "--rw=write", "--bs=1M", f"--size={common.SIZE_MIB}m", "--direct=1",
             "--ioengine=libaio", "--iodepth=8", "--end_fsync=1")
        rows = measure(Vhd(folder, image, args.seconds), args)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)
    if args.markdown:
        with open(args.markdown, "w") as file:
            file.writelines(line + "\n" for line in markdown(rows))


if __name__ == "__main__":
    sys.exit(main())
