# Functions for cases in which dom0 itself uses our disks while it is short of memory:  . ./lib.sh; . ./memory.sh
# A task that waits for 40 s is a deadlock: the kernel tells where each waits (console.log), and stops the machine.
echo 7 >/proc/sys/kernel/printk
echo 5 >/proc/sys/kernel/hung_task_check_interval_secs
echo 40 >/proc/sys/kernel/hung_task_timeout_secs
echo 1 >/proc/sys/kernel/hung_task_panic

XEN_MEMORY=/sys/devices/system/xen_memory/xen_memory0
ALL_MEMORY=$(cat $XEN_MEMORY/info/current_kb)
meminfo() { awk -v key="$1:" '$1 == key {print $2}' /proc/meminfo; }
vmstat() { awk -v key="$1" '$1 == key {print $2}' /proc/vmstat; }

# Leaves so much of dom0's memory; the balloon takes the rest.
leave_memory() { # MIB
    echo 3 >/proc/sys/vm/drop_caches
    echo $(($(cat $XEN_MEMORY/info/current_kb) - $(meminfo MemAvailable) + $1 * 1024)) >$XEN_MEMORY/target_kb
    within 30 "the balloon" ballooned
}
give_memory_back() {
    echo "$ALL_MEMORY" >$XEN_MEMORY/target_kb
    within 30 "the balloon" ballooned
}
ballooned() { [ "$(cat $XEN_MEMORY/info/current_kb)" = "$(cat $XEN_MEMORY/target_kb)" ]; }

# A tapdisk of dom0's own; $pid is its process. A configuration on standard input.
serve() { # NAME
    cat >"/tmp/$1.toml"
    printf '[control]\ndirectory = "/run/tapdisk"\n' >>"/tmp/$1.toml"
    tapdisk "/tmp/$1.toml" >/tmp/ready 2>"/var/log/tapdisk/$1.log" &
    pid=$!
    within 10 "tapdisk serves" test -s /tmp/ready
    rm /tmp/ready
}
# Its disk becomes /dev/nbd0.
connect() { # NAME
    [ -e /dev/nbd0 ] || modprobe nbd nbds_max=1
    nbd-client -unix "/run/tapdisk/$1.nbd" /dev/nbd0 -b 4096 -swap >/tmp/nbd-client 2>&1 ||
        { cat /tmp/nbd-client; fail "nbd-client"; }
    at_least "sectors of /dev/nbd0" 1 "$(cat /sys/block/nbd0/size)"
}
disconnect() {
    nbd-client -d /dev/nbd0 >/dev/null
}
# All of its threads are I/O flushers.
all_flushers() {
    # PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE, include/linux/sched.h. The name before it may have blanks.
    local task stat flags
    for task in "/proc/$pid"/task/*; do
        # Threads of the pool come and go.
        stat=$(cat "$task/stat" 2>/dev/null) || continue
        read -r _ _ _ _ _ _ flags _ <<<"${stat##*) }"
        is "flags of $stat" $((0x180000)) $((flags & 0x180000))
    done
}
# A line of its status, in KiB.
status_of() { # KEY
    awk -v key="$1:" '$1 == key {print $2}' "/proc/$pid/status"
}
# It ends in order, and nothing went wrong.
ends_well() { # NAME
    kill "$pid"
    wait "$pid" || fail "tapdisk ends with $?"
    not_logged "/var/log/tapdisk/$1.log"
}

# A program that needs far more memory than there is gets through while dom0 swaps to a device of tapdisk $pid, and finds what
# it wrote.
swap_to() { # DEVICE WHAT
    local began in out stalls
    mkswap "$1" >/dev/null
    leave_memory "${LEAVE:-16}"
    swapon "$1"
    in=$(vmstat pswpin) out=$(vmstat pswpout) stalls=$(vmstat allocstall_movable) began=$(ms)
    timeout 120 hog 200 >/tmp/hog || fail "$2: the hog ends with $?: $(cat /tmp/hog)"
    in=$((($(vmstat pswpin) - in) / 256)) out=$((($(vmstat pswpout) - out) / 256))
    say "$2: $(tail -n 1 /tmp/hog), $(($(ms) - began)) ms, $out MiB out, $in MiB in," \
        "$(($(vmstat allocstall_movable) - stalls)) direct reclaims"
    grep -q '^OK 3200 pieces' /tmp/hog || { cat /tmp/hog; fail "$2: the hog does not say OK"; }
    at_least "MiB swapped out" 100 $out
    at_least "MiB swapped in" 40 $in
    is "processes killed for memory" 0 "$(vmstat oom_kill)"
    is "KiB of tapdisk swapped out" 0 "$(status_of VmSwap)"
    give_memory_back
    swapoff "$1"
}

# The same through NBD, to a disk in dom0.
swap() { # NAME IMAGE [ENGINE-KEYS [MEMORY-KEYS]]
    serve "$1" <<T
[image]
path = "$2"
direct = "on"
[engine]
$(printf '%b' "${3:-}")
[memory]
$(printf '%b' "${4:-}")
[frontend.nbd]
socket = "/run/tapdisk/$1.nbd"
T
    [ -n "${4:-}" ] || at_least "KiB locked" 1000 "$(status_of VmLck)"
    connect "$1"
    [ -n "${4:-}" ] || all_flushers
    swap_to /dev/nbd0 "$1"
    [ -n "${4:-}" ] || all_flushers
    disconnect
    ends_well "$1"
}
# The scratch disk as a block device, /dev/vda.
no_scratch() {
    umount /scratch
}
