# Settings that build, run and xenstored-local share; sourced, not executed.
RIG_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
XEN_RIG_CACHE=${XEN_RIG_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/tapdisk-xen-rig}
OUT=$XEN_RIG_CACHE/out            # all that run needs: xen, dom0.vmlinux, dom0.cpio, host/
STAGE=$XEN_RIG_CACHE/stage        # all .debs unpacked here (no maintainer scripts run)
say() { echo "xen-rig: $*" >&2; }
die() { say "$*"; exit 70; }
# What a build is made of; dom0/ and domu/ are not part of it, run puts them in.
rig_sum() { (cd "$RIG_DIR" && cat build env.sh xenstored-nohv.c | sha256sum); }
built() { [ "$(cat "$OUT/done" 2>/dev/null)" = "$(rig_sum)" ]; }
# Run a Debian program from out/host on this machine: staged usr/bin/xenstore-ls -f
HLIBS=$OUT/host/usr/lib/x86_64-linux-gnu:$OUT/host/usr/lib/xen-4.17/lib/x86_64-linux-gnu
staged() { "$OUT/host/usr/lib64/ld-linux-x86-64.so.2" --argv0 "${1##*/}" --library-path "$HLIBS" "$OUT/host/$1" "${@:2}"; }
