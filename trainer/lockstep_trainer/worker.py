"""One worker process: reads its orders, joins the others, trains, and ends with an exit code that says how.

0   the last step is done, and its state staged
65  the job's configuration or data is wrong (EX_DATAERR): a restart can't help
75  another worker went away (EX_TEMPFAIL): this one is not to blame
1   anything else
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from lockstep_trainer.agreement import from_all
from lockstep_trainer.callbacks import Outcome
from lockstep_trainer.config import load_job, load_orders
from lockstep_trainer.data.prepare import prepare
from lockstep_trainer.errors import PeerLost, TrainerError, UserError
from lockstep_trainer.outbox import Outbox
from lockstep_trainer.position import answer_questions
from lockstep_trainer.ranks import Ranks, join, lost_peer
from lockstep_trainer.runtime import make_deterministic, refused
from lockstep_trainer.sections import Sections
from lockstep_trainer.steprecord import StepWriter
from lockstep_trainer.storage import open_store
from lockstep_trainer.train import Trainer

DONE, FAILED, USER_ERROR, PEER_LOST = 0, 1, 65, 75

log = logging.getLogger(__name__)


def main(folder: Path) -> None:
    """Work as ``folder/start.json`` orders; does not return, the process ends here.

    It ends by ``os._exit``: destructors of process groups abort the process now and then, and would turn a finished
    worker into a crashed one.
    """
    code = FAILED
    try:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
        answer_questions(folder)
        run(folder)
        code = DONE
    except BaseException as error:
        code = _explain(error, Outbox(folder))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(folder: Path) -> None:
    """The worker's life, from orders to the last step. Raises TrainerError, or what torch raises."""
    orders = load_orders(folder / "start.json")
    job = load_job(Path(orders.job)).on(orders.world_size)
    with StepWriter.create(folder / "steps") as records:
        sections = Sections(records)
        with sections("data"):
            shared = open_store(job.checkpoint.uri, job.checkpoint.s3).below(job.prefix)
            corpus = prepare(job.trainer, job.checkpoint.s3, Path(orders.data_dir), shared)
        with sections("rendezvous"):
            if job.trainer.recipe.deterministic:
                make_deterministic()
            _set_threads(orders.local_world_size)
            ranks = join(orders, timedelta(seconds=job.spec.resilience.hang.first_step_seconds))
            _check_same_data(ranks, corpus.meta.fingerprint)
        with sections("build"):
            trainer = Trainer(
                job=job,
                orders=orders,
                ranks=ranks,
                corpus=corpus,
                folder=folder,
                records=records,
                sections=sections,
            )
        outcome: Outcome = "interrupted"
        try:
            with sections("restore"):
                trainer.restore()
            trainer.train()
            trainer.finish()
            outcome = "finished"
        except UserError:
            outcome = "failed"
            raise
        finally:
            trainer.close(outcome)
    dist.destroy_process_group()


def _set_threads(local_world_size: int) -> None:
    """As many as OMP_NUM_THREADS says, else this pod's workers share its cores."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(told) if told.isdecimal() else max(1, len(os.sched_getaffinity(0)) // local_world_size)
    torch.set_num_threads(threads)
    log.info("torch %s, %d thread(s)", torch.__version__, threads)


def _check_same_data(ranks: Ranks, fingerprint: str) -> None:
    """Pods that train on different text would never notice: their losses look alike."""
    seen = from_all(fingerprint, ranks.control)
    odd = [rank for rank, each in enumerate(seen) if each != seen[0]]
    if odd:
        raise UserError(
            f"trainer.data: the prepared tokens of rank {odd[0]} differ from those of rank 0; give all pods the same "
            "files (a shared volume, or one image), and the same Python where {stdlib} is the text"
        )


def _explain(error: BaseException, outbox: Outbox) -> int:
    """Leave the reason where the agent finds it; returns the exit code."""
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
        outbox.error(str(error), user_error=True)
        return USER_ERROR
    traceback.print_exception(error)
    if refused(error):
        remedy = "set it to false, or use another operation"
        outbox.error(f"trainer.recipe.deterministic: {error}; {remedy}", user_error=True)
        return USER_ERROR
    if lost_peer(error) or isinstance(error, PeerLost):
        outbox.error(f"another worker went away: {error}", user_error=False)
        return PEER_LOST
    known = isinstance(error, TrainerError)
    outbox.error(str(error) if known else f"{type(error).__name__}: {error}", user_error=False)
    return FAILED
