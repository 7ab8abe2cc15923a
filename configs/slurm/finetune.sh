#!/bin/bash
# A fine-tuning on Slurm that goes on by itself after preemption and after the end of its time:
#     sbatch configs/slurm/finetune.sh RUN --config big.yaml
# RUN is the run's folder, on storage that all machines see; the rest are options of `latentdiff finetune`.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
RUN=$1
shift
newest() { ls "$RUN/checkpoints" 2> /dev/null | grep '^step-' | tail -n 1; }

BEFORE=$(newest)
if [ -n "$BEFORE" ]; then
    ARGUMENTS=(--resume "$RUN")
else
    ARGUMENTS=("$@" --out "$RUN")
fi
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="${PROCESSES:-$SLURM_GPUS_ON_NODE}" \
    --rdzv-backend=c10d --rdzv-endpoint="$FIRST:${PORT:-29500}" --rdzv-id="$SLURM_JOB_ID" \
    -m latentdiff finetune "${ARGUMENTS[@]}"
CODE=$?

# Stopped by a signal with steps saved: into the queue again. A run that fails without a new step stays down.
if [ "$CODE" -ne 0 ] && [ "$(newest)" != "$BEFORE" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$CODE"
