# What every guest's script begins with (lib.sh puts it there).
set -e
exec 9</dev/hvc0

# Tells dom0 where the guest is, and waits until it says go.
step() { # WORD
    echo "[step] $1"
    read -r _ <&9
}

# Whether dom0 has said go. `read` with a time-out loses a line that comes as its time runs out; with none it only looks.
told_to_go() {
    read -t 0 <&9 && read -r _ <&9
}

# The value of a setting of a disk's queue.
queue() { # DEVICE SETTING
    cat "/sys/block/$1/queue/$2"
}

# One checksum of all files below a folder and their names.
digest() { # FOLDER
    (cd "$1" && find . -type f | LC_ALL=C sort | xargs md5sum | md5sum | cut -d' ' -f1)
}

# Hundreds of files, of sizes from a byte to half a megabyte, in several folders.
files() { # FOLDER NUMBER SEED
    local i size
    head -c 600000 /dev/urandom >/tmp/blob
    for ((i = 0; i < $2; i++)); do
        size=$(((i * 7919 + $3 * 104729) % 60000 + 1))
        [ $((i % 25)) != 0 ] || size=$((size * 9))
        [ -d "$1/d$((i % 7))" ] || mkdir "$1/d$((i % 7))"
        { echo "$3 $i"; head -c $size /tmp/blob; } >"$1/d$((i % 7))/f$i"
        # Some are made durable at once.
        [ $((i % 40)) != 0 ] || sync "$1/d$((i % 7))/f$i"
    done
}

# Makes a file system with files, unmounts it, and checks it after it was mounted again. dom0 is told the checksum.
file_system() { # DEVICE NUMBER
    local before after
    # All at once: what the kernel would initialise later would take room in the image at any time.
    mkfs.ext4 -q -F -E lazy_itable_init=0 "/dev/$1"
    mount "/dev/$1" /mnt
    files /mnt "$2" "$1$RANDOM"
    before=$(digest /mnt)
    sync
    umount /mnt
    echo 3 >/proc/sys/vm/drop_caches
    mount "/dev/$1" /mnt
    after=$(digest /mnt)
    [ "$before" = "$after" ] || { echo "$1: files have changed: $before, $after"; exit 1; }
    echo "DIGEST $1 $after"
}

# Whether blkfront has complained.
no_errors() {
    ! dmesg | grep -E 'I/O error|op failed|blkfront:.*(disabled;.*flush|barrier or flush: disabled)|Buffer I/O|EXT4-fs (error|warning)'
}
