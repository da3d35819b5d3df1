#!/bin/busybox sh
# PID 1 of the test guest: virtio modules, the address from the kernel's command line, then the counter.
/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox mount -t proc proc /proc; /bin/busybox mount -t sysfs sysfs /sys; /bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin; export PATH=/bin; echo 1 >/proc/sys/kernel/printk
for pass in 1 2 3; do for m in $(cat /modules); do insmod "/$m" 2>/dev/null; done; done # who needs whom changes between kernel updates
for word in $(cat /proc/cmdline); do case $word in lab.ip=*) ip=${word#*=};; lab.to=*) to=${word#*=};; lab.name=*) name=${word#*=};; esac; done
ip link set lo up
for card in $(ls /sys/class/net | grep -v '^lo$' | head -n 1); do ip link set "$card" up; ip addr add "$ip" dev "$card"; done
exec /tick "$to" "$name"
