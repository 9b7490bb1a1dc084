#!/bin/bash
# Trains on all GPUs of one node or of several, and queues itself again until the run is done:
#
#     sbatch docs/slurm.sh configs/exp001_full.yaml
#     sbatch --nodes=4 docs/slurm.sh configs/exp001_full.yaml optim.lr=2e-3
#
# One torchrun runs on each node. The run ends its state saved before the time limit; MAX_HOURS must
# be below it. The nodes must see the same folders of data and runs.
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --open-mode=append
#SBATCH --requeue

MAX_HOURS=${MAX_HOURS:-23.5}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend=c10d --rdzv-endpoint="$first:29500" --rdzv-id="$SLURM_JOB_ID" \
    --max-restarts=3 train.py "$@" --resume "training.max_hours=$MAX_HOURS"
status=$?

# torchrun makes 1 of every status. The last line of the log says whether the run was stopped early.
log=$(ls -t runs/"$(basename "$1" .yaml)"*/log.jsonl | head -n 1)
if [ $status -ne 0 ] && tail -n 1 "$log" | grep -q '"status": 75'; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
