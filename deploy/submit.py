"""Submits a command to a Ray cluster as a job, shows its output, and ends with its exit code.

    python deploy/submit.py --address http://HEAD:8265 --working-dir . -- \
        riskforge run jobs/quickstart.yaml --address auto --output /shared/runs/quickstart

`ray job submit` takes the same arguments and ends with 1 whatever the code of a command that fails. SIGINT and SIGTERM
stop the job, which has `--stop-seconds` to end in an orderly way; with `ray job stop` it has 3. Needs the extra
`cluster`; where the cluster has a token, RAY_AUTH_MODE and RAY_AUTH_TOKEN as well.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import signal
import sys
from typing import Any

from ray.job_submission import JobStatus, JobSubmissionClient

EXIT_DRAINED = 75


async def show_output(client: JobSubmissionClient, job: str) -> None:
    """Print what the job prints, until it ends."""
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


def exit_code(details: Any) -> int:
    """That of the command; of a job that was stopped, 75; of one that could not be started, 1."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return EXIT_DRAINED
    return details.driver_exit_code or 1


def main() -> int:
    """Submit, wait, and pass the exit code on."""
    parser = argparse.ArgumentParser(description="Submit a command to a Ray cluster and end with its exit code.")
    parser.add_argument("--address", help="of the job server, http://HEAD:8265; RAY_API_SERVER_ADDRESS without it")
    parser.add_argument("--working-dir", default=".", help="folder that is sent along; the command runs in its copy")
    parser.add_argument("--stop-seconds", type=int, default=120, help="how long a stopped command may take to end")
    parser.add_argument("command", nargs="+", help="after `--`")
    options = parser.parse_args()
    client = JobSubmissionClient(options.address)
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(options.stop_seconds)}
    job = client.submit_job(
        entrypoint=shlex.join(options.command),
        runtime_env={"working_dir": options.working_dir, "env_vars": environment},
    )
    print(f"submitted as {job}", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: client.stop_job(job))
    asyncio.run(show_output(client, job))
    details = client.get_job_info(job)
    code = exit_code(details)
    if code:
        print(f"{job}: {details.message or details.status}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
