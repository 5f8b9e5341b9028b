#!/bin/sh
# The first process of the virtual machine, out of its initramfs: modules, the host's own root below a memory file system, then stage2.sh in it.
B=/bin/busybox
$B mount -t proc proc /proc; $B mount -t sysfs sys /sys; $B mount -t devtmpfs dev /dev
die() { echo "guest: $*" >/dev/console; $B sleep 0.2; $B poweroff -f; }
while read module; do $B insmod "/modules/$module.ko" || die "no module $module"; done </modules/order
$B mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=524288 root /lower || die "the host's root is not there"
$B mount -t 9p -o trans=virtio,version=9p2000.L,rw,cache=none,msize=524288 job /job || die "the job is not there"
$B mount -t tmpfs -o mode=755 rw /upper; $B mkdir /upper/up /upper/work
$B mount -t overlay -o lowerdir=/lower,upperdir=/upper/up,workdir=/upper/work overlay /newroot || die "no overlay"
for folder in proc sys dev; do $B mount -o move /$folder /newroot/$folder; done
$B mkdir -p /newroot/dev/pts /newroot/dev/shm
$B mount -t devpts devpts /newroot/dev/pts
$B mount -t tmpfs -o mode=1777 shm /newroot/dev/shm
$B mount -t tmpfs -o mode=755 run /newroot/run
$B mkdir -p /newroot/run/job; $B mount -o move /job /newroot/run/job
exec $B switch_root /newroot /bin/bash /run/job/stage2.sh
