#!/usr/bin/env bash
# One task of a Slurm job: task.sh COMMAND ... runs COMMAND where the other nodes' tasks can reach it.
#
# Barriers and agreements between ranks use gloo, which listens on the address that the node's own name stands for.
# Where that is 127.x (Debian writes it into /etc/hosts), no other node can connect. So each node names the network
# interface that leads to the master, unless GLOO_SOCKET_IFNAME is set already.

# Prints the interface through which this node reaches HOST; on the host itself, the one that others reach it by.
interface_to() {
  local address source
  address=$(getent ahostsv4 "$1" | awk 'NR == 1 { print $1 }')
  source=$(ip -4 -o route get "${address:-0.0.0.0}" | sed -n 's/.* src \([0-9.]*\).*/\1/p')
  case $source in
    "" | 127.*) ip -4 -o route show default | sed -n '1s/.* dev \([^ ]*\).*/\1/p' ;;
    *) ip -4 -o address show | awk -v source="$source" '$4 ~ "^" source "/" { print $2; exit }' ;;
  esac
}

if [ "${SLURM_NNODES:-1}" -gt 1 ] && [ -z "${GLOO_SOCKET_IFNAME:-}" ] && command -v ip >/dev/null; then
  interface=$(interface_to "${MASTER_ADDR:?where the ranks meet}" 2>/dev/null || true)
  if [ -n "$interface" ]; then export GLOO_SOCKET_IFNAME=$interface; fi
fi
exec "$@"
