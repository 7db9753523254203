# Sourced by scripts/slurm/train.sh, in the repository's root: Python's environment, where the ranks meet, starting again.

if [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi
# sed reads all of it: head would leave early, and under pipefail scontrol could die of the closed pipe.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-12805}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
# Since Slurm 22.05 srun does not take this from the job: each task would have one core.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}; fi

# A job that is warned of its end (--signal) or preempted queues itself again (--requeue_on_preempt), and Slurm does so
# where a node fails (--requeue). This is for a rank that hung (exit code 124) or was killed (128 + signal), RESTARTS
# times at most; any other failure would only come again. A job that is cancelled is no longer RUNNING.
start_again() {
  local code=$1 job
  if [ "$code" -ne 124 ] && [ "$code" -le 128 ]; then return; fi
  # The number of one job of an array is that of the whole array.
  job=$SLURM_JOB_ID
  if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
  if [ "$(squeue --noheader --jobs "$job" --format %T)" != RUNNING ]; then return; fi
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "${RESTARTS:-5}" ]; then
    echo "a rank hung or was killed (exit code $code), and RESTARTS=${RESTARTS:-5} are used up"
  else
    echo "a rank hung or was killed (exit code $code): the job goes back into the queue"
    scontrol requeue "$job"
  fi
}
trap 'start_again $?' EXIT
