#!/bin/bash
# Builds the image: launch/containers/build.sh docker|podman|apptainer [further options of its build command]
#
# Docker and Podman make the image poet-megatron, Apptainer the file poet-megatron.sif in the current folder. BASE_IMAGE in the environment
# takes the place of the one in versions.env: a mirror of it.
set -eu
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
clone=$(cd "$folder/../.." && pwd)
base=${BASE_IMAGE-}
# shellcheck source=launch/containers/versions.env
. "$folder/versions.env"
base=${base:-$BASE_IMAGE}
engine=${1-}
[ $# -eq 0 ] || shift
case $engine in
    docker | podman)
        set -- "$engine" build --build-arg "BASE_IMAGE=$base" -f "$folder/Dockerfile" -t poet-megatron "$@" "$clone" ;;
    apptainer)
        set -- apptainer build --build-arg "BASE_IMAGE=$base" "$@" "$PWD/poet-megatron.sif" "$folder/poet_megatron.def"
        cd "$clone" ;;  # where the definition's %files are
    *)
        echo "usage: launch/containers/build.sh docker|podman|apptainer [OPTION ...]" >&2
        exit 2 ;;
esac
command -v "$1" > /dev/null || { echo "error: there is no $1 on this machine" >&2; exit 1; }
echo "+ $*" >&2
exec "$@"
