#!/usr/bin/env bash
# One node, several GPUs, without a scheduler. For several nodes set NODES, RANK_OF_NODE and MASTER, and start
# the script on each node; the folders of runs and of videos must be the same on all of them.
#
#   GPUS=8 docs/templates/torchrun.sh --config experiment/poodle_bdd100k.yaml --data.root bdd100k/
#
# Going on after an interruption is the same command: --ckpt_path last starts anew where there is nothing yet.
set -euo pipefail

GPUS="${GPUS:-8}"
NODES="${NODES:-1}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # the loaders' processes use the cores

if [ "$NODES" -eq 1 ]; then
    meeting=(--standalone)
else
    : "${RANK_OF_NODE:?number of this node, from 0}" "${MASTER:?host name of node 0}"
    # one time for the run's folder on all nodes
    : "${POODLE_RUN_TIME:?the same on all nodes, e.g. 2026-01-31_12-00-00}"
    export POODLE_RUN_TIME
    meeting=(--nnodes "$NODES" --node-rank "$RANK_OF_NODE" --master-addr "$MASTER" --master-port "${PORT:-29500}")
fi

exec torchrun "${meeting[@]}" --nproc-per-node "$GPUS" -m poodle_lightning fit \
    "$@" --trainer.devices "$GPUS" --trainer.num_nodes "$NODES" --ckpt_path last
