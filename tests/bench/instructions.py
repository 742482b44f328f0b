"""Counts the instructions that tapdisk executes for a request: the null image, and holes of a VHD, over the local ring, under valgrind's callgrind.

Rates shake with the machine; this figure does not, so it shows what a change costs on the data's way. Two runs with different numbers of
requests are counted, and the difference is divided by the difference in requests: the start does not count. Server and client share a
CPU, and neither polls: so each turn finds as many requests as the depth, and the figure is the same to a thousandth each time. System
calls count as the instructions that enter the kernel.

To compare two states of the source, build the other one somewhere (cargo build --release --bin tapdisk) and name its folder:

    tests/bench/run instructions --also /somewhere/target/release
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile

from bench import BIN, SERVER, on, wait_for

NULL = "type = 'null'\nsize = '4 GiB'"
VHD = "type = 'vhd'\npath = '{place}/disk.vhd'"
CASES = [("4k random read, depth 32", NULL, "randread", "4k", 32), ("4k random read, depth 1", NULL, "randread", "4k", 1),
         ("4k random write, depth 32", NULL, "randwrite", "4k", 32), ("44k random read, depth 32", NULL, "randread", "44k", 32),
         ("4k random read of holes, depth 32", VHD, "randread", "4k", 32),
         ("4k random read of holes, depth 1", VHD, "randread", "4k", 1)]


def counted(folder, image, rw, bs, depth, count):
    """Instructions of a whole run of that many requests."""
    with tempfile.TemporaryDirectory() as place:
        path = lambda name: os.path.join(place, name)
        if image == VHD:
            subprocess.run([f"{BIN}/vhd-util", "create", "-n", path("disk.vhd"), "-s", "4096"], check=True)
        with open(path("disk.toml"), "w") as file:
            file.write(f"[image]\n{image.format(place=place)}\n[frontend.local]\nsocket = '{path('ring')}'\n[control]\n"
                       f"directory = '{place}'\n[log]\nlevel = 'error'\n[main_loop]\npoll_us = 0\n")
        with open(path("log"), "w") as log:
            server = subprocess.Popen(
                on(SERVER, ["valgrind", "--tool=callgrind", f"--callgrind-out-file={path('out')}",
                            os.path.join(folder, "tapdisk"), path("disk.toml")]),
                stdout=subprocess.DEVNULL, stderr=log, stdin=subprocess.DEVNULL)
        try:
            wait_for(path("ring"))
            size = count * int(bs.rstrip("k")) << 10
            subprocess.run(on(SERVER, [
                f"{BIN}/ring-load", "run", "--socket", path("ring"), "--rw", rw, "--bs", bs, "--depth", str(depth), "--spin", "0",
                "--ring-page-order", "0", "--size", str(size)]), stdout=subprocess.DEVNULL, check=True)
        finally:
            server.terminate()
            server.wait()
        with open(path("log")) as log:
            said = log.read()
        found = re.search(r"Collected : (\d+)", said)
        return int(found[1]) if found else sys.exit(f"{folder}/tapdisk was not counted:\n{said}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--also", action="append", default=[], metavar="FOLDER",
                        help="a folder with another tapdisk, to be counted beside this one; may be given several times")
    parser.add_argument("--requests", type=int, default=100000, help="the difference between the two runs")
    args = parser.parse_args()
    if not shutil.which("valgrind"):
        sys.exit("valgrind is not installed: apt-get install valgrind")
    folders = [BIN, *args.also]
    print("| instructions a request | " + " | ".join(folders) + " |\n|---" + "|---" * len(folders) + "|")
    for title, *case in CASES:
        few = args.requests // 5
        cells = []
        for folder in folders:
            more, less = (counted(folder, *case, count) for count in (few + args.requests, few))
            cells.append(f"{(more - less) / args.requests:.1f}")
        print(f"| {title} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
