#!/bin/sh
# Installs what the Slurm tests need, where it is missing: Debian's packages, as root. Nothing is started; the tests bring their own settings.
set -eu
PATH=$PATH:/usr/sbin:/sbin
packages="slurmctld slurmd slurm-client munge shellcheck"
missing=""
for program in slurmctld slurmd sbatch munged shellcheck; do
    command -v "$program" > /dev/null || missing="$missing $program"
done
[ -n "$missing" ] || exit 0
echo "missing:$missing"
if ! command -v apt-get > /dev/null || [ "$(id -u)" -ne 0 ]; then
    echo "error: the Slurm tests run as root on Debian or Ubuntu; install there: apt-get install --no-install-recommends $packages" >&2
    exit 1
fi
apt-get update -qq
# shellcheck disable=SC2086  # several words
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages > /dev/null
