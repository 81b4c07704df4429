"""A sweep on a cluster, as a Ray job, followed from outside through the cluster's dashboard."""

import asyncio
import logging
import os
import shlex
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from analysis.errors import BadInput, one_line
from orchestrator.doctor import REFUSED

SAVING = 300  # seconds to save every trial in; Ray's own are 3, then it kills
INTERRUPTED = 130
CODES = (0, 1, 2, INTERRUPTED)  # that lmsat ends with

Show = Callable[[str], None]


def submit(address: str, grid_file: Path, arguments: list[str], show: Show, say: Show) -> int:
    """Run `lmsat sweep --grid FILE` with `arguments` on the head of the cluster whose dashboard is
    at `address`, and wait for its end; its exit code. The file travels, alone.

    `show` gets the job's output, line by line as it comes, and `say` what is ours. Ctrl-C asks the
    job to stop, and it saves its trials; a second one leaves it to itself. Raises BadInput where no
    dashboard answers at `address`, or it refuses.
    """
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # Ray would take these before ours
        os.environ.pop(name, None)
    logging.disable(logging.INFO)  # Ray tells of its packages
    command = shlex.join(["lmsat", "sweep", "--grid", grid_file.name, *arguments])
    client, where = None, f"--address: {address}"
    with tempfile.TemporaryDirectory(prefix="lmsat-") as folder:
        shutil.copy(grid_file, folder)
        try:
            client = JobSubmissionClient(address)
            job = client.submit_job(
                entrypoint=f"exec {command}",
                runtime_env={
                    "working_dir": folder,
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(SAVING)},
                },
            )
        except AuthenticationError:
            raise BadInput(f"{where} refuses: {REFUSED}") from None
        except (OSError, RuntimeError, ValueError) as error:
            if client:
                raise BadInput(f"{where} takes no job: {one_line(error)}") from None
            todo = "keep `ray dashboard` open, and give what it prints"
            raise BadInput(f"{where}: no cluster's dashboard: {todo} ({one_line(error)})") from None
    later = " or ".join(f"ray job {do} --address {address} {job}" for do in ("logs -f", "stop"))
    try:
        return asyncio.run(_follow(client, job, show, say))
    except asyncio.CancelledError:
        say(f"left to itself: {later}")
        return INTERRUPTED
    except Exception as error:  # the tunnel or the cluster has gone
        say(f"lost {address} ({one_line(error)}), and left to itself: {later}")
        return 1


async def _follow(client: JobSubmissionClient, job: str, show: Show, say: Show) -> int:
    """Raises CancelledError on a second Ctrl-C."""
    following, asked = asyncio.current_task(), False

    def ask() -> None:
        nonlocal asked
        if asked and following:
            following.cancel()
            return
        asked = True
        try:
            client.stop_job(job)
        except Exception as error:  # the tunnel has gone; the log will say so too
            say(f"could not ask the job to stop ({one_line(error)}); again to leave it to itself")
        else:
            say("asked the job to stop; again to leave it to itself")

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ask)
    rest = ""
    async for text in client.tail_job_logs(job):
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            show(line)
    if rest:
        show(rest)
    while not (found := client.get_job_info(job)).status.is_terminal():
        await asyncio.sleep(0.5)
    if found.status == JobStatus.STOPPED:
        return INTERRUPTED
    if found.driver_exit_code is None:  # it has never begun, or its machine has gone
        say(found.message or f"job {job} failed")
    return found.driver_exit_code if found.driver_exit_code in CODES else 1
