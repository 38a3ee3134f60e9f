"""Submits a training run to Slurm with submitit (`pip install submitit`). After a time limit, the run is queued again.

python launch/submit.py --nodes=4 --gpus=8 --hours=12 -- gpt2-124m --out_dir=out
"""

from __future__ import annotations

import argparse
import sys

import submitit


class Train:
    """One process of the run. After checkpoint(), submitit calls it again in a new job."""

    def __init__(self, argv: list[str]):
        self.argv = argv

    def __call__(self) -> int:
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        from llm_from_scratch.cli.train import main  # torch is imported on the node

        return main(["--init_from=auto", *self.argv])

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called before the time limit. The new job resumes from the last checkpoint."""
        return submitit.helpers.DelayedSubmission(self)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", default="slurm", help="slurm, or local: processes on this machine")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="processes per node, each with a GPU (slurm)")
    parser.add_argument("--hours", type=float, default=12)
    parser.add_argument("--logs", default="slurm-logs", help="folder of the output")
    parser.add_argument("argv", nargs="+", help="arguments of llm-train")
    options = parser.parse_args()
    executor = submitit.AutoExecutor(folder=options.logs, cluster=options.cluster, slurm_max_num_timeout=100)
    executor.update_parameters(
        nodes=options.nodes, tasks_per_node=options.gpus, timeout_min=round(options.hours * 60), name="gpt"
    )
    if options.cluster == "slurm":
        executor.update_parameters(gpus_per_node=options.gpus)
    job = executor.submit(Train(options.argv))
    print(f"job {job.job_id}, output in {job.paths.folder}")
    if options.cluster == "local":
        sys.exit(max(job.results()))


if __name__ == "__main__":
    main()
