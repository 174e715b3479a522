#!/usr/bin/env bash
# preStop of Envoy: take leave of the clients, then wait for the answers that are under way. Envoy itself ends at once on SIGTERM.
#
# The image has bash and no curl, and the admin interface is on loopback: so a socket of bash.
set -u
readonly drain_s=${DRAIN_S:?seconds until every load balancer has heard of the end} limit_s=${LIMIT_S:?seconds after which nothing is waited for}

ask() {  # METHOD PATH
  exec 3<>"/dev/tcp/127.0.0.1/${ADMIN_PORT:-9901}" || return 1
  printf '%s %s HTTP/1.1\r\nhost: admin\r\ncontent-length: 0\r\nconnection: close\r\n\r\n' "$1" "$2" >&3
  cat <&3
  exec 3>&-
}

running() {
  ask GET '/stats?filter=^http\.requests\.downstream_rq_active$' | sed -n 's/.*downstream_rq_active: \([0-9][0-9]*\).*/\1/p'
}

# Each response says `connection: close` from now on, and connections are still taken for --drain-time-s: a client that has not heard of
# the end yet gets its answer.
ask POST '/drain_listeners?graceful' >/dev/null || exit 0
sleep "$drain_s"
while [ "$SECONDS" -lt "$limit_s" ] && [ "$(running)" != 0 ]; do
  sleep 1
done
