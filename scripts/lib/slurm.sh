# Sourced by the Slurm scripts, in the repository's root: Python's environment, and where the ranks meet.

if [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi
# sed reads all of it: head would leave early, and under pipefail scontrol could die of the closed pipe.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-12805}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
