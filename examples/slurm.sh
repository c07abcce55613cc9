#!/bin/bash
# A run on two machines of a Slurm cluster: sbatch examples/slurm.sh script.py
#SBATCH --job-name=torchfedrpc
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=1
#SBATCH --time=01:00:00

# Task 0 is the driver, the others serve learners. --kill-on-bad-exit ends all tasks once one has failed.
srun --kill-on-bad-exit=1 python "$@"
