#!/bin/sh
# PID 1 of the lab's containers: counts into /var/lib/counter and ends at once on SIGPWR, which is what liblxc sends for a clean stop, or on
# SIGRTMIN+3 (37), which it sends instead if PID 1 blocks that at that moment, as systemd does, and any process within fork(2).
#   /etc/ignore-stop   if it exists: no clean stop works    /etc/ip      a fixed address instead of DHCP
#   /etc/tick          interval in seconds; each tick then goes to /var/log/ticks with the time: what CRIU restores has an uptime that stood still with it
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
if [ -e /etc/ignore-stop ]; then trap '' PWR TERM INT 37; else trap 'echo "halt $(date +%s)" >>/var/log/init.log; exit 0' PWR TERM INT 37; fi
ip link set lo up 2>/dev/null
if [ -e /etc/ip ]; then ip addr add "$(cat /etc/ip)" dev eth0 && ip link set eth0 up
elif [ -e /sys/class/net/eth0 ]; then ip link set eth0 up; (udhcpc -i eth0 -q -n -t 5 -T 1 -s /etc/udhcpc/default.script >/var/log/udhcpc.log 2>&1 &); fi
echo "boot $(date +%s)" >>/var/log/init.log
[ -x /etc/rc.local ] && /etc/rc.local
n=$(cat /var/lib/counter 2>/dev/null || echo 0)
while :; do
  n=$((n + 1)); echo $n >/var/lib/counter.new; mv /var/lib/counter.new /var/lib/counter
  t=$(cat /etc/tick 2>/dev/null) && echo "$EPOCHREALTIME $n" >>/var/log/ticks
  sleep "${t:-0.1}" & wait $!
done
