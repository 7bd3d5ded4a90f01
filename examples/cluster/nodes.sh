#!/bin/bash
# One run over several machines without a scheduler. The same line on each of them, with the address of the first:
#     NODES=2 FIRST=10.0.0.1 bash examples/cluster/nodes.sh hh-smollm2 data.name=/shared/hh --out /shared/runs/hh
# OUT lies on shared storage: the first process writes, and all read what it wrote. PROCESSES: of each machine.
set -eu

exec torchrun --nnodes "${NODES:?how many machines}" --nproc_per_node "${PROCESSES:-8}" \
    --rdzv_id "${JOB:-preftune}" --rdzv_backend c10d --rdzv_endpoint "${FIRST:?address of the first}:${PORT:-29500}" \
    -m preftune run "$@"
