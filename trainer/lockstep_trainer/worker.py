"""One worker process: reads its orders, joins the others, trains, and ends with an exit code that says how.

0   the last step is done, and its state staged
65  the job's configuration or data is wrong (EX_DATAERR): a restart can't help
75  another worker went away (EX_TEMPFAIL): this one is not to blame
1   anything else

Where its agent keeps workers (``stays`` in the orders), one that lost another or was told to leave does not end: it
drops the generation, rests, and goes on with the next one's orders. See ``tenure``.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from lockstep_trainer.agreement import from_all
from lockstep_trainer.callbacks import Outcome
from lockstep_trainer.config import Job, Orders, check_work, load_job, load_orders
from lockstep_trainer.data.corpus import Corpus
from lockstep_trainer.data.prepare import prepare
from lockstep_trainer.errors import PeerLost, StoreError, TrainerError, UserError
from lockstep_trainer.outage import outlast
from lockstep_trainer.outbox import Outbox
from lockstep_trainer.position import Answers
from lockstep_trainer.ranks import Ranks, device_of, join, lost_peer, patience
from lockstep_trainer.runtime import make_deterministic, refused
from lockstep_trainer.sections import Sections
from lockstep_trainer.severing import forget_groups
from lockstep_trainer.steprecord import StepWriter
from lockstep_trainer.storage import open_store
from lockstep_trainer.tenure import Tenure
from lockstep_trainer.train import Trainer

DONE, FAILED, USER_ERROR, STORE_AWAY, PEER_LOST = 0, 1, 65, 69, 75

log = logging.getLogger(__name__)


def main(folder: Path) -> None:
    """Work as ``folder/start.json`` orders; does not return, the process ends here.

    It ends by ``os._exit``: destructors of process groups abort the process now and then, and would turn a finished
    worker into a crashed one.
    """
    code = FAILED
    try:
        # Of a signal that ends it, in torch or a library: where. The other threads only wait for this one's work.
        faulthandler.enable(sys.stderr, all_threads=False)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
        worker = Worker(folder)
        code = worker.live()
    except BaseException as error:
        code = _explain(error, Outbox(folder))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Worker:
    """One process, over all the generations that it works in."""

    def __init__(self, folder: Path) -> None:
        self.tenure = Tenure(folder)
        self.answers = Answers(folder, self.tenure.control)
        self._job: Job | None = None
        self._corpus: Corpus | None = None

    def live(self) -> int:
        """Work until there is nothing left to do; returns the exit code."""
        while True:
            folder = self.tenure.folder
            code, stays, why = self._generation(folder)
            if code != PEER_LOST or not stays:
                return code
            self.tenure.left()
            forget_groups(compiled=self._job is not None and self._job.trainer.recipe.compile)
            gc.collect()  # models are full of cycles; their memory is needed again
            log.info("out of %s (%s); waiting for the next generation", folder.name, why or "as told")
            following = self.tenure.rest(why)
            if following is None:
                return code
            self.answers.move(following)

    def _generation(self, folder: Path) -> tuple[int, bool, str | None]:
        """From orders to the last step, or out of it: exit code, whether this process may go on with another
        generation, and why it left unasked. No object of the generation is alive behind it."""
        stays = False
        try:
            orders = load_orders(folder / "start.json")
            stays = orders.stays
            self._run(folder, orders)
        except BaseException as error:
            why = None if self.tenure.leaving else str(error)
            if not stays or not _lost(error):
                return _explain(error, Outbox(folder)), False, why
            log.info("%s: %s", type(error).__name__, error)
            return PEER_LOST, True, why
        return DONE, False, None

    def _run(self, folder: Path, orders: Orders) -> None:
        """Raises TrainerError, or what torch raises."""
        with StepWriter.create(folder / "steps") as records:
            sections = Sections(records, self.tenure.check)
            with sections("data"):
                job, corpus = outlast(lambda: self._prepared(orders), sections)
            with sections("rendezvous"):
                if job.trainer.recipe.deterministic:
                    make_deterministic()
                _set_threads(orders.local_world_size)
                self.tenure.meets(device_of(orders))
                with self.tenure.connections.opening():
                    ranks = join(orders, patience(job.spec.resilience.hang))
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
                    tenure=self.tenure,
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

    def _prepared(self, orders: Orders) -> tuple[Job, Corpus]:
        """The job, on so many nodes, and its tokens, which no generation changes."""
        if self._job is None:
            self._job = load_job(Path(orders.job))
            check_work(self._job, orders)
        if self._corpus is None:
            checkpoint = self._job.checkpoint
            shared = open_store(checkpoint.uri, checkpoint.s3).below(self._job.prefix)
            self._corpus = prepare(self._job.trainer, checkpoint.s3, Path(orders.data_dir), shared)
        return self._job.on(orders.world_size), self._corpus


def _lost(error: BaseException) -> bool:
    return lost_peer(error) or isinstance(error, PeerLost)


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
    if _lost(error):
        outbox.error(f"another worker went away: {error}", user_error=False)
        return PEER_LOST
    known = isinstance(error, TrainerError)
    outbox.error(str(error) if known else f"{type(error).__name__}: {error}", user_error=False)
    return STORE_AWAY if isinstance(error, StoreError) and error.temporary else FAILED
