# Functions for the cases, which run in dom0:  . ./lib.sh
set -eu -o pipefail
. /rig/lib.sh
# What a case's `# essential:` line sets in the short run.
eval "${CASE_SETTINGS:-}"
# Limits are for a quiet machine: one that is busy is up to so many times slower.
SLOW=${SLOW:-5}
set -E
trap 'echo "FAILED: ${BASH_SOURCE[0]##*/} line $LINENO: $BASH_COMMAND"' ERR

say() { echo "== $(now) s: $*"; }
# Milliseconds since the machine was started; busybox's date has none.
ms() {
    local up
    read -r up _ </proc/uptime
    echo $((10#${up/./} * 10))
}
fail() {
    echo "FAILED: $*"
    trap - ERR
    exit 1
}
# A case that passes takes away what it has brought; series.sh looks whether that is all.
trap finish EXIT
finish() {
    local rc=$? known name
    [ $rc = 0 ] || exit $rc
    # shellcheck disable=SC2046
    kill $(jobs -p) 2>/dev/null || true
    wait
    # Guests that went by themselves: nobody has told block-tapdisk.
    for known in /run/tapdisk/vbd-*.toml; do
        [ -e "$known" ] || continue
        name=${known##*/vbd-} name=${name%.toml}
        # One that halted may not be gone for its backend yet.
        within 20 "the end of disk $name" block-tapdisk detach "${name%%-*}" "${name#*-}"
    done
    find /scratch /run/block-tap -mindepth 1 -maxdepth 1 ! -name lost+found -exec rm -rf {} +
}

# Checks.
is() { # WHAT WANTED FOUND
    [ "$2" = "$3" ] || fail "$1: expected $2, found $3"
}
at_least() { # WHAT MINIMUM FOUND
    [ "$3" -ge "$2" ] || fail "$1: expected at least $2, found $3"
}
at_most() { # WHAT MAXIMUM FOUND
    [ "$3" -le "$2" ] || fail "$1: expected at most $2, found $3"
}
# Until a command succeeds.
within() { # SECONDS WHAT COMMAND...
    local start=$SECONDS limit=$(($1 * SLOW)) what=$2 told=''
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ $((SECONDS - start)) -lt $limit ] || fail "not within $limit s: $what"
        [ -n "$told" ] || [ $((SECONDS - start)) -lt 5 ] || { say "waits for: $what"; told=1; }
        sleep 0.1
    done
}
not() { ! "$@"; }
logged() { # GUEST DEVICE PATTERN
    local log
    log=$(log_of "$1" "$2")
    grep -Eq "$3" "$log" || fail "nothing like \"$3\" in $log"
}
not_logged() { # FILE...: nothing worse than information
    # shellcheck disable=SC2251
    if grep -E ' (WARN|ERRO|CRIT) |panick' "$@"; then fail "errors in the log"; fi
}

# Guests. A script on standard input comes behind guest.sh.
script() { # NAME
    cat guest.sh - >"/tmp/$1.sh"
    echo "/tmp/$1.sh"
}
# Makes a guest that waits until its disks are there and `xl unpause`.
guest() { # NAME [XL-CONFIG-LINE...], script on standard input
    local name=$1 file
    file=$(script "$name")
    shift
    DOMU_XL="-p ${DOMU_XL:-}" domu_create "$name" "$file" "$@"
    eval "id_$name=$(domid "$name")"
}
# A guest's domain id, also when it is gone.
id() { eval "echo \$id_$1"; }
console() { tr -d '\r' <"/var/log/xen/console/guest-$1.log" 2>/dev/null; }
# Waits until a guest is at a step.
at_step() { # GUEST WORD [SECONDS]
    local start=$SECONDS limit=$((${3:-90} * SLOW))
    say "waits for guest $1 to come to step $2"
    until console "$1" | grep -q "^\[step\] $2\$"; do
        if [ $((SECONDS - start)) -ge $limit ] || ! xl domid "$1" >/dev/null 2>&1; then
            console "$1" | tail -n 40
            fail "guest $1 has not come to step $2 within $limit s, or is gone"
        fi
        sleep 0.2
    done
}
# Lets it go on.
go() { # GUEST
    echo >"$(xenstore-read "/local/domain/$(id "$1")/console/tty")"
}
# Waits until a guest has done its script without an error.
ends() { # GUEST [SECONDS]
    local rc=0
    say "waits for the end of guest $1"
    domu_wait "$1" $((${2:-120} * SLOW)) >"/tmp/console-$1" || rc=$?
    [ $rc = 0 ] || { tail -n 50 "/tmp/console-$1"; fail "guest $1 ends with $rc"; }
}
# What a guest has said behind a word.
told() { # GUEST WORD
    console "$1" | sed -n "s/^$2 //p" | tail -n 1
}

# Disks.
number() { # DEVICE
    case $1 in xvda) echo 51712 ;; xvdb) echo 51728 ;; xvdc) echo 51744 ;; xvdd) echo 51760 ;; *) fail "device $1" ;; esac
}
attach() { # GUEST DEVICE TARGET [MODE]
    block-tapdisk attach "$(id "$1")" "$2" "$3" "${4:-w}"
}
detach() { # GUEST DEVICE
    block-tapdisk detach "$(id "$1")" "$2"
}
config_of() { echo "/run/tapdisk/vbd-$(id "$1")-$(number "$2").toml"; }
log_of() { echo "/var/log/tapdisk/vbd-$(id "$1")-$(number "$2").log"; }
pid_of() { cat "/run/tapdisk/vbd-$(id "$1")-$(number "$2").pid"; }
back_of() { echo "/local/domain/0/backend/${KIND:-vbd3}/$(id "$1")/$(number "$2")"; }
front_of() { echo "/local/domain/$(id "$1")/device/vbd/$(number "$2")"; }
node() { xenstore-read "$1" 2>/dev/null; }
has_state() { # DIRECTORY STATE
    [ "$(node "$1/state")" = "$2" ]
}
no_node() { ! xenstore-exists "$1" 2>/dev/null; }
# A configuration of an image with more keys.
target() { # FILE IMAGE IMAGE-KEYS [XEN-KEYS]
    printf '[image]\npath = "%s"\n%b\n[frontend.xen]\n%b\n' "$2" "$3" "${4:-}" >"$1"
}
image() { # PATH SIZE
    rm -f "$1"
    truncate -s "$2" "$1"
}
# What dom0 finds in the image of an ext4 that a guest has unmounted: clean, and the files' checksum.
check_image() { # IMAGE DIGEST
    local found
    e2fsck -fn "$1" >/tmp/e2fsck 2>&1 || { cat /tmp/e2fsck; fail "$1 is not clean"; }
    mount -o loop,ro "$1" /mnt
    found=$(cd /mnt && find . -type f | LC_ALL=C sort | xargs md5sum | md5sum | cut -d' ' -f1)
    umount /mnt
    [ -n "$2" ] || fail "the guest has told no checksum"
    is "files in $1" "$2" "$found"
}
# Whether no tapdisk holds an image.
unlocked() { # IMAGE
    flock -n "$1" true
}

# Ends of processes and domains.
ended() { ! kill -0 "$1" 2>/dev/null; }
# A domain is gone, not only dead with something of it still in use.
domain_gone() { # ID
    ! xl list | awk -v id="$1" 'NR > 1 && $2 == id {found = 1} END {exit !found}'
}
# The grants that somebody has mapped of a domain, as Xen tells; nothing for a domain that is gone.
mapped() { # ID
    xl dmesg -c >/dev/null
    xl debug-keys g
    xl dmesg | awk -v id="$1" '/grant-table for remote d/ {on = $0 ~ ("remote d" id " ")} on && /\[0x/'
}

# What debug-queue tells, a leaf a line: path=value.
flatten() {
    awk '
    function ws() { sub(/^[ \n]+/, "", text) }
    function text_of(   s) { match(text, /^"([^"\\]|\\.)*"/); s = substr(text, 2, RLENGTH - 2); text = substr(text, RLENGTH + 1); return s }
    function value(path,   key, i) {
        ws()
        if (text ~ /^\{/) {
            text = substr(text, 2); ws()
            while (text !~ /^\}/) { key = text_of(); ws(); text = substr(text, 2); value(path "." key); ws(); sub(/^,/, "", text); ws() }
            text = substr(text, 2)
        } else if (text ~ /^\[/) {
            text = substr(text, 2); ws(); i = 0
            while (text !~ /^\]/) { value(path "." i++); ws(); sub(/^,/, "", text); ws() }
            text = substr(text, 2)
        } else if (text ~ /^"/) print substr(path, 2) "=" text_of()
        else { match(text, /^[^],}]+/); print substr(path, 2) "=" substr(text, 1, RLENGTH); text = substr(text, RLENGTH + 1) }
    }
    { text = text $0 "\n" }
    END { value("") }'
}
# Asks a disk's tapdisk, for what `get` and `op` tell.
look() { # GUEST DEVICE
    tap-ctl debug-queue -p "$(pid_of "$1" "$2")" --json | flatten >/tmp/look
}
get() { # KEY
    sed -n "s/^$1=//p" /tmp/look
}
vbd() { get "frontends\.0\.$1"; }
op() { # OPERATION FIELD
    awk -F= -v op="$1" -v field="$2" '
        $1 ~ /^operations\.[0-9]+\.op$/ { on = $2 == op }
        on && $1 ~ ("^operations\\.[0-9]+\\." field "$") { print $2; found = 1 }
        END { if (!found) print 0 }' /tmp/look
}
# Nothing has gone wrong on a disk.
no_disk_errors() {
    for name in read write flush discard; do is "errors of $name" 0 "$(op $name errors)"; done
    is "copy errors" 0 "$(vbd counters.copy_errors)"
    is "broken rings" 0 "$(vbd counters.broken)"
    is "errors of rings" 0 "$(awk -F= '/^frontends\.0\.queues\.[0-9]+\.counters\.(errors|malformed)=/ {n += $2} END {print n + 0}' /tmp/look)"
}
