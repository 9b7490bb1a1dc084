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
port=$((20000 + SLURM_JOB_ID % 10000))  # another for each of the jobs that share a node

srun torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend=c10d --rdzv-endpoint="$first:$port" --rdzv-id="$SLURM_JOB_ID" \
    --max-restarts=3 train.py "$@" --resume "training.max_hours=$MAX_HOURS"
status=$?

# torchrun makes 1 of every status. The last line of the log says why the run stopped: a run that
# somebody has stopped stays so.
folder=runs name=$(basename "$1" .yaml)${SLURM_ARRAY_TASK_ID:+_task$SLURM_ARRAY_TASK_ID}
for setting in "$@"; do
    case $setting in
        run.folder=*) folder=${setting#run.folder=} ;;
        run.name=*) name=${setting#run.name=} ;;
    esac
done
log=$(ls -t "$folder/$name"/log.jsonl "$folder/$name"-[0-9]*/log.jsonl 2> /dev/null | head -n 1)
if [ $status -ne 0 ] && tail -n 1 "$log" | grep -q 'its time is up.*"status": 75'; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
