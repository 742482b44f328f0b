# Runs cases one after the other in this dom0:  bash ./series.sh NAME...
# A case that passes has left dom0 as it found it. Of one that fails, all is written down that can tell why, and dom0 is made
# as it was; where that does not succeed, the series ends, and `run` boots anew for the rest.
# What there is of a case is in NAME/ afterwards: output, log/, console/, and, where it failed, diagnosis.
set -u -o pipefail
. /rig/lib.sh

mkdir -p /etc/xen/scripts /run/tapdisk /run/blktap-control /run/block-tap /mnt
cp bin/* /usr/bin/
cp bin/block-tapdisk bin/block-tap /etc/xen/scripts/
# What there was before the first case.
DAEMONS=" $(pgrep . | tr '\n' ' ') "
field() { # PID NUMBER: of proc(5)'s stat, from 3 on
    sed "s/.*) //" "/proc/$1/stat" 2>/dev/null | cut -d' ' -f$(($2 - 2))
}
SESSION=$(field $$ 6)
# Processes that have come since. Each case is in a session of its own; the kernel's threads are in session 0.
processes() {
    local pid
    for pid in $(pgrep .); do
        case $DAEMONS in *" $pid "*) continue ;; esac
        case $(field "$pid" 6) in '' | 0 | "$SESSION") continue ;; esac
        echo "$pid $(cat "/proc/$pid/comm" 2>/dev/null)"
    done
}

# Whether there is a toolstack in this boot: without xenstored, xl would wait for ever.
has_toolstack() { [ -S /run/xenstored/socket ]; }

# What a case must leave as it was, a line each.
state() {
    processes | sed 's/^[0-9]* /process /'
    sed 's/^\([^ ]*\) \([^ ]*\) .*/mount \1 \2/' /proc/mounts
    losetup -a | sed 's/^/loop /'
    lsmod | awk '$1 == "xen_blkback" {print "module", $1}'
    find /run/tapdisk /run/blktap-control /run/block-tap /dev/shm /scratch /mnt ! -type d | sed 's/^/file /'
    has_toolstack || return 0
    xl list | awk 'NR > 1 {print "domain", $1}'
    xenstore-ls -f /local/domain/0/backend 2>/dev/null | grep -v '/backend/console/\|/backend/[a-z0-9]*\(/[0-9]*\)* = ""' | sed 's/^/node /'
    xenstore-ls -f /local/domain/0/device 2>/dev/null | sed 's/^/node /'
}
same_state() { # within ten seconds: what has ended may need a moment
    for _ in $(seq 50); do
        state | LC_ALL=C sort >/tmp/after
        cmp -s /tmp/before /tmp/after && return
        sleep 0.2
    done
    return 1
}

# What Xen and XenStore know of the guests.
diagnose_guests() { # NAME
    local ids id key
    echo "## the guests' consoles: $1/console"
    echo "## xl"; timeout 20 xl vcpu-list; timeout 20 xl list
    ids=$(timeout 20 xl list | awk 'NR > 1 {print $2}')
    for id in $ids; do echo "## event channels of domain $id"; timeout 20 lsevtchn "$id"; done
    echo "## nodes"; timeout 20 xenstore-ls -f
    echo "## Xen"
    timeout 20 xl dmesg -c >/dev/null
    # Event channels, run queues, grants.
    for key in e r g; do timeout 20 xl debug-keys $key; done
    # Xen prints them in its own time.
    sleep 1
    timeout 20 xl dmesg
}

# All that tells where a request, an event or a handshake is stuck.
diagnose() { # NAME
    local pid task directory minor
    if has_toolstack; then diagnose_guests "$1"; fi
    echo "## interrupts"; grep -E 'evtchn:|xen-dyn' /proc/interrupts
    for pid in $(pgrep -x tapdisk); do
        echo "## tapdisk $pid: $(tr '\0' ' ' <"/proc/$pid/cmdline")"
        for task in "/proc/$pid"/task/*; do
            echo "$(cat "$task/comm") $(grep State "$task/status") $(cat "$task/wchan")"
            cat "$task/stack"
        done
        for directory in /run/tapdisk /run/blktap-control; do
            for minor in $(tap-ctl --directory "$directory" list -p "$pid" 2>/dev/null | sed -n 's/.*minor=\([0-9]*\).*/\1/p'); do
                timeout 20 tap-ctl --directory "$directory" debug-queue -p "$pid" -m "$minor"
                timeout 20 tap-ctl --directory "$directory" debug-queue -p "$pid" -m "$minor" --json
            done
        done
    done
    echo "## dom0's kernel"; echo w >/proc/sysrq-trigger; dmesg | tail -n 100
} 2>&1

# After a case that failed.
reset() {
    local pid kind
    for kind in TERM KILL; do
        for pid in $(processes | cut -d' ' -f1); do kill -CONT "$pid" 2>/dev/null; kill -$kind "$pid" 2>/dev/null; done
        [ $kind = KILL ] || sleep 2
    done
    umount -l /mnt /mnt2 2>/dev/null
    losetup -D
    modprobe -r xen-blkback 2>/dev/null
    find /run/tapdisk /run/blktap-control /run/block-tap /dev/shm /scratch -mindepth 1 -maxdepth 1 ! -name lost+found -exec rm -rf {} +
    has_toolstack || return 0
    for id in $(xl list | awk 'NR > 1 && $2 != 0 {print $2}'); do timeout 60 xl destroy "$id"; done
    for entry in $(xenstore-list /local/domain/0/backend 2>/dev/null); do
        [ "$entry" = console ] || xenstore-rm "/local/domain/0/backend/$entry"
    done
    xenstore-rm /local/domain/0/device 2>/dev/null
}

run_case() { # NAME: 0 if it passes, 1 if it does not
    local name=$1 start=$SECONDS rc=0 limit
    limit=$(sed -n 's/^# takes: //p' "cases/$name")
    limit=$((${limit:-60} * ${SLOW:-5} + 60))
    mkdir -p "$name/log"
    # On the host, so that they are there whatever happens.
    ln -sfn "/share/$name/log" /var/log/tapdisk
    state | LC_ALL=C sort >/tmp/before.new
    mv /tmp/before.new /tmp/before
    export CASE_SETTINGS=''
    [ -z "${ESSENTIAL:-}" ] || CASE_SETTINGS=$(sed -n 's/^# essential: //p' "cases/$name")
    setsid timeout -k 10 $limit bash "./cases/$name" </dev/null >"$name/output" 2>&1 || rc=$?
    [ $rc != 124 ] || echo "FAILED: it has taken its $limit s: five times what it takes on a quiet machine, and a minute" >>"$name/output"
    if [ $rc = 0 ] && ! grep -q '^# boot: own' "cases/$name"; then
        same_state || { rc=1; { echo 'FAILED: it leaves dom0 other than it was:'; diff /tmp/before /tmp/after; } >>"$name/output"; }
    fi
    [ $rc = 0 ] || diagnose "$name" >"$name/diagnosis"
    mkdir -p "$name/console"
    [ $rc = 0 ] || reset
    mv /var/log/xen/console/guest-* "$name/console/" 2>/dev/null
    find /tmp -mindepth 1 -maxdepth 1 ! -name before ! -name after -exec rm -rf {} +
    echo "$rc $((SECONDS - start))" >"$name/rc"
    return $rc
}

for name; do
    echo "runs $name"
    if run_case "$name"; then
        echo "ok $name ($(cut -d' ' -f2 "$name/rc") s)"
    else
        echo "FAIL $name ($(cut -d' ' -f2 "$name/rc") s)"
        # Not one after the other for one fault.
        same_state || { echo "dom0 is not as it was: the rest needs another one"; diff /tmp/before /tmp/after; exit 3; }
    fi
done
exit 0
